"""Thresholds of rows (the smallest number that top_k or top_p keeps), and rows with what lies below them taken out."""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.ops.sampling.triton.filter import candidates, gather, hold, scan_weight
from flashinfer.ops.sampling.triton.rows import (
    NEG_INF,
    NEG_INF_KEY,
    NO_KEY,
    POSITIVE_KEY,
    group_offsets,
    group_weights,
    read,
    sort_key,
)

# Of a row's search for top_p's threshold: the interval (LOW, HIGH] it lies in, or is guessed to; what it must lie in.
SEARCH_FIELDS = tl.constexpr(8)
LOW = tl.constexpr(0)
HIGH = tl.constexpr(1)
BOTTOM = tl.constexpr(2)
PEAK = tl.constexpr(3)
OPEN = tl.constexpr(4)
# Groups of the sample that the guess is made from, and how finely it looks: a five-hundredth of a number's size.
SAMPLE_GROUPS = tl.constexpr(64)
KEY_STEP = tl.constexpr(1 << 14)


@triton.jit
def light_edge(key, weight, light, low, high):
    """A key in (low, high] about which what is not heavier weighs `light`; at most 18 rounds."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while high - low > KEY_STEP:
        middle = (low + high) >> 1
        if tl.sum(tl.where(key <= middle.to(tl.int32), weight, 0.0), 0) > light:
            high = middle
        else:
            low = middle
    return low.to(tl.int32), high.to(tl.int32)


@triton.jit
def guess_interval(x, vocab, num_groups, light, bottom, peak, LOGITS: tl.constexpr, cut: tl.constexpr):
    """Keys (low, high] that probably hold top_p's threshold, from a sample of the row's groups.

    Tokens outside of the nucleus weigh `light` together, and each weighs little: so their share of a sample tells
    where they end better than that of the few heavy ones would. Four deviations to both sides.
    """
    sampled = tl.arange(0, SAMPLE_GROUPS)
    group = (sampled.to(tl.int64) * num_groups // SAMPLE_GROUPS).to(tl.int32)
    offs = tl.reshape(group_offsets(group, cut), [SAMPLE_GROUPS * cut.group])
    weight = read(x, offs, vocab, LOGITS)
    key = sort_key(weight)
    share = tl.sum((offs < vocab).to(tl.float32), 0) / vocab
    target = light * share
    _low, edge = light_edge(key, weight, target, bottom, peak)
    spread = 4.0 * tl.sqrt(tl.sum(tl.where(key <= edge, weight * weight, 0.0), 0))
    low, _high = light_edge(key, weight, target - spread, bottom, peak)
    _low, high = light_edge(key, weight, target + spread, bottom, peak)
    return low, high


@triton.jit
def nucleus_floor(key, weight, limit, low, high):
    """The smallest t in (low, high] such that less than `limit` weighs more, which holds at `high`: 33 rounds."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        if tl.sum(tl.where(key > middle.to(tl.int32), weight, 0.0), 0) < limit:
            high = middle
        else:
            low = middle
    return high.to(tl.int32)


