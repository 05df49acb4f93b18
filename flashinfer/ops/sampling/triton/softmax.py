"""softmax(logits / temperature) in fp32: the rows' maxima and sums, then the result.

With few rows several programs share one, and the second read comes from the L2 cache. With many, the programs on the
GPU together hold some rows in their registers, a part each, and tell each other what their parts sum to: one read.
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


@triton.jit
def part_state(v, scale):
    """`combine` of one logit each."""
    peak = tl.max(v, 0)
    base = tl.where(peak == NEG_INF, 0.0, peak)
    return peak, tl.sum(power(v - base, scale), 0)


@triton.jit
def read_part(x, part, part_size, vocab, PART: tl.constexpr):
    """The logits of a part of a row, -inf behind its end."""
    lane = tl.arange(0, PART)
    offs = part * part_size + lane
    mask = (lane < part_size) & (offs < vocab)
    return tl.load(x + offs, mask=mask, other=NEG_INF, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def publish(v, state, arrived, scale):
    """Store a part's state, and let it be seen by whoever sees the count."""
    peak, total = part_state(v, scale)
    tl.store(state, peak)
    tl.store(state + 1, total)
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release", scope="gpu")


@triton.jit
def shared_state(
    x, state, arrived, num_parts, part_size, vocab, scale, PARTS: tl.constexpr, PART: tl.constexpr, POLLS: tl.constexpr
):
    """A row's state: of all parts, as others have found it; what is not there after some looks is computed here.

    So no program depends on another one's progress. Both ways give the same bits.
    """
    count = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
    polls = tl.full((), 0, tl.int32)
    while (count < num_parts) & (polls < POLLS):
        count = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()
        polls += 1
    tl.debug_barrier()
    parts = tl.arange(0, PARTS)
    if count >= num_parts:
        inside = parts < num_parts
        high = tl.load(state + 2 * parts, mask=inside, other=NEG_INF, cache_modifier=".cg")
        total = tl.load(state + 2 * parts + 1, mask=inside, other=0.0, cache_modifier=".cg")
    else:
        high = tl.full([PARTS], NEG_INF, tl.float32)
        total = tl.zeros([PARTS], tl.float32)
        for part in range(num_parts):
            peak, weight = part_state(read_part(x, part, part_size, vocab, PART), scale)
            high = tl.where(parts == part, peak, high)
            total = tl.where(parts == part, weight, total)
    return combine(high, total, scale)


@triton.jit(do_not_specialize=["n"])
def clear_kernel(counts, n, BLOCK: tl.constexpr):
    """Grid: blocks. n counts become 0."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + offs, tl.zeros([BLOCK], tl.int32), mask=offs < n)


@triton.jit(do_not_specialize=["value", "num_rows"])
def softmax_held_kernel(
    x,
    out,
    state,
    arrived,
    temperature,
    value,
    stride,
    vocab,
    num_rows,
    num_parts,
    part_size,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    POLLS: tl.constexpr,
):
    """Grid: rows at once * num_parts. A program has one part of every so manieth row, in registers from read to write.

    While its part of the next row is on the way it writes the one of this row. state: fp32 `[rows, num_parts, 2]`;
    arrived: int32 `[rows]`, zeros. PARTS, PART: num_parts and part_size rounded up to 2^n. POLLS: how often a program
    looks for the states of the others.
    """
    part = tl.program_id(0) % num_parts
    row = (tl.program_id(0) // num_parts).to(tl.int64)
    step = tl.num_programs(0) // num_parts
    lane = tl.arange(0, PART)
    offs = part * part_size + lane
    mask = (lane < part_size) & (offs < vocab)
    held = read_part(x + row * stride, part, part_size, vocab, PART)
    publish(held, state + (row * num_parts + part) * 2, arrived + row, scale_of(temperature, value, row))
    while row < num_rows:
        following = row + step
        last = tl.where(following < num_rows, vocab, 0)
        coming = read_part(x + following * stride, part, part_size, last, PART)
        scale = scale_of(temperature, value, row)
        states = state + row * num_parts * 2
        peak, total = shared_state(
            x + row * stride, states, arrived + row, num_parts, part_size, vocab, scale, PARTS, PART, POLLS
        )
        share = tl.div_rn(1.0, total)
        y = power(held - peak, scale) * share
        tl.store(out + row * vocab + offs, y, mask=mask, eviction_policy="evict_first")
        if following < num_rows:
            target = state + (following * num_parts + part) * 2
            publish(coming, target, arrived + following, scale_of(temperature, value, following))
        held = coming
        row = following


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
