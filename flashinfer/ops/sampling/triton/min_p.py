"""Draws among the tokens at least min_p times as probable as the most probable one.

The groups' maxima tell which groups hold such tokens. Sixteen tokens are drawn from those groups, without regard to
min_p, and the first that passes is the answer (rejection): such groups mostly weigh what their largest tokens weigh.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.device.early import wait_for_launch_before
from flashinfer.ops.sampling.triton.filter import candidates, draw_candidate, draw_pivots, gather
from flashinfer.ops.sampling.triton.resolve import draw_by_scans
from flashinfer.ops.sampling.triton.rows import (
    NEG_INF,
    NO_KEY,
    POSITIVE_KEY,
    group_weights,
    sort_key,
)

# They take the draws below that of the first candidate.
TRIES = tl.constexpr(16)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high", "num_groups", "value"])
def min_p_kernel(
    x,
    rows,
    group_max,
    group_sum,
    keys,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    min_p,
    value,
    scratch,
    tokens,
    valid,
    stride,
    vocab,
    num_groups,
    PER_SAMPLE: tl.constexpr,
    cut: tl.constexpr,
    SCAN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: samples. min_p: `[rows]` or None for the value. scratch: group list, candidates' numbers and tokens."""
    wait_for_launch_before(EARLY)
    sample = tl.program_id(0)
    row = sample
    if rows is not None:
        row = tl.load(rows + sample).to(tl.int32)
    entry = sample if PER_SAMPLE else row
    x += row.to(tl.int64) * stride
    p = tl.cast(value, tl.float32)
    if min_p is not None:
        p = tl.load(min_p + row).to(tl.float32)
    offs_group = tl.arange(0, cut.groups)
    mask = offs_group < num_groups
    offs_stats = entry.to(tl.int64) * cut.groups + offs_group
    weight, _shift = group_weights(group_max, group_sum, offs_stats, mask, False)
    total = tl.sum(weight, 0)
    group_high = tl.load(group_max + offs_stats, mask=mask, other=NEG_INF)
    group_key = tl.where(mask, sort_key(group_high), NO_KEY)
    peak = tl.max(group_high, 0)
    floor = tl.maximum(sort_key(peak * p), tl.full((), POSITIVE_KEY, tl.int32))
    usable = (total > 0) & (total < float("inf"))
    token = tl.full((), 0, tl.int32)
    if usable:
        random = (keys, seed_low, seed_high, offset_low, offset_high)
        likely = tl.where(group_key >= floor, weight, 0.0)
        drawn, numbers = draw_pivots(x, vocab, likely, offs_group, random, sample, 0, TRIES, False, cut)
        order = tl.arange(0, TRIES)
        first = tl.min(tl.where(sort_key(numbers) >= floor, order, TRIES), 0)
        if first < TRIES:
            token = tl.sum(tl.where(order == first, drawn, 0), 0)
        else:
            wide_sample = sample.to(tl.int64)
            slots = (
                scratch[0] + wide_sample * cut.groups,
                scratch[1] + wide_sample * cut.candidates,
                scratch[2] + wide_sample * cut.candidates,
            )
            count = gather(x, vocab, group_key, floor, slots, False, cut)
            unlimited = tl.full((), float("inf"), tl.float32)
            if count <= cut.candidates:
                key, share = candidates(slots, count, 0.0, False, cut)
                token = draw_candidate(slots, key, share, unlimited, random, sample, cut)
            else:
                unknown = tl.full((), -1.0, tl.float32)
                token = draw_by_scans(
                    x, vocab, 0.0, sort_key(peak), floor, unknown, unlimited, random, sample, False, SCAN
                )
    tl.store(tokens + sample, token.to(tokens.dtype.element_ty))
    if valid is not None:
        tl.store(valid + sample, usable.to(tl.int8))
