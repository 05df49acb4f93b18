"""All-reduce of rows, with what goes before it (sums over experts) and follows it (residual, RMSNorm, fp8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.fp8 import to_fp8
from flashinfer.device.mailbox import greet, marks, receive, receive_sum, sendable, turns, used

# The largest number of a row counts as this at least: e4m3's smallest.
SMALLEST_CODE = tl.constexpr(2.0**-9)


@dataclass(frozen=True)
class ReduceConfig:
    """What a compiled form depends on.

    cols: elements of a row, block: rounded up to 2^n. cut: whether the last row may end early. two_shot: each row is
    added up by one rank, which sends the sum, instead of by all. mixed: whether each of this rank's rows is a
    sum of others. weight_bias: added to the norm's weight.
    mantissa_bits: of the fp8 result, 0 if it is none.
    """

    world_size: int
    cols: int
    block: int
    cut: bool
    two_shot: bool
    mixed: bool
    weight_bias: float
    mantissa_bits: int
    native_fp8: bool


class Reduced(NamedTuple):
    """Tensors beside the input, rows of `cols` elements without gaps; None where not asked for.

    total: the sum. residual, residual_out: what is added to it, and the result. normed: RMSNorm of that with `weight`
    `[cols]`. quantised: fp8 codes of the norm, divided by `scale`, fp32 of one element, or by what the largest of the
    row asks for, which goes to `scales`, fp32 `[rows]`.
    """

    total: torch.Tensor | None
    residual: torch.Tensor | None
    residual_out: torch.Tensor | None
    normed: torch.Tensor | None
    weight: torch.Tensor | None
    quantised: torch.Tensor | None
    scale: torch.Tensor | None
    scales: torch.Tensor | None


class Mixed(NamedTuple):
    """Of what rows this rank's are made (`spec.Mix`); row i of the launch is row `first_row + i` of these."""

    table: torch.Tensor | None
    factors: torch.Tensor | None
    added: torch.Tensor | None
    scale: float


@triton.jit
def _mix(input, mixed, row, num_tokens, num_parts, cols, mask, cfg: tl.constexpr):
    """Row `row` of what this rank sends: a sum over rows of `input`, in fp32, rounded to input's dtype."""
    total = tl.zeros(cols.shape, tl.float32)
    row = tl.cast(row, tl.int64)
    for part in tl.range(0, num_parts, loop_unroll_factor=2):
        factor, inside = 1.0, mask
        if mixed.table is not None:
            place = row * num_parts + part
            source = tl.load(mixed.table + place).to(tl.int64)
            inside &= (tl.zeros(cols.shape, tl.int64) + source) >= 0
        else:
            place = row + part * num_tokens
            source = place
        if mixed.factors is not None:
            factor = tl.load(mixed.factors + place).to(tl.float32)
        x = tl.load(input + source * cfg.cols + cols, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, factor * x, 0.0)
    total *= mixed.scale
    if mixed.added is not None:
        total += tl.load(mixed.added + row * cfg.cols + cols, mask=mask, other=0.0).to(tl.float32)
    return total.to(input.dtype.element_ty)


@triton.jit
def _one_shot(box, x, row, offs, mask, cfg: tl.constexpr):
    """Every rank sends its row to all, and adds up. A place: the row of each rank; all of it is emptied."""
    W: tl.constexpr = cfg.world_size
    use, now, before = turns(box, row)
    place = tl.cast(row, tl.int64) * W * cfg.cols + offs
    for rank in tl.static_range(W):
        if rank != box.rank:
            tl.store(box.peers[rank] + now + place + box.rank * cfg.cols, x, mask=mask)
    total = receive_sum(box, now + place, mask, cfg.cols, x, row, W)
    for rank in tl.static_range(W):
        tl.store(box.own + before + place + rank * cfg.cols, marks(x.shape, x.dtype), mask=offs < cfg.cols)
    used(box, row, use)
    return total


