"""Scales of fp8 operands on their way to the warpgroups that multiply by them: through shared memory, beside the tiles.

Loaded by the consumers they would be waited for at every step of K; a copy is asked for as early as its tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.device.gluon import copy_load, gl, jit

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
    source = (offs_m // cfg.scale_rows).to(gl.int64) * scales.row_stride + k.to(gl.int64) * scales.row_step
    # What is masked becomes zero: weights that are not there have no scales either.
    copy_load(of_rows.index(stage), scales.rows + source, mask=(offs_m < counts.num_rows) & (which >= 0))
    last = (counts.columns * (2 if cfg.gated else 1) - 1) // SCALE_COLUMNS
    matrix = scales.weights + gl.maximum(which, 0).to(gl.int64) * scales.which_stride
    matrix += k.to(gl.int64) * scales.weight_step
    for i in gl.static_range(PARTS):
        within = i % cfg.subtiles * (counts.columns if cfg.gated else cfg.part_columns)
        begin = column + i // cfg.subtiles * cfg.column_share + within
        offset = gl.minimum(begin // SCALE_COLUMNS, last) * scales.column_stride
        one = gl.full([1], 0, gl.int32, ONE)
        copy_load(of_parts.index(stage * PARTS + i), matrix + offset + one, mask=one <= which)


@jit
def factors_here(tiles, stage, FIRST_ROW: gl.constexpr, FIRST_PART: gl.constexpr, LAYOUT: gl.constexpr,
                 cfg: gl.constexpr):  # fmt: skip
    """Consumer: the scales of a warpgroup's 64 rows, then that of each of its parts of the weights, as tensors [1]."""
    of_rows, of_parts = tiles
    PARTS: gl.constexpr = cfg.subtiles
    ALL: gl.constexpr = cfg.block_n // cfg.part_columns
    factors = (of_rows.index(stage).slice(FIRST_ROW, 64).load(gl.SliceLayout(1, LAYOUT)),)
    for i in gl.static_range(PARTS):
        factors = factors + (of_parts.index(stage * ALL + FIRST_PART + i).load(gl.SliceLayout(1, LAYOUT)),)
    return factors
