"""Tiles of fp8 operands: the sums of 128 products are scaled and added up in fp32 registers.

The tensor cores keep about 14 bits of an fp8 sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), and block scales
change every 128 elements of K in any case.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.device.gluon import gl, jit, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from flashinfer.ops.gemm.gluon_sm90.epilogue import accumulator_layout, finished, put
from flashinfer.ops.gemm.gluon_sm90.plain import CONSUMER_WARPS, skip
from flashinfer.ops.gemm.gluon_sm90.schedule import nth_tile, rounds, weights_of

# Rows of a weight matrix that share a scale.
SCALE_COLUMNS = gl.constexpr(128)


class Scales(NamedTuple):
    """fp32: of rows `[rows, K / 128]` and of weights `[W, N / 128, K / 128]`, with any strides.

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
def _product(x, weights, n, PART: gl.constexpr, zero):
    """Issue the product with a part of tile n of the weights."""
    return warpgroup_mma(x, weights.part(n, PART).permute((1, 0)), zero, use_acc=False, is_async=True)


@jit
def _sources(scales, groups, place, counts, LAYOUT: gl.constexpr, cfg: gl.constexpr):
    """Where the scales of a warpgroup's share of a tile lie: (of its rows, which of these exist, of each part)."""
    group, row, left, column = place
    PARTS: gl.constexpr = cfg.subtiles
    which = weights_of(groups, group)
    offs_m = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    # Weights that are not there have no scales either.
    mask = (offs_m < left) & (which >= 0)
    of_rows = scales.rows + ((row + offs_m) // cfg.scale_rows).to(gl.int64) * scales.row_stride
    matrix = scales.weights + gl.maximum(which, 0).to(gl.int64) * scales.which_stride
    columns = counts.columns * (2 if cfg.gated else 1)
    last = (columns - 1) // SCALE_COLUMNS
    of_parts = ()
    for i in gl.static_range(PARTS):
        if cfg.gated:
            begin = column + i * counts.columns
        else:
            begin = column + i * cfg.part_columns
        of_parts = of_parts + (matrix + gl.minimum(begin // SCALE_COLUMNS, last) * scales.column_stride,)
    return of_rows, mask, of_parts


@jit
def _factors(scales, sources, k, cfg: gl.constexpr):
    """Of block k of K: the scale of each row, times that of the weights of each part."""
    of_rows, mask, of_parts = sources
    PARTS: gl.constexpr = cfg.subtiles
    x = gl.load(of_rows + k * scales.row_step, mask=mask, other=0.0)
    factors = ()
    for i in gl.static_range(PARTS):
        factors = factors + (x * gl.load(of_parts[i] + k * scales.weight_step),)
    return factors


@jit
def _share(rings, scales, groups, counts, done, end, place, CID: gl.constexpr, cfg: gl.constexpr):
    """Sums `[64, part_columns]` of each part of a warpgroup's share of a tile."""
    rows, weights = rings
    LAYOUT: gl.constexpr = accumulator_layout(cfg.part_columns, cfg.bits)
    PARTS: gl.constexpr = cfg.subtiles
    FIRST: gl.constexpr = 0 if cfg.split_rows else CID * PARTS
    last = (counts.depth + cfg.block_k - 1) // cfg.block_k - 1
    sums = ()
    factors = ()
    for _ in gl.static_range(PARTS):
        sums = sums + (gl.full([64, cfg.part_columns], 0.0, gl.float32, LAYOUT),)
    if cfg.scale_rows > 0:
        sources = _sources(scales, groups, place, counts, LAYOUT, cfg)
        factors = _factors(scales, sources, 0, cfg)
    zero = gl.full([64, cfg.part_columns], 0.0, gl.float32, LAYOUT)
    for n in range(done, end):
        rows.wait(n)
        x = rows.part(n, CID if cfg.split_rows else 0)
        newer = ()
        for i in gl.static_range(PARTS - 1):
            value = _product(x, weights, n, FIRST + i, zero)
            value = warpgroup_mma_wait(0, deps=[value])
            if cfg.scale_rows > 0:
                value = value * factors[i][:, None]
            newer = newer + (sums[i] + value,)
            # Passes at once. Its loop ends a basic block, which keeps the compiler from computing two parts' sums at
            # once: their registers would spill.
            rows.wait(n)
        value = _product(x, weights, n, FIRST + PARTS - 1, zero)
        if cfg.scale_rows > 0:
            # The next scales come beside the last product.
            factor = factors[PARTS - 1]
            factors = _factors(scales, sources, gl.minimum(n + 1 - done, last), cfg)
        value = warpgroup_mma_wait(0, deps=[value])
        rows.release(n)
        if cfg.scale_rows > 0:
            value = value * factor[:, None]
        sums = newer + (sums[PARTS - 1] + value,)
    return sums


@jit
def _write_sums(sums, staging, o_desc, target, finish, groups, place, counts, cfg: gl.constexpr):
    group, row, left, column = place
    if cfg.gated:
        value = finished(sums[0], sums[1], finish, groups, place, counts, cfg).to(o_desc.dtype)
        put(value, staging, o_desc, target, row, left, column, counts)
    else:
        PARTS: gl.constexpr = cfg.subtiles
        for i in gl.static_range(PARTS):
            at = (group, row, left, column + i * cfg.part_columns)
            value = finished(sums[i], None, finish, groups, at, counts, cfg).to(o_desc.dtype)
            put(value, staging, o_desc, target, row, left, at[3], counts)


@jit
def scaled_consumer(o_desc, rings, staging, target, finish, groups, counts, scales, CID: gl.constexpr,
                    cfg: gl.constexpr):  # fmt: skip
    """One warpgroup's share of every tile."""
    rows = rings[0]
    ROW: gl.constexpr = cfg.row_share * CID
    COLUMN: gl.constexpr = cfg.column_share * CID
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    for t in range(0, rounds(groups, counts, CONSUMER_WARPS, cfg)):
        group, first, rest, column_tile = nth_tile(groups, counts, t, CONSUMER_WARPS, cfg)
        place = (group, first + ROW, rest - ROW, column_tile * cfg.out_columns + COLUMN)
        end = done + steps
        if ROW > 0:
            # The group may have ended among the rows of the warpgroups before this one.
            end = gl.where(rest > ROW, end, done)
        sums = _share(rings, scales, groups, counts, done, end, place, CID, cfg)
        if ROW > 0:
            skip(rows, end, done + steps)
        if rest > ROW:
            _write_sums(sums, staging, o_desc, target, finish, groups, place, counts, cfg)
        done += steps
    tma_store_wait(0)
