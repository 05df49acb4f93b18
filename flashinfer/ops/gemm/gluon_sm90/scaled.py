"""Tiles of fp8 operands with block scales: the sums of 128 products are added up in fp32 registers.

The tensor cores keep about 14 bits of an fp8 sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), and the scales change
every 128 elements of K in any case.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.device.gluon import gl, jit, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from flashinfer.ops.gemm.gluon_sm90.epilogue import accumulator_layout, put
from flashinfer.ops.gemm.gluon_sm90.plain import CONSUMER_WARPS, skip
from flashinfer.ops.gemm.gluon_sm90.schedule import find_tile, rounds, weights_of

# Columns that share a scale of the weights.
SCALE_COLUMNS = gl.constexpr(128)


class Scales(NamedTuple):
    """fp32: of rows `[rows, K / 128]` and of weights `[W, columns / 128, K / 128]`, with any strides.

    A step is the stride between blocks of K.
    """

    rows: torch.Tensor
    row_stride: int
    row_step: int
    weights: torch.Tensor
    which_stride: int
    column_stride: int
    weight_step: int


@jit
def _factors(rows, mask, weights, weight_step, k, cfg: gl.constexpr):
    """Scales of block k of K: of each row, times that of the weights of each part."""
    x = gl.load(rows, mask=mask, other=0.0)
    PARTS: gl.constexpr = cfg.subtiles
    factors = ()
    for i in gl.static_range(PARTS):
        factors = factors + (x * gl.load(weights[i] + k * weight_step),)
    return factors


@jit
def _product(x, weights, n, PART: gl.constexpr, zero):
    """Issue the product with a part of tile n of the weights."""
    return warpgroup_mma(x, weights.part(n, PART).permute((1, 0)), zero, use_acc=False, is_async=True)


@jit
def _share(rings, scales, counts, done, end, place, CID: gl.constexpr, cfg: gl.constexpr):
    """Sums `[64, part_columns]` of each part of a warpgroup's share of a tile."""
    which, row, left, column = place
    rows, weights = rings
    LAYOUT: gl.constexpr = accumulator_layout(cfg.part_columns, cfg.bits)
    PARTS: gl.constexpr = cfg.subtiles
    last = counts.depth // cfg.block_k - 1
    offs_m = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    # Weights that are not there have no scales either.
    mask = (offs_m < left) & (which >= 0)
    row_scales = scales.rows + (row + offs_m).to(gl.int64) * scales.row_stride
    which_scales = scales.weights + gl.maximum(which, 0).to(gl.int64) * scales.which_stride
    column_blocks = (counts.columns + SCALE_COLUMNS - 1) // SCALE_COLUMNS
    weight_scales = ()
    sums = ()
    for i in gl.static_range(PARTS):
        block = gl.minimum((column + i * cfg.part_columns) // SCALE_COLUMNS, column_blocks - 1)
        weight_scales = weight_scales + (which_scales + block * scales.column_stride,)
        sums = sums + (gl.full([64, cfg.part_columns], 0.0, gl.float32, LAYOUT),)
    factors = _factors(row_scales, mask, weight_scales, scales.weight_step, 0, cfg)
    zero = gl.full([64, cfg.part_columns], 0.0, gl.float32, LAYOUT)
    FIRST: gl.constexpr = 0 if cfg.split_rows else CID * PARTS
    for n in range(done, end):
        following = gl.minimum(n + 1 - done, last)
        rows.wait(n)
        x = rows.part(n, CID if cfg.split_rows else 0)
        newer = ()
        for i in gl.static_range(PARTS - 1):
            value = _product(x, weights, n, FIRST + i, zero)
            value = warpgroup_mma_wait(0, deps=[value])
            newer = newer + (sums[i] + value * factors[i][:, None],)
            # Passes at once. Its loop ends a basic block, which keeps the compiler from computing two parts' sums at
            # once: their registers would spill.
            rows.wait(n)
        value = _product(x, weights, n, FIRST + PARTS - 1, zero)
        # The next scales come beside the last product.
        older = factors[PARTS - 1]
        factors = _factors(row_scales + following * scales.row_step, mask, weight_scales, scales.weight_step, following, cfg)
        value = warpgroup_mma_wait(0, deps=[value])
        rows.release(n)
        sums = newer + (sums[PARTS - 1] + value * older[:, None],)
    return sums


@jit
def scaled_consumer(o_desc, rings, staging, output, groups, counts, scales, CID: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup's share of every tile."""
    rows = rings[0]
    PARTS: gl.constexpr = cfg.subtiles
    ROW: gl.constexpr = CID * cfg.out_rows if cfg.split_rows else 0
    COLUMN: gl.constexpr = 0 if cfg.split_rows else CID * cfg.part_columns * PARTS
    steps = counts.depth // cfg.block_k
    done = 0
    for t in range(0, rounds(groups, counts, CONSUMER_WARPS, cfg)):
        group, first, rest, column_tile = find_tile(groups, counts, t, CONSUMER_WARPS, cfg)
        column = column_tile * cfg.block_n + COLUMN
        end = done + steps
        if ROW > 0:
            # The group may have ended among the rows of the warpgroups before this one.
            end = gl.where(rest > ROW, end, done)
        place = (weights_of(groups, group), first + ROW, rest - ROW, column)
        sums = _share(rings, scales, counts, done, end, place, CID, cfg)
        if ROW > 0:
            skip(rows, end, done + steps)
        if rest > ROW:
            for i in gl.static_range(PARTS):
                value = sums[i].to(o_desc.dtype)
                put(value, staging, o_desc, output, first + ROW, rest - ROW, column + i * cfg.part_columns, counts)
        done += steps
    tma_store_wait(0)
