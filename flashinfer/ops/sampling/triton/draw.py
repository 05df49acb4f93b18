"""One read of the rows, then one draw each: statistics of groups of tokens, and inverse transform over them.

A draw takes a group by its share of the row, then a token by its share of the group: so no running sum over the whole
vocabulary is made, and rounding stays that of sums of 64 numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.device.early import wait_for_launch_before
from flashinfer.ops.sampling.triton.resolve import draw_above
from flashinfer.ops.sampling.triton.rows import (
    LOG2E,
    NEG_INF,
    POSITIVE_KEY,
    group_offsets,
    group_weights,
    pick,
    random_words,
    read_residual,
    uniform_narrow,
    uniform_wide,
    weight_of,
)
from flashinfer.ops.sampling.triton.search import scan_weight

# What is read at a time of a row of which rounding left nothing.
SCAN = tl.constexpr(1024)


@triton.jit(do_not_specialize=["num_splits", "tiles_per_split"])
def group_stats_kernel(
    x,
    rows,
    residual,
    group_max,
    group_sum,
    group_tail,
    stride,
    vocab,
    num_splits,
    tiles_per_split,
    LOGITS: tl.constexpr,
    cut: tl.constexpr,
):
    """Grid: entries * num_splits. Largest number and weight of each group, fp32 `[entries, cut.groups]`.

    Logits' weights are relative to their group's maximum. rows: which row each entry is of, or None; group_max,
    group_sum, group_tail (of probs: weight of what is above the group's mean): None where not wanted.
    """
    entry = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    row = entry.to(tl.int64)
    if rows is not None:
        row = tl.load(rows + entry).to(tl.int64)
    x += row * stride
    offs_tile = tl.arange(0, cut.depth)[:, None] * cut.cols + tl.arange(0, cut.cols)[None, :]
    first = split * tiles_per_split
    end = tl.minimum(first + tiles_per_split, tl.cdiv(vocab, cut.tile))
    for tile in tl.range(first, end, num_stages=1):
        v = read_residual(x, residual, entry, tile * cut.tile + offs_tile, vocab, LOGITS)
        target = entry.to(tl.int64) * cut.groups + tile * cut.tile_groups + tl.arange(0, cut.tile_groups)
        col_max = tl.max(v, 0)
        high = tl.max(tl.reshape(col_max, [cut.tile_groups, cut.width]), 1)
        if group_max is not None:
            tl.store(group_max + target, high)
        if group_sum is not None:
            if LOGITS:
                shift = tl.where(col_max == NEG_INF, 0.0, col_max)
                col_sum = tl.sum(tl.exp2((v - shift[None, :]) * LOG2E), 0)
                maxima = tl.reshape(col_max, [cut.tile_groups, cut.width])
                base = tl.where(high == NEG_INF, 0.0, high)
                scale = tl.exp2((maxima - base[:, None]) * LOG2E)
                total = tl.sum(tl.reshape(col_sum, [cut.tile_groups, cut.width]) * scale, 1)
            else:
                total = tl.sum(tl.reshape(tl.sum(v, 0), [cut.tile_groups, cut.width]), 1)
            tl.store(group_sum + target, total)
            if group_tail is not None:
                mean = tl.broadcast_to((total * (1.0 / cut.group))[:, None], [cut.tile_groups, cut.width])
                tail = tl.sum(tl.where(v > tl.reshape(mean, [cut.cols])[None, :], v, 0.0), 0)
                tl.store(group_tail + target, tl.sum(tl.reshape(tail, [cut.tile_groups, cut.width]), 1))


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high", "tokens_stride", "num_groups"])
def draw_kernel(
    x,
    rows,
    residual,
    group_max,
    group_sum,
    keys,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    tokens,
    place,
    tokens_stride,
    valid,
    stride,
    vocab,
    num_groups,
    PER_SAMPLE: tl.constexpr,
    LOGITS: tl.constexpr,
    cut: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: samples. rows: the row of each sample, or None; PER_SAMPLE: statistics are of samples, else of rows.

    Where the residual is nothing, as rounding may leave it, the draw is from the row itself. tokens: a row of
    tokens_stride numbers for each sample; place: which of them is written, or None for the first.
    """
    wait_for_launch_before(EARLY)
    sample = tl.program_id(0)
    row = sample
    if rows is not None:
        row = tl.load(rows + sample).to(tl.int32)
    entry = sample if PER_SAMPLE else row
    x += row.to(tl.int64) * stride
    offs_group = tl.arange(0, cut.groups)
    mask = offs_group < num_groups
    weight, _shift = group_weights(group_max, group_sum, entry.to(tl.int64) * cut.groups + offs_group, mask, LOGITS)
    total = tl.sum(weight, 0)
    draw = tl.full([1], 0, tl.int32)
    a, b, c, d = random_words(keys, seed_low, seed_high, offset_low, offset_high, sample, draw)
    group = pick(weight, offs_group, tl.sum(uniform_wide(a, b), 0))
    offs = group_offsets(group + draw, cut)
    v = read_residual(x, residual, entry, offs, vocab, LOGITS)
    # Relative to the group's own maximum, where the row's would underflow.
    w = tl.reshape(weight_of(v, tl.max(tl.max(v, 1), 0), LOGITS), [cut.group])
    token = tl.reshape(offs, [cut.group])
    at = pick(w, tl.arange(0, cut.group), tl.sum(uniform_narrow(c), 0))
    token = tl.sum(tl.where(tl.arange(0, cut.group) == at, token, 0), 0)
    if residual.minus is not None or residual.excluded is not None:
        if total == 0:
            u = tl.sum(uniform_narrow(d), 0)
            low = tl.full((), POSITIVE_KEY, tl.int32)
            all_of_it = scan_weight(x, vocab, 0.0, low, LOGITS, SCAN)
            token, _key = draw_above(x, vocab, 0.0, low, all_of_it, u, tl.sum(uniform_narrow(c), 0), LOGITS, SCAN)
    target = sample.to(tl.int64) * tokens_stride
    if place is not None:
        target += tl.load(place + sample)
    tl.store(tokens + target, tl.minimum(token, vocab - 1).to(tokens.dtype.element_ty))
    if valid is not None:
        tl.store(valid + sample, ((total > 0) & (total < float("inf"))).to(tl.int8))
