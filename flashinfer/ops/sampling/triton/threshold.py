"""Thresholds of rows (the smallest number that top_k or top_p keeps), and rows with what lies below them taken out."""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.ops.sampling.triton.filter import candidates, gather, hold_nucleus, keep_top_k, scan_weight
from flashinfer.ops.sampling.triton.rows import (
    NEG_INF,
    NEG_INF_KEY,
    NO_KEY,
    POSITIVE_KEY,
    TOP_KEY,
    group_weights,
    read,
    sort_key,
    weight_of,
)

NUM_PROBES = tl.constexpr(8)


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
    logits (nothing is weighed). search: for top_p, int32 `[rows, 4]`: (low, high, programs arrived, whether open) and
    fp32 limits `[rows]`.
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
            floor, kept, _held = keep_top_k(x, vocab, shift, group_key, k, lowest, slots, LOGITS, cut, SCAN)
    elif KIND == "min_p":
        floor = tl.maximum(sort_key(tl.max(group_high, 0) * tl.cast(value, tl.float32)), lowest)
        top = tl.full((), TOP_KEY, tl.int32)
        count, _above, _mass = gather(x, vocab, shift, group_key, floor, top, slots, LOGITS, cut)
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
            held, low = hold_nucleus(x, vocab, shift, group_key, num_groups, limit, lowest, slots, LOGITS, cut)
            if held >= 0:
                key, share = candidates(slots, held, shift, LOGITS, cut)
                floor = nucleus_floor(key, share, limit, low - 1, peak)
                kept = tl.sum(tl.where(key >= floor, share, 0.0), 0)
            else:
                is_open = tl.full((), 1, tl.int32)
            # Tokens below (1 - p) / vocab of the total can all be dropped and p is still there.
            flat = ((1.0 - p) * total / vocab * 0.999).to(tl.float32)
            tl.store(search[0] + row * 4, tl.maximum(sort_key(flat), lowest) - 1)
            tl.store(search[0] + row * 4 + 1, peak)
            tl.store(search[0] + row * 4 + 2, 0)
            tl.store(search[1] + row, limit)
        tl.store(search[0] + row * 4 + 3, is_open)
    tl.store(floors + row, floor)
    tl.store(weights + row, kept)


@triton.jit
def probe_of(low, high, i):
    """The i-th of the keys that cut (low, high] into NUM_PROBES + 1 parts."""
    step = (high.to(tl.int64) - low.to(tl.int64)) * (i + 1) // (NUM_PROBES + 1)
    return (low.to(tl.int64) + step).to(tl.int32)


@triton.jit(do_not_specialize=["num_splits", "tiles_per_split"])
def narrow_kernel(
    x,
    search,
    partial,
    stride,
    vocab,
    num_splits,
    tiles_per_split,
    SPLITS: tl.constexpr,
    LOGITS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Grid: rows * num_splits. One step of the search for top_p's threshold: a ninth of the interval stays.

    The splits of a row sum what weighs more than each of eight keys; the last one to arrive moves the ends. partial:
    fp32 `[rows, num_splits, 8]`.
    """
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    ints = search[0] + row * 4
    low = tl.load(ints)
    high = tl.load(ints + 1)
    if (tl.load(ints + 3) != 0) & (high.to(tl.int64) - low > 1):
        order = tl.arange(0, NUM_PROBES)
        probe = probe_of(low, high, order)
        heavier = tl.zeros([NUM_PROBES, SCAN], tl.float32)
        for i in range(tiles_per_split):
            offs = (split * tiles_per_split + i) * SCAN + tl.arange(0, SCAN)
            v = read(x + row * stride, offs, vocab, LOGITS)
            w = weight_of(v, 0.0, LOGITS)
            heavier += tl.where(sort_key(v)[None, :] > probe[:, None], w[None, :], 0.0)
        masses = tl.sum(heavier, 1)
        tl.store(partial + (row * num_splits + split) * NUM_PROBES + order, masses)
        tl.debug_barrier()
        arrived = tl.atomic_add(ints + 2, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == num_splits - 1:
            splits = tl.arange(0, SPLITS)
            offs = (row * num_splits + splits[:, None]) * NUM_PROBES + order[None, :]
            parts = tl.load(partial + offs, mask=(splits < num_splits)[:, None], other=0.0, cache_modifier=".cg")
            light = tl.sum(parts, 0) < tl.load(search[1] + row)
            tl.store(ints, tl.maximum(low, tl.max(tl.where(light, NO_KEY, probe), 0)))
            tl.store(ints + 1, tl.minimum(high, tl.min(tl.where(light, probe, TOP_KEY), 0)))
            tl.store(ints + 2, 0)


@triton.jit(do_not_specialize=["num_groups"])
def settle_kernel(
    x,
    group_max,
    scratch,
    floors,
    weights,
    search,
    stride,
    vocab,
    num_groups,
    LOGITS: tl.constexpr,
    cut: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Grid: rows. The end of the search: among the tokens left in the interval if they fit, else by more reads."""
    row = tl.program_id(0).to(tl.int64)
    ints = search[0] + row * 4
    if tl.load(ints + 3) != 0:
        x += row * stride
        low = tl.load(ints)
        high = tl.load(ints + 1)
        limit = tl.load(search[1] + row)
        offs_group = tl.arange(0, cut.groups)
        mask = offs_group < num_groups
        group_high = tl.load(group_max + row * cut.groups + offs_group, mask=mask, other=NEG_INF)
        group_key = tl.where(mask, sort_key(group_high), NO_KEY)
        slots = (
            scratch[0] + row * cut.groups,
            scratch[1] + row * cut.candidates,
            scratch[2] + row * cut.candidates,
        )
        count, _above, mass = gather(x, vocab, 0.0, group_key, low + 1, high + 1, slots, LOGITS, cut)
        if count <= cut.candidates:
            key, share = candidates(slots, count, 0.0, LOGITS, cut)
            floor = nucleus_floor(key, share, limit - mass, low, high)
            kept = mass + tl.sum(tl.where(key >= floor, share, 0.0), 0)
        else:
            wide_low = low.to(tl.int64)
            wide_high = high.to(tl.int64)
            while wide_high - wide_low > 1:
                middle = (wide_low + wide_high) >> 1
                if scan_weight(x, vocab, 0.0, middle.to(tl.int32) + 1, LOGITS, SCAN) < limit:
                    wide_high = middle
                else:
                    wide_low = middle
            floor = wide_high.to(tl.int32)
            kept = scan_weight(x, vocab, 0.0, floor, LOGITS, SCAN)
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
        y = tl.where(keep, v / tl.load(weights + row), 0.0)
    tl.store(out + row * vocab + offs, y.to(out.dtype.element_ty), mask=offs < vocab)