@triton.jit
def _two_shot(box, x, row, offs, mask, cfg: tl.constexpr):
    """Row i goes to rank i % W, which adds it up and sends the sum, in the rows' dtype, to all.

    W places in a row: the rows of all ranks for the one that this rank adds up, then the sums of W rows.
    """
    W: tl.constexpr = cfg.world_size
    use, now, before = turns(box, row)
    owner = row % W
    place = tl.cast(row // W, tl.int64) * (2 * W) * cfg.cols + offs
    result = place + (W + owner) * cfg.cols
    if owner == box.rank:
        total = receive_sum(box, now + place, mask, cfg.cols, x, row, W)
        total = sendable(total.to(x.dtype))
        for rank in tl.static_range(W):
            if rank != box.rank:
                tl.store(box.peers[rank] + now + result, total, mask=mask)
            tl.store(box.own + before + place + rank * cfg.cols, marks(x.shape, x.dtype), mask=offs < cfg.cols)
    else:
        for rank in tl.static_range(W):
            if rank == owner:
                tl.store(box.peers[rank] + now + place + box.rank * cfg.cols, x, mask=mask)
        total = receive(box, now + result, mask, owner, row)
        tl.store(box.own + before + result, marks(x.shape, x.dtype), mask=offs < cfg.cols)
    used(box, row, use)
    return total.to(tl.float32)


@triton.jit
def _write(tensors, total, residual, weight, row, offs, mask, eps, cfg: tl.constexpr):
    """What is asked for of a sum; `offs`: of the row in each tensor."""
    if tensors.total is not None:
        tl.store(tensors.total + offs, total.to(tensors.total.dtype.element_ty), mask=mask)
    if tensors.residual is not None:
        total += residual.to(tl.float32)
    if tensors.residual_out is not None:
        tl.store(tensors.residual_out + offs, total.to(tensors.residual_out.dtype.element_ty), mask=mask)
    if tensors.weight is not None:
        square = tl.sum(tl.where(mask, total * total, 0.0), 0) / cfg.cols
        y = total * tl.rsqrt(square + eps) * (weight.to(tl.float32) + cfg.weight_bias)
        if tensors.normed is not None:
            tl.store(tensors.normed + offs, y.to(tensors.normed.dtype.element_ty), mask=mask)
        if tensors.quantised is not None:
            if tensors.scales is not None:
                LIMIT: tl.constexpr = 448.0 if cfg.mantissa_bits == 3 else 57344.0
                largest = tl.max(tl.where(mask & (y == y), tl.abs(y), 0.0), 0)
                scale = tl.maximum(largest, SMALLEST_CODE) / LIMIT
                tl.store(tensors.scales + row, scale)
                y /= scale
            elif tensors.scale is not None:
                y *= 1.0 / tl.load(tensors.scale)
            tl.store(tensors.quantised + offs, to_fp8(y, cfg.mantissa_bits, cfg.native_fp8), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "first_row", "num_tokens", "num_parts"])
def reduce_kernel(
    input,
    tensors,
    mixed,
    box,
    greeting,
    num_rows,
    num_elements,
    first_row,
    num_tokens,
    num_parts,
    eps,
    cfg: tl.constexpr,
):
    """Grid: one program that greets, then at most one a row.

    input: `num_rows` rows of `cfg.cols`, with `cfg.cut` `num_elements` in all. tensors: Reduced. mixed: Mixed, of
    `num_tokens` rows that are sums of `num_parts` rows of input; None without `cfg.mixed`.
    """
    program, num_programs = tl.program_id(0) - 1, tl.num_programs(0) - 1
    if program < 0:
        greet(box, greeting, cfg.world_size)
    else:
        cols = tl.arange(0, cfg.block)
        if tensors.weight is not None:
            weight = tl.load(tensors.weight + cols, mask=cols < cfg.cols, other=0.0)
        else:
            weight = 0.0
        for row in range(program, num_rows, num_programs):
            offs = tl.cast(row, tl.int64) * cfg.cols + cols
            mask = cols < cfg.cols
            if cfg.cut:
                mask &= offs < num_elements
            if cfg.mixed:
                x = sendable(_mix(input, mixed, first_row + row, num_tokens, num_parts, cols, mask, cfg))
            else:
                x = sendable(tl.load(input + offs, mask=mask, other=0.0))
            if tensors.residual is not None:
                residual = tl.load(tensors.residual + offs, mask=mask, other=0.0)
            else:
                residual = 0.0
            if cfg.two_shot:
                total = _two_shot(box, x, row, cols, mask, cfg)
            else:
                total = _one_shot(box, x, row, cols, mask, cfg)
            _write(tensors, total, residual, weight, row, offs, mask, eps, cfg)