@triton.jit(do_not_specialize=["num_groups", "value"])
def threshold_kernel(
    x,
    group_max,
    group_sum,
    parameter,
    value,
    scratch,
    floors,
    weights,
    search,
    stride,
    vocab,
    num_groups,
    KIND: tl.constexpr,
    LOGITS: tl.constexpr,
    cut: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Grid: rows. The key from which on tokens are kept, and what they weigh; or the beginning of a search for it.

    KIND: "k", "p" or "min_p"; parameter: that number `[rows]`, or None for the value. group_sum: None for top_k of
    logits (nothing is weighed). search: for top_p, int32 `[rows, SEARCH_FIELDS]` and fp32 limits `[rows]`.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    offs_group = tl.arange(0, cut.groups)
    mask = offs_group < num_groups
    group_high = tl.load(group_max + row * cut.groups + offs_group, mask=mask, other=NEG_INF)
    group_key = tl.where(mask, sort_key(group_high), NO_KEY)
    shift = 0.0
    slots = (
        scratch[0] + row * cut.groups,
        scratch[1] + row * cut.candidates,
        scratch[2] + row * cut.candidates,
    )
    stats = (group_max, group_sum, row * cut.groups + offs_group, mask)
    lowest = tl.full((), NEG_INF_KEY + 1 if LOGITS else POSITIVE_KEY, tl.int32)
    floor = lowest
    peak = tl.max(group_key, 0)
    kept = tl.full((), 0.0, tl.float32)
    is_open = tl.full((), 0, tl.int32)
    if parameter is not None:
        value = tl.load(parameter + row)
    if KIND == "k":
        k = tl.maximum(tl.cast(tl.minimum(value, vocab), tl.int32), 1)
        if not LOGITS:
            weight, _shift = group_weights(group_max, group_sum, row * cut.groups + offs_group, mask, LOGITS)
            kept = tl.sum(weight, 0).to(tl.float32)
        if (k < vocab) & (peak >= lowest):
            floor, kept, _held = hold(
                x, vocab, shift, group_key, k, 0.0, lowest, slots, stats, True, False, LOGITS, cut, SCAN
            )
    elif KIND == "min_p":
        floor = tl.maximum(sort_key(tl.max(group_high, 0) * tl.cast(value, tl.float32)), lowest)
        count = gather(x, vocab, group_key, floor, slots, LOGITS, cut)
        if count <= cut.candidates:
            _key, share = candidates(slots, count, shift, LOGITS, cut)
            kept = tl.sum(share, 0)
        else:
            kept = scan_weight(x, vocab, shift, floor, LOGITS, SCAN)
    else:
        p = tl.cast(value, tl.float32)
        weight, _shift = group_weights(group_max, group_sum, row * cut.groups + offs_group, mask, LOGITS)
        total = tl.sum(weight, 0)
        kept = total.to(tl.float32)
        limit = (p * total).to(tl.float32)
        if (p < 1.0) & (total > 0) & (total < float("inf")):
            everything = tl.cast(vocab, tl.int32)
            floor, _weight, held = hold(
                x, vocab, shift, group_key, everything, limit, lowest, slots, stats, False, True, LOGITS, cut, SCAN
            )
            if held >= 0:
                key, share = candidates(slots, held, shift, LOGITS, cut)
                floor = nucleus_floor(key, share, limit, floor - 1, peak)
                kept = tl.sum(tl.where(key >= floor, share, 0.0), 0)
            else:
                is_open = tl.full((), 1, tl.int32)
            # Tokens below (1 - p) / vocab of the total can all be dropped and p is still there.
            flat = ((1.0 - p) * total / vocab * 0.999).to(tl.float32)
            bottom = tl.maximum(sort_key(flat), lowest) - 1
            low = bottom
            high = peak
            if is_open != 0:
                light = (total - limit).to(tl.float32)
                low, high = guess_interval(x, vocab, num_groups, light, bottom, peak, LOGITS, cut)
            tl.store(search[0] + row * SEARCH_FIELDS + LOW, low)
            tl.store(search[0] + row * SEARCH_FIELDS + HIGH, high)
            tl.store(search[0] + row * SEARCH_FIELDS + BOTTOM, bottom)
            tl.store(search[0] + row * SEARCH_FIELDS + PEAK, peak)
            tl.store(search[1] + row, limit)
        tl.store(search[0] + row * SEARCH_FIELDS + OPEN, is_open)
    tl.store(floors + row, floor)
    tl.store(weights + row, kept)


@triton.jit(do_not_specialize=["num_splits", "tiles_per_split"])
def collect_kernel(
    x,
    search,
    found,
    sums,
    stride,
    vocab,
    num_splits,
    tiles_per_split,
    SPLITS: tl.constexpr,
    FOUND: tl.constexpr,
    LISTS: tl.constexpr,
    LOGITS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Grid: rows * num_splits. The tokens of open rows that lie in the interval of their search, for `settle_kernel`.

    Each thread has a list of its own, so that none waits for another. found: fp32 `[rows, SPLITS, room, LISTS]`, FOUND
    a row; sums: fp32 `[rows, 3, SPLITS, LISTS]`: weight above the interval, in it, tokens in it.
    """
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    ints = search[0] + row * SEARCH_FIELDS
    if tl.load(ints + OPEN) != 0:
        low = tl.load(ints + LOW)
        high = tl.load(ints + HIGH)
        COLS: tl.constexpr = SCAN // LISTS
        ROOM: tl.constexpr = FOUND // (SPLITS * LISTS)
        number = tl.arange(0, LISTS)
        # One number a load: so neighbouring threads read neighbours, and a thread's column is the same throughout.
        offs_tile = tl.max_contiguous(number[:, None] + tl.arange(0, COLS)[None, :] * LISTS, [1, 1])
        mine = found + row * FOUND + split * (ROOM * LISTS) + number[:, None]
        above = tl.zeros([LISTS, COLS], tl.float32)
        within = tl.zeros([LISTS, COLS], tl.float32)
        count = tl.zeros([LISTS], tl.int32)
        for i in range(tiles_per_split):
            offs = tl.max_contiguous((split * tiles_per_split + i) * SCAN + offs_tile, [1, 1])
            v = read(x + row * stride, offs, vocab, LOGITS)
            key = sort_key(v)
            inside = (key > low) & (key <= high)
            above += tl.where(key > high, v, 0.0)
            within += tl.where(inside, v, 0.0)
            position = count[:, None] + tl.cumsum(inside.to(tl.int32), 1) - 1
            tl.store(mine + position * LISTS, v, mask=inside & (position < ROOM))
            count += tl.sum(inside.to(tl.int32), 1)
        target = sums + row * 3 * SPLITS * LISTS + split * LISTS + number
        tl.store(target, tl.sum(above, 1))
        tl.store(target + SPLITS * LISTS, tl.sum(within, 1))
        tl.store(target + 2 * SPLITS * LISTS, count.to(tl.float32))


@triton.jit(do_not_specialize=["num_splits"])
def settle_kernel(
    x,
    floors,
    weights,
    search,
    found,
    sums,
    stride,
    vocab,
    num_splits,
    SPLITS: tl.constexpr,
    FOUND: tl.constexpr,
    LISTS: tl.constexpr,
    LOGITS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Grid: rows. The threshold of open rows, among what `collect_kernel` found.

    Where the guess was wrong or too many tokens lay in the interval: by halving what is left, at most 33 reads.
    """
    row = tl.program_id(0).to(tl.int64)
    ints = search[0] + row * SEARCH_FIELDS
    if tl.load(ints + OPEN) != 0:
        x += row * stride
        found += row * FOUND
        sums += row * 3 * SPLITS * LISTS
        limit = tl.load(search[1] + row)
        low = tl.load(ints + LOW)
        high = tl.load(ints + HIGH)
        lists = tl.arange(0, SPLITS * LISTS)
        here = lists < num_splits * LISTS
        above = tl.sum(tl.load(sums + lists, mask=here, other=0.0), 0)
        within = tl.sum(tl.load(sums + SPLITS * LISTS + lists, mask=here, other=0.0), 0)
        most = tl.max(tl.load(sums + 2 * SPLITS * LISTS + lists, mask=here, other=0.0), 0)
        ROOM: tl.constexpr = FOUND // (SPLITS * LISTS)
        if (above < limit) & (above + within >= limit) & (most <= ROOM):
            offs = tl.arange(0, FOUND)
            owner = offs // (ROOM * LISTS) * LISTS + offs % LISTS
            count = tl.load(sums + 2 * SPLITS * LISTS + owner, mask=owner < num_splits * LISTS, other=0.0)
            v = tl.load(found + offs, mask=(offs // LISTS) % ROOM < count.to(tl.int32), other=0.0)
            # The bits of positive numbers are their keys, and no key of the interval is 0.
            key = v.to(tl.int32, bitcast=True)
            floor = nucleus_floor(key, v, limit - above, low, high)
            tl.store(weights + row, above + tl.sum(tl.where(key >= floor, v, 0.0), 0))
        else:
            left = low
            right = high
            if above >= limit:
                left = high
                right = tl.load(ints + PEAK)
            elif above + within < limit:
                left = tl.load(ints + BOTTOM)
                right = low
            floor = floor_by_scans(x, vocab, limit, left, right, LOGITS, SCAN)
            tl.store(weights + row, scan_weight(x, vocab, 0.0, floor, LOGITS, SCAN))
        tl.store(floors + row, floor)


@triton.jit
def floor_by_scans(x, vocab, limit, low, high, LOGITS: tl.constexpr, SCAN: tl.constexpr):
    """`nucleus_floor` of the row itself."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        if scan_weight(x, vocab, 0.0, middle.to(tl.int32) + 1, LOGITS, SCAN) < limit:
            high = middle
        else:
            low = middle
    return high.to(tl.int32)


@triton.jit(do_not_specialize=["num_tiles"])
def apply_kernel(x, out, floors, weights, stride, vocab, num_tiles, LOGITS: tl.constexpr, TILE: tl.constexpr):
    """Grid: rows * num_tiles. Below the floor logits become -inf and probs 0; other probs are divided by the weight."""
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    offs = (tl.program_id(0) % num_tiles) * TILE + tl.arange(0, TILE)
    v = read(x + row * stride, offs, vocab, LOGITS)
    keep = sort_key(v) >= tl.load(floors + row)
    if LOGITS:
        y = tl.where(keep, v, NEG_INF)
    else:
        y = tl.where(keep, tl.div_rn(v, tl.load(weights + row)), 0.0)
    tl.store(out + row * vocab + offs, y.to(out.dtype.element_ty), mask=offs < vocab)
