"""Tiles of 4-bit weights and bf16 rows: consumers decode the weights into the registers that the tensor cores take.

Each warpgroup multiplies its own 64 rows of the weights, the product's rows, by all rows of the tile: a number is
decoded once for as many rows as a tile has. While the tensor cores work on one step of K, the next one is decoded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.device.decode import decode_fp8, decode_ue8m0, e2m1_pairs, multiply_pairs, twice
from flashinfer.device.gluon import constexpr_function, gl, jit, warpgroup_mma, warpgroup_mma_wait
from flashinfer.ops.gemm.gluon_sm90.epilogue import accumulator_layout, halves, write
from flashinfer.ops.gemm.gluon_sm90.schedule import weights_of

# Rows of the weights of one product, and its bytes of a step of K: two numbers each.
ROWS, BYTES = gl.constexpr(64), gl.constexpr(32)
E8M0_BLOCK = gl.constexpr(32)


class BlockScales(NamedTuple):
    """Bytes `[W, N, K / scale_block]` of e8m0, or of e4m3, with any strides. A step is the stride along K."""

    data: torch.Tensor
    which_stride: int
    row_stride: int
    step: int


@constexpr_function
def codes_layout(blocks):
    """Of bytes `[64, blocks, 32 / blocks]`: each thread has those whose two numbers the tensor cores want of it.

    A left operand of 16 columns has in thread t of a warp rows t / 4 and t / 4 + 8 and columns 2 (t % 4) and 2 (t % 4)
    + 1, and those 8 further on (PTX ISA, wgmma, register fragments of m64k16).
    """
    width = BYTES.value // blocks

    def at(row, byte):
        return [row, byte // width, byte % width]

    return gl.DistributedLinearLayout(
        reg_bases=[at(8, 0), at(0, 4), at(0, 8), at(0, 16)],
        lane_bases=[at(0, 1), at(0, 2), at(1, 0), at(2, 0), at(4, 0)],
        warp_bases=[at(16, 0), at(32, 0)],
        block_bases=[],
        shape=[ROWS.value, blocks, width],
    )


@constexpr_function
def _scales_layout(cfg):
    return gl.SliceLayout(2, codes_layout(cfg.block_k // cfg.scale_block))


@jit
def _scale_rows(scales, groups, place, counts, cfg: gl.constexpr):
    """Where the scales of a warpgroup's rows of the weights begin `[64]`, and whether its group has weights."""
    group, _, _, column = place
    which = weights_of(groups, group)
    offs_n = gl.arange(0, ROWS, gl.SliceLayout(1, _scales_layout(cfg)))
    if cfg.gated:
        # Blocks of up and of their gates in turn.
        pair = offs_n // (2 * cfg.gate_block)
        offs_n = gl.minimum(column + pair * cfg.gate_block + offs_n % cfg.gate_block, counts.columns - 1) + (
            offs_n // cfg.gate_block % 2 * counts.columns
        )
    else:
        offs_n = gl.minimum(column + offs_n, counts.columns - 1)
    matrix = scales.data + gl.maximum(which, 0).to(gl.int64) * scales.which_stride
    return matrix + offs_n.to(gl.int64) * scales.row_stride, which >= 0


