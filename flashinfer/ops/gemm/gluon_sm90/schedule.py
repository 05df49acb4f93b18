"""Which tile comes next: every warp that asks works it out from `indptr`, so that no planner runs before the product.

The tiles of a group stand in bands of `cfg.band` tiles of rows; inside of a band the rows run fastest, so that programs
side by side share weights, and the rows of a band stay in the L2 cache. Groups follow one another; programs take tiles
round robin.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.gluon import gl, jit


class Groups(NamedTuple):
    """indptr int32 `[num_groups + 1]`, None where all rows are of one group; indices `[num_groups]`: whose weights a
    group takes (negative: none, its rows become 0), None: its own."""

    indptr: torch.Tensor | None
    indices: torch.Tensor | None


class Counts(NamedTuple):
    """num_rows: of the product where there is no indptr; num_groups; columns: of the output; depth: K."""

    num_rows: int
    num_groups: int
    columns: int
    depth: int


@triton.jit
def tile_place(n, rows, column_tiles, block_m, BAND: tl.constexpr):
    """(tile of rows, tile of columns) of the n-th tile of a group of `rows` rows."""
    row_tiles = (rows + block_m - 1) // block_m
    a_band = BAND * column_tiles
    band = n // a_band
    rest = n - band * a_band
    # The last band may have fewer rows; at least one, for tiles past the end, which nobody uses.
    here = tl.maximum(tl.minimum(row_tiles - band * BAND, BAND), 1)
    column = rest // here
    return band * BAND + rest - column * here, column


@jit
def _add(a, b):
    return a + b


@jit
def _column_tiles(counts, cfg: gl.constexpr):
    return (counts.columns + cfg.out_columns - 1) // cfg.out_columns


@jit
def _tiles_so_far(groups, counts, WARPS: gl.constexpr, cfg: gl.constexpr):
    """Inclusive prefix sums of the groups' tiles. Each warp holds all of them: scans and sums are shuffles."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([cfg.max_groups // 32], [32], [WARPS], [0])
    group = gl.arange(0, cfg.max_groups, LAYOUT)
    begin = gl.load(groups.indptr + group, mask=group < counts.num_groups, other=0)
    end = gl.load(groups.indptr + group + 1, mask=group < counts.num_groups, other=0)
    tiles = (end - begin + cfg.block_m - 1) // cfg.block_m * _column_tiles(counts, cfg)
    return gl.associative_scan(tiles, 0, _add)


@jit
def rounds(groups, counts, WARPS: gl.constexpr, cfg: gl.constexpr):
    """How many tiles this program has. WARPS: those of the role that asks."""
    if groups.indptr is None:
        total = (counts.num_rows + cfg.block_m - 1) // cfg.block_m * _column_tiles(counts, cfg)
    else:
        total = gl.max(_tiles_so_far(groups, counts, WARPS, cfg), 0)
    return gl.maximum(total - gl.program_id(0) + gl.num_programs(0) - 1, 0) // gl.num_programs(0)


@jit
def find_tile(groups, counts, n, WARPS: gl.constexpr, cfg: gl.constexpr):
    """This program's n-th tile: (group, first row, rows of the group from there on, tile of columns).

    Past the last tile: any values that are safe to read with.
    """
    place = gl.program_id(0) + n * gl.num_programs(0)
    if groups.indptr is None:
        row_tile, column_tile = tile_place(place, counts.num_rows, _column_tiles(counts, cfg), cfg.block_m, cfg.band)
        return 0, row_tile * cfg.block_m, counts.num_rows - row_tile * cfg.block_m, column_tile
    else:
        until = _tiles_so_far(groups, counts, WARPS, cfg)
        before = until <= place
        group = gl.minimum(gl.sum(before.to(gl.int32), 0), counts.num_groups - 1)
        first = gl.max(gl.where(before, until, 0), 0)
        begin = gl.load(groups.indptr + group)
        rows = gl.load(groups.indptr + group + 1) - begin
        row_tile, column_tile = tile_place(place - first, rows, _column_tiles(counts, cfg), cfg.block_m, cfg.band)
        return group, begin + row_tile * cfg.block_m, rows - row_tile * cfg.block_m, column_tile


@jit
def weights_of(groups, group):
    """Which weights a group takes; negative: none."""
    if groups.indices is None:
        return group
    else:
        return gl.load(groups.indices + group).to(gl.int32)
