"""The search for the threshold of a row's k largest numbers, among its own numbers, by several programs.

A sample of the row's groups tells an interval of keys in which the threshold probably lies. The splits of the row
collect what lies there and sum what lies above; the last of them to arrive settles it. See `nucleus.py` for top_p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.ops.sampling.triton.rows import (
    NO_KEY,
    group_offsets,
    kth_largest_key,
    number_of,
    read,
    sort_key,
    weight_of,
)

# How finely a guess looks: a five-hundredth of a number's size.
KEY_STEP = tl.constexpr(1 << 14)
# What a split says of its part, after the weights above four pivots: how many tokens lie in the interval, how many
# above it, and what those weigh.
PART_FIELDS = tl.constexpr(8)
INSIDE = tl.constexpr(4)
ABOVE = tl.constexpr(5)
ABOVE_WEIGHT = tl.constexpr(6)
# How many tiles are on their way at once where numbers are collected.
COLLECT_STAGES = tl.constexpr(3)


@triton.jit
def light_edge(key, measure, light, low, high):
    """Keys (a, b] about which what is not heavier measures `light`, KEY_STEP apart; at most 18 rounds."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while high - low > KEY_STEP:
        middle = (low + high) >> 1
        if tl.sum(tl.where(key <= middle.to(tl.int32), measure, 0.0), 0) > light:
            high = middle
        else:
            low = middle
    return low.to(tl.int32), high.to(tl.int32)


