"""Scales of fp8 operands on their way to the warpgroups that multiply by them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.device.gluon import copy_load, gl, jit
from flashinfer.ops.gemm.gluon_sm90.schedule import weights_of

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
def sources_of(scales, groups, place, counts, LAYOUT: gl.constexpr, cfg: gl.constexpr):
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
def factors_at(scales, sources, k, cfg: gl.constexpr):
    """Of block k of K: the scales of the rows and of the weights of each part; multiplied, if nothing is ahead."""
    of_rows, mask, of_parts = sources
    PARTS: gl.constexpr = cfg.subtiles
    x = gl.load(of_rows + k * scales.row_step, mask=mask, other=0.0)
    factors = () if not cfg.deferred else (x,)
    for i in gl.static_range(PARTS):
        w = gl.load(of_parts[i] + k * scales.weight_step)
        factors = factors + (x * w if not cfg.deferred else w,)
    return factors


@jit
def factor_of_part(factors, i: gl.constexpr, cfg: gl.constexpr):
    """What part i is multiplied by, of what `factors_at` gave."""
    if not cfg.deferred:
        return factors[i]
    else:
        return factors[0] * factors[i + 1]


@jit
def scale_tiles(cfg: gl.constexpr):
    """Shared memory of the scales that come with each tile of the rings: of its rows, and of its parts of weights."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PARTS: gl.constexpr = cfg.block_n // cfg.part_columns
    rows = gl.allocate_shared_memory(gl.float32, [cfg.stages, cfg.block_m], FLAT)
    return rows, gl.allocate_shared_memory(gl.float32, [cfg.stages * PARTS, 1], FLAT)


@jit
def copy_scales(tiles, stage, scales, place, k, counts, cfg: gl.constexpr):
    """Producer: block k of K, of all rows and parts of a tile, by one warp. place: (which weights, row, column)."""
    which, row, column = place
    of_rows, of_parts = tiles
    PARTS: gl.constexpr = cfg.block_n // cfg.part_columns
    ROWS: gl.constexpr = gl.BlockedLayout([cfg.block_m // 32], [32], [1], [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    offs_m = row + gl.arange(0, cfg.block_m, ROWS)
    source = (offs_m // cfg.scale_rows).to(gl.int64) * scales.row_stride + k * scales.row_step
    # What is masked becomes zero: weights that are not there have no scales either.
    copy_load(of_rows.index(stage), scales.rows + source, mask=(offs_m < counts.num_rows) & (which >= 0))
    last = (counts.columns * (2 if cfg.gated else 1) - 1) // SCALE_COLUMNS
    matrix = scales.weights + gl.maximum(which, 0).to(gl.int64) * scales.which_stride + k * scales.weight_step
    for i in gl.static_range(PARTS):
        within = i % cfg.subtiles * (counts.columns if cfg.gated else cfg.part_columns)
        begin = column + i // cfg.subtiles * cfg.column_share + within
        offset = gl.minimum(begin // SCALE_COLUMNS, last) * scales.column_stride
        one = gl.full([1], 0, gl.int32, ONE)
        copy_load(of_parts.index(stage * PARTS + i), matrix + offset + one, mask=one <= which)


@jit
def factors_here(tiles, stage, FIRST_ROW: gl.constexpr, FIRST_PART: gl.constexpr, LAYOUT: gl.constexpr,
                 cfg: gl.constexpr):  # fmt: skip
    """Consumer: as `factors_at`, from shared memory."""
    of_rows, of_parts = tiles
    PARTS: gl.constexpr = cfg.subtiles
    ALL: gl.constexpr = cfg.block_n // cfg.part_columns
    factors = (of_rows.index(stage).slice(FIRST_ROW, 64).load(gl.SliceLayout(1, LAYOUT)),)
    for i in gl.static_range(PARTS):
        factors = factors + (of_parts.index(stage * ALL + FIRST_PART + i).load(gl.SliceLayout(1, LAYOUT)),)
    return factors


@jit
def _bring(pointers):
    """Ask for what lies there to come to the L2 cache."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(gl.int64)], gl.int32, is_pure=False, pack=1
    )


@jit
def bring_weight_scales(scales, which, column, counts, cfg: gl.constexpr):
    """Producer, before a tile: those of its columns, of the first 128 blocks of K."""
    offs_k = gl.minimum(gl.arange(0, 128, gl.BlockedLayout([4], [32], [1], [0])), (counts.depth - 1) // cfg.block_k)
    columns = counts.columns * (2 if cfg.gated else 1)
    last = (columns - 1) // SCALE_COLUMNS
    matrix = scales.weights + gl.maximum(which, 0).to(gl.int64) * scales.which_stride
    BLOCKS: gl.constexpr = max(cfg.out_columns // SCALE_COLUMNS.value, 1)
    for i in gl.static_range(BLOCKS * (2 if cfg.gated else 1)):
        begin = column + i % BLOCKS * SCALE_COLUMNS + i // BLOCKS * counts.columns
        _bring(matrix + gl.minimum(begin // SCALE_COLUMNS, last) * scales.column_stride + offs_k * scales.weight_step)


@jit
def bring_row_scales(scales, row, k, counts, cfg: gl.constexpr):
    """Producer, beside a tile of the ring: those of its rows, which are wanted when the tile has come."""
    offs_m = gl.arange(0, cfg.block_m, gl.BlockedLayout([cfg.block_m // 32], [32], [1], [0]))
    source = gl.minimum(row + offs_m, counts.num_rows - 1) // cfg.scale_rows
    # 32 bytes come at once.
    if (scales.row_step != 1) | (k % 8 == 0):
        _bring(scales.rows + source.to(gl.int64) * scales.row_stride + k * scales.row_step)
