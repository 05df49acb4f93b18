"""softmax(logits / temperature) in fp32: the rows' maxima and sums in one read, the result in a second one.

With few rows several programs share one. With many a program keeps its row to itself: the row's beginning stays in its
registers, and the rest is read backwards the second time, so that what it read last, which the L2 cache still holds,
comes first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.ops.sampling.triton.rows import LOG2E, NEG_INF


@triton.jit
def power(distance, scale):
    """2^(distance * scale), 1 at distance 0 even where the scale is infinite (temperature 0)."""
    return tl.where(distance == 0, 1.0, tl.exp2(distance * scale))


@triton.jit
def scale_of(temperature, value, row):
    """What logits are multiplied with before the power of two."""
    if temperature is not None:
        value = tl.load(temperature + row).to(tl.float32)
    return tl.div_rn(tl.cast(LOG2E, tl.float32), tl.cast(value, tl.float32))


@triton.jit
def row_state(x, begin, num_tiles, vocab, scale, TILE: tl.constexpr, STAGES: tl.constexpr):
    """(largest logit, sum of powers relative to it) of `num_tiles` tiles; each lane keeps its own until the end."""
    high = tl.full([TILE], NEG_INF, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for i in tl.range(num_tiles, num_stages=STAGES):
        offs = begin + i * TILE + tl.arange(0, TILE)
        v = tl.load(x + offs, mask=offs < vocab, other=NEG_INF).to(tl.float32)
        new = tl.maximum(high, v)
        base = tl.where(new == NEG_INF, 0.0, new)
        total = total * power(high - base, scale) + power(v - base, scale)
        high = new
    return combine(high, total, scale)


@triton.jit
def combine(high, total, scale):
    """The state of several states; an empty one has -inf and 0."""
    peak = tl.max(high, 0)
    base = tl.where(peak == NEG_INF, 0.0, peak)
    return peak, tl.sum(total * power(high - base, scale), 0)


@triton.jit
def write_tile(x, out, begin, vocab, peak, share, scale, TILE: tl.constexpr):
    """One tile of the result; share: the part of the whole that the largest logit has."""
    offs = begin + tl.arange(0, TILE)
    v = tl.load(x + offs, mask=offs < vocab, other=NEG_INF).to(tl.float32)
    tl.store(out + offs, power(v - peak, scale) * share, mask=offs < vocab)


@triton.jit(do_not_specialize=["value"])
def softmax_rows_kernel(
    x, out, temperature, value, stride, vocab, HELD: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr
):
    """Grid: rows. temperature: `[rows]` or None for the value.

    HELD: how many logits stay in registers. STAGES: how many tiles of TILE are on their way at once.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    out += row * vocab
    scale = scale_of(temperature, value, row)
    offs_held = tl.arange(0, HELD)
    held = tl.load(x + offs_held, mask=offs_held < vocab, other=NEG_INF).to(tl.float32)
    num_tiles = tl.cdiv(tl.maximum(vocab - HELD, 0), TILE)
    peak, total = row_state(x, HELD, num_tiles, vocab, scale, TILE, STAGES)
    high = tl.maximum(peak, tl.max(held, 0))
    base = tl.where(high == NEG_INF, 0.0, high)
    total = total * power(peak - base, scale) + tl.sum(power(held - base, scale), 0)
    share = tl.div_rn(1.0, total)
    for i in tl.range(num_tiles, num_stages=STAGES):
        write_tile(x, out, HELD + (num_tiles - 1 - i) * TILE, vocab, high, share, scale, TILE)
    tl.store(out + offs_held, power(held - high, scale) * share, mask=offs_held < vocab)


@triton.jit(do_not_specialize=["value", "num_splits", "tiles_per_split"])
def softmax_state_kernel(x, state, temperature, value, stride, vocab, num_splits, tiles_per_split, TILE: tl.constexpr):
    """Grid: rows * num_splits. state: fp32 `[rows, num_splits, 2]`."""
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    begin = (tl.program_id(0) % num_splits) * tiles_per_split * TILE
    scale = scale_of(temperature, value, row)
    peak, total = row_state(x + row * stride, begin, tiles_per_split, vocab, scale, TILE, 1)
    tl.store(state + tl.program_id(0) * 2, peak)
    tl.store(state + tl.program_id(0) * 2 + 1, total)


@triton.jit(do_not_specialize=["value", "num_splits", "num_tiles"])
def softmax_write_kernel(
    x,
    out,
    state,
    temperature,
    value,
    stride,
    vocab,
    num_splits,
    num_tiles,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: rows * num_tiles. SPLITS: num_splits rounded up to 2^n."""
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    scale = scale_of(temperature, value, row)
    split = tl.arange(0, SPLITS)
    offs = (row * num_splits + split) * 2
    high = tl.load(state + offs, mask=split < num_splits, other=NEG_INF)
    total = tl.load(state + offs + 1, mask=split < num_splits, other=0.0)
    peak, total = combine(high, total, scale)
    begin = (tl.program_id(0) % num_tiles) * TILE
    write_tile(x + row * stride, out + row * vocab, begin, vocab, peak, tl.div_rn(1.0, total), scale, TILE)