@triton.jit
def guess_interval(
    x,
    vocab,
    num_groups,
    light,
    bottom,
    peak,
    MASS: tl.constexpr,
    SAMPLE_GROUPS: tl.constexpr,
    LOGITS: tl.constexpr,
    cut: tl.constexpr,
):
    """Keys (low, high], inside of (bottom, peak], that probably hold the threshold below which `light` lies.

    light: a weight of probs (MASS), or a number of tokens. What is light is much and each of it little: so its share of
    a sample of the row's groups tells where it ends better than that of the few heavy tokens. Four deviations around.
    """
    sampled = tl.arange(0, SAMPLE_GROUPS)
    group = (sampled.to(tl.int64) * num_groups // SAMPLE_GROUPS).to(tl.int32)
    offs = tl.reshape(group_offsets(group, cut), [SAMPLE_GROUPS * cut.group])
    v = read(x, offs, vocab, LOGITS)
    key = sort_key(v)
    inside = (offs < vocab).to(tl.float32)
    measure = v if MASS else inside
    target = light * (tl.sum(inside, 0) / vocab)
    _low, edge = light_edge(key, measure, target, bottom, peak)
    variance = tl.sum(tl.where(key <= edge, measure * measure, 0.0), 0)
    if not MASS:
        # A part of a known number of tokens.
        variance *= 1.0 - light / vocab
    spread = 4.0 * tl.sqrt(variance)
    low, _high = light_edge(key, measure, target - spread, bottom, peak)
    _low, high = light_edge(key, measure, target + spread, bottom, peak)
    return low, high


@triton.jit
def collect_part(
    x,
    vocab,
    shift,
    low,
    high,
    begin,
    num_tiles,
    values,
    fields,
    ROOM: tl.constexpr,
    LOGITS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Write a part's numbers with keys in (low, high] to `values`, as many as there is room for, and its `fields`."""
    count = tl.full((), 0, tl.int32)
    above = tl.zeros([SCAN], tl.int32)
    weight = tl.zeros([SCAN], tl.float32)
    for i in tl.range(num_tiles, num_stages=COLLECT_STAGES):
        offs = begin + i * SCAN + tl.arange(0, SCAN)
        v = read(x, offs, vocab, LOGITS)
        key = tl.where(offs < vocab, sort_key(v), NO_KEY)
        above += (key > high).to(tl.int32)
        weight += tl.where(key > high, weight_of(v, shift, LOGITS), 0.0)
        inside = (key > low) & (key <= high)
        position = count + tl.cumsum(inside.to(tl.int32), 0) - 1
        count += tl.sum(inside.to(tl.int32), 0)
        tl.store(values + position, v, mask=inside & (position < ROOM))
    tl.store(fields + INSIDE, count.to(tl.float32))
    tl.store(fields + ABOVE, tl.sum(above, 0).to(tl.float32))
    tl.store(fields + ABOVE_WEIGHT, tl.sum(weight, 0))


@triton.jit
def settle(
    x,
    vocab,
    shift,
    values,
    fields,
    num_splits,
    k,
    interval,
    FOUND: tl.constexpr,
    SPLITS: tl.constexpr,
    LOGITS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """(the key from which on k tokens are kept; what they weigh).

    All that equal the last of them are kept. interval: keys low, high as guessed; bottom, peak that are sure. Where the
    guess was wrong, or more lay in the interval than there is room for, by halving the row itself: at most 34 reads.
    """
    low, high, bottom, peak = interval
    ROOM: tl.constexpr = FOUND // SPLITS
    splits = tl.arange(0, SPLITS)
    mine = fields + splits * PART_FIELDS
    there = splits < num_splits
    inside = tl.load(mine + INSIDE, mask=there, other=0.0, cache_modifier=".cg").to(tl.int32)
    above = tl.sum(tl.load(mine + ABOVE, mask=there, other=0.0, cache_modifier=".cg").to(tl.int32), 0)
    heavier = tl.sum(tl.load(mine + ABOVE_WEIGHT, mask=there, other=0.0, cache_modifier=".cg"), 0)
    slot = tl.arange(0, ROOM)[None, :]
    collected = slot < inside[:, None]
    v = tl.load(values + splits[:, None] * ROOM + slot, mask=collected, other=0.0, cache_modifier=".cg")
    # Their order does not matter.
    key = tl.reshape(tl.where(collected, sort_key(v), NO_KEY), [FOUND], can_reorder=True)
    fits = tl.max(inside, 0) <= ROOM
    kept = tl.full((), 0.0, tl.float32)
    # Fewer than k possible tokens: all of them.
    if fits & (above < k) & ((above + tl.sum(inside, 0) >= k) | (low == bottom)):
        floor = kth_largest_key(key, k - above, low + 1, high + 1)
        kept = heavier + tl.sum(tl.where(key >= floor, key_weight(key, shift, LOGITS), 0.0), 0)
    else:
        floor = floor_by_scans(x, vocab, shift, k, 0.0, bottom, peak, False, LOGITS, SCAN)
        kept = scan_weight(x, vocab, shift, floor, LOGITS, SCAN)
    return floor, kept


@triton.jit
def key_weight(key, shift, LOGITS: tl.constexpr):
    """`weight_of` the number of a key; of no number 0."""
    if LOGITS:
        return tl.where(key == NO_KEY, 0.0, weight_of(number_of(key), shift, LOGITS))
    # The bits of NO_KEY are those of -0.
    return key.to(tl.float32, bitcast=True)


@triton.jit
def scan_weight(x, vocab, shift, low, LOGITS: tl.constexpr, SCAN: tl.constexpr):
    """Weight of the row's tokens with keys at or above `low`: one read."""
    offs_scan = tl.arange(0, SCAN)
    weight = tl.zeros([SCAN], tl.float32)
    for begin in range(0, vocab, SCAN):
        v = read(x, begin + offs_scan, vocab, LOGITS)
        weight += tl.where(sort_key(v) >= low, weight_of(v, shift, LOGITS), 0.0)
    return tl.sum(weight, 0)


@triton.jit
def floor_by_scans(x, vocab, shift, k, limit, low, high, MASS: tl.constexpr, LOGITS: tl.constexpr, SCAN: tl.constexpr):
    """The smallest t in (low, high] such that fewer than k tokens, or less weight than `limit`, lie above it."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        if MASS:
            few = scan_weight(x, vocab, shift, middle.to(tl.int32) + 1, LOGITS, SCAN) < limit
        else:
            few = scan_count(x, vocab, middle.to(tl.int32) + 1, LOGITS, SCAN) < k
        if few:
            high = middle
        else:
            low = middle
    return high.to(tl.int32)


@triton.jit
def scan_count(x, vocab, low, LOGITS: tl.constexpr, SCAN: tl.constexpr):
    """How many of the row's tokens have keys at or above `low`: one read."""
    hits = tl.zeros([SCAN], tl.int32)
    for begin in range(0, vocab, SCAN):
        offs = begin + tl.arange(0, SCAN)
        hits += ((offs < vocab) & (sort_key(read(x, offs, vocab, LOGITS)) >= low)).to(tl.int32)
    return tl.sum(hits, 0)
