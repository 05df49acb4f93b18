"""Thresholds of rows (the smallest number that top_k or top_p keeps), and rows with what lies below them taken out."""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.ops.sampling.triton.filter import candidates, gather, hold
from flashinfer.ops.sampling.triton.nucleus import (
    ARRIVED,
    BOTTOM,
    HIGH,
    LOW,
    OPEN,
    PEAK,
    SEARCH_FIELDS,
    WANTED,
    nucleus_floor,
)
from flashinfer.ops.sampling.triton.rows import (
    NEG_INF,
    NEG_INF_KEY,
    NO_KEY,
    POSITIVE_KEY,
    group_weights,
    read,
    sort_key,
)
from flashinfer.ops.sampling.triton.search import PART_FIELDS, collect_part, guess_interval, scan_weight, settle

# Groups of the sample that tells where a floor probably lies: of top_k's that many, of top_p's half.
SAMPLE_GROUPS = tl.constexpr(128)


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
    logits (nothing is weighed). search: for top_k and top_p, int32 `[rows, SEARCH_FIELDS]` and fp32 limits `[rows]`.
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
    if KIND == "min_p":
        floor = tl.maximum(sort_key(tl.max(group_high, 0) * tl.cast(value, tl.float32)), lowest)
        count = gather(x, vocab, group_key, floor, slots, LOGITS, cut)
        if count <= cut.candidates:
            _key, share = candidates(slots, count, shift, LOGITS, cut)
            kept = tl.sum(share, 0)
        else:
            kept = scan_weight(x, vocab, shift, floor, LOGITS, SCAN)
    else:
        MASS: tl.constexpr = KIND == "p"
        everything = tl.cast(vocab, tl.int32)
        limit = tl.full((), 0.0, tl.float32)
        if not LOGITS:
            weight, _shift = group_weights(group_max, group_sum, row * cut.groups + offs_group, mask, LOGITS)
            kept = tl.sum(weight, 0).to(tl.float32)
        if MASS:
            p = tl.cast(value, tl.float32)
            k = everything
            limit = (p * tl.sum(weight, 0)).to(tl.float32)
            filters = (p < 1.0) & (kept > 0) & (kept < float("inf"))
        else:
            k = tl.maximum(tl.cast(tl.minimum(value, vocab), tl.int32), 1)
            filters = (k < vocab) & (peak >= lowest)
        if filters:
            floor, share, held, bound = hold(
                x, vocab, shift, group_key, k, limit, lowest, slots, stats, not MASS, MASS, LOGITS, cut
            )
            if held < 0:
                is_open = tl.full((), 1, tl.int32)
                light = kept - limit if MASS else (vocab - k).to(tl.float32)
                bottom = bound - 1
                if MASS:
                    # Tokens below (1 - p) / vocab of the total can all be dropped and p is still there.
                    bottom = tl.maximum(sort_key(light / vocab * 0.999), lowest) - 1
                SAMPLE: tl.constexpr = SAMPLE_GROUPS // 2 if MASS else SAMPLE_GROUPS
                low, high = guess_interval(x, vocab, num_groups, light, bottom, peak, MASS, SAMPLE, LOGITS, cut)
                tl.store(search[0] + row * SEARCH_FIELDS + LOW, low)
                tl.store(search[0] + row * SEARCH_FIELDS + HIGH, high)
                tl.store(search[0] + row * SEARCH_FIELDS + BOTTOM, bottom)
                tl.store(search[0] + row * SEARCH_FIELDS + PEAK, peak)
                tl.store(search[0] + row * SEARCH_FIELDS + WANTED, k)
                tl.store(search[0] + row * SEARCH_FIELDS + ARRIVED, 0)
                tl.store(search[1] + row, limit)
            elif MASS:
                key, held_share = candidates(slots, held, shift, LOGITS, cut)
                floor = nucleus_floor(key, held_share, limit, floor - 1, peak)
                kept = tl.sum(tl.where(key >= floor, held_share, 0.0), 0)
            else:
                kept = share
        tl.store(search[0] + row * SEARCH_FIELDS + OPEN, is_open)
    tl.store(floors + row, floor)
    tl.store(weights + row, kept)


@triton.jit(do_not_specialize=["num_splits", "tiles_per_split"])
def search_kernel(
    x,
    floors,
    weights,
    search,
    partial,
    found,
    stride,
    vocab,
    num_splits,
    tiles_per_split,
    SPLITS: tl.constexpr,
    FOUND: tl.constexpr,
    LOGITS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Grid: rows * num_splits. The floors of rows that top_k left open; see `search.py`.

    partial: fp32 `[rows, num_splits, PART_FIELDS]`; found: fp32 `[rows, FOUND]`. SPLITS: num_splits rounded up to 2^n.
    """
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    ints = search[0] + row * SEARCH_FIELDS
    if tl.load(ints + OPEN) != 0:
        x += row * stride
        low = tl.load(ints + LOW)
        high = tl.load(ints + HIGH)
        found += row * FOUND
        fields = partial + row * num_splits * PART_FIELDS
        ROOM: tl.constexpr = FOUND // SPLITS
        begin = split * tiles_per_split * SCAN
        room = found + split * ROOM
        mine = fields + split * PART_FIELDS
        collect_part(x, vocab, 0.0, low, high, begin, tiles_per_split, room, mine, ROOM, LOGITS, SCAN)
        tl.debug_barrier()
        last = tl.atomic_add(ints + ARRIVED, 1, sem="acq_rel", scope="gpu") == num_splits - 1
        tl.debug_barrier()
        if last:
            # Read again rather than held in registers all the while.
            interval = (tl.load(ints + LOW), tl.load(ints + HIGH), tl.load(ints + BOTTOM), tl.load(ints + PEAK))
            k = tl.load(ints + WANTED)
            floor, kept = settle(x, vocab, 0.0, found, fields, num_splits, k, interval, FOUND, SPLITS, LOGITS, SCAN)
            tl.store(floors + row, floor)
            tl.store(weights + row, kept)


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