@jit
def _scales(scales, rows, k, counts, cfg: gl.constexpr):
    """Codes `[64, blocks]` of the scales of step k of K. rows: from `_scale_rows`. Zeros, of zeros, are no NaN."""
    begin, exist = rows
    BLOCKS: gl.constexpr = cfg.block_k // cfg.scale_block
    block = k * BLOCKS + gl.arange(0, BLOCKS, gl.SliceLayout(0, _scales_layout(cfg)))
    mask = ((block < counts.depth // cfg.scale_block) & exist)[None, :]
    at = begin[:, None] + (block * scales.step)[None, :]
    return gl.load(at, mask=mask, other=0)


@jit
def _numbers(weights, n, CID: gl.constexpr, cfg: gl.constexpr):
    """A warpgroup's part of tile n of the weights, without their scales: two bf16 each in `[64, blocks, ...]` int32."""
    BLOCKS: gl.constexpr = cfg.block_k // cfg.scale_block
    FLAT: gl.constexpr = gl.SliceLayout(1, codes_layout(1))
    codes = weights.part(n, CID).load(FLAT).reshape([ROWS, BLOCKS, BYTES // BLOCKS])
    return e2m1_pairs(codes.to(gl.int32))


@jit
def _factors(scale, cfg: gl.constexpr):
    factor = decode_ue8m0(scale) if cfg.scale_block == E8M0_BLOCK else decode_fp8(scale, 3)
    return twice(factor)


@jit
def _operand(numbers, factors, layout: gl.constexpr):
    """Their products, exact in bf16, as an operand of the tensor cores `[64, 64]`."""
    pairs = multiply_pairs(numbers, factors[:, :, None]).reshape([ROWS, BYTES])
    low = pairs.to(gl.int16).to(gl.bfloat16, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([ROWS, 2 * BYTES]), layout, assert_trivial=True)


@jit
def multiply_packed(rings, staging, o_desc, target, finish, groups, counts, scales, done, place, CID: gl.constexpr,
                    cfg: gl.constexpr):  # fmt: skip
    """A warpgroup's share of a tile, from its products to the output; half of them where half the rows are there."""
    if cfg.block_m > cfg.out_rows:
        if place[2] <= cfg.out_rows:
            _multiply_rows(rings, staging, o_desc, target, finish, groups, counts, scales, done, place, cfg.out_rows,
                           CID, cfg)  # fmt: skip
        else:
            _multiply_rows(rings, staging, o_desc, target, finish, groups, counts, scales, done, place, cfg.block_m,
                           CID, cfg)  # fmt: skip
    else:
        _multiply_rows(
            rings, staging, o_desc, target, finish, groups, counts, scales, done, place, cfg.block_m, CID, cfg
        )


@jit
def _multiply_rows(rings, staging, o_desc, target, finish, groups, counts, scales, done, place, COUNT: gl.constexpr,
                   CID: gl.constexpr, cfg: gl.constexpr):  # fmt: skip
    """`multiply_packed` with the first COUNT rows of the tile."""
    rows, weights = rings.rows, rings.weights
    SUMS: gl.constexpr = accumulator_layout(COUNT, cfg.bits)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    last = done + (counts.depth + cfg.block_k - 1) // cfg.block_k - 1
    begin = _scale_rows(scales, groups, place, counts, cfg)
    # A step ahead of the weights: nothing waits for them in memory.
    factors = _factors(_scales(scales, begin, 0, counts, cfg), cfg)
    ahead = _scales(scales, begin, 1, counts, cfg)
    acc = gl.full([ROWS, COUNT], 0.0, gl.float32, SUMS)
    rows.wait(done)
    numbers = _numbers(weights, done, CID, cfg)
    for n in range(done, last):
        # The last step of decoding waits for the product before: the compiler lets no product run on while what the
        # next one takes is written.
        left = _operand(numbers, factors, LEFT)
        acc = warpgroup_mma(left, rows.part(n, 0).slice(0, COUNT).permute((1, 0)), acc, is_async=True)
        factors = _factors(ahead, cfg)
        ahead = _scales(scales, begin, n + 2 - done, counts, cfg)
        rows.wait(n + 1)
        numbers = _numbers(weights, n + 1, CID, cfg)
        # Passes at once. Its loop ends a basic block: the compiler would decode after the wait for the product.
        rows.wait(n + 1)
        acc, _ = warpgroup_mma_wait(0, deps=[acc, left])
        rows.release(n)
    left = _operand(numbers, factors, LEFT)
    acc = warpgroup_mma(left, rows.part(last, 0).slice(0, COUNT).permute((1, 0)), acc, is_async=True)
    acc, _ = warpgroup_mma_wait(0, deps=[acc, left])
    rows.release(last)
    group, row, rest, column = place
    parts = halves(acc, cfg.out_rows) if COUNT > cfg.out_rows else (acc,)
    for i in gl.static_range(len(parts)):
        at = (group, row + i * cfg.out_rows, rest - i * cfg.out_rows, column)
        write(parts[i].permute((1, 0)), staging, o_desc, target, finish, groups, at, counts, True, cfg)
