"""Which tile comes next: every warp that asks works it out from the group sizes, so that no planner runs first.

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
    """indptr, lengths: see `Rows`; both None: equal shares of all rows. indices: see `Weights`; None: its own."""

    indptr: torch.Tensor | None
    lengths: torch.Tensor | None
    indices: torch.Tensor | None
    indices_stride: int


class Counts(NamedTuple):
    """num_rows: of the product, at most; num_groups; columns: of the output; depth: K."""

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
def _rows_of(groups, counts, group):
    """(first row, number of rows) of groups; past the last one: none."""
    mask = group < counts.num_groups
    if groups.indptr is None:
        room = counts.num_rows // counts.num_groups
        begin = group * room
        count = gl.where(mask, room, 0)
        if groups.lengths is not None:
            count = gl.minimum(gl.load(groups.lengths + group, mask=mask, other=0).to(gl.int32), count)
    else:
        begin = gl.load(groups.indptr + group, mask=mask, other=0).to(gl.int32)
        end = gl.load(groups.indptr + group + 1, mask=mask, other=0).to(gl.int32)
        count = gl.minimum(end, counts.num_rows) - begin
    return begin, gl.maximum(count, 0)


@jit
def _look(groups, counts, place, first, found, WARPS: gl.constexpr, cfg: gl.constexpr):
    """`_search` among the `group_block` groups from `first` on. found: what it has of those before.

    Each warp holds all of them: scans and sums are shuffles.
    """
    group, before, total = found
    LAYOUT: gl.constexpr = gl.BlockedLayout([cfg.group_block // 32], [32], [WARPS], [0])
    rows = _rows_of(groups, counts, first + gl.arange(0, cfg.group_block, LAYOUT))
    tiles = (rows[1] + cfg.block_m - 1) // cfg.block_m * _column_tiles(counts, cfg)
    until = total + gl.associative_scan(tiles, 0, _add)
    passed = until <= place
    group += gl.sum(passed.to(gl.int32), 0)
    return group, gl.maximum(before, gl.max(gl.where(passed, until, 0), 0)), gl.max(until, 0)


@jit
def _search(groups, counts, place, WARPS: gl.constexpr, cfg: gl.constexpr):
    """(group of tile `place`, tiles of the groups before it, tiles of all)."""
    found = _look(groups, counts, place, 0, (0, 0, 0), WARPS, cfg)
    if cfg.many_groups:
        for first in range(cfg.group_block, counts.num_groups, cfg.group_block):
            found = _look(groups, counts, place, first, found, WARPS, cfg)
    group, before, total = found
    return gl.minimum(group, counts.num_groups - 1), before, total


@jit
def rounds(groups, counts, WARPS: gl.constexpr, cfg: gl.constexpr):
    """How many tiles this program has. WARPS: those of the role that asks."""
    if cfg.group_block == 0:
        total = (counts.num_rows + cfg.block_m - 1) // cfg.block_m * _column_tiles(counts, cfg)
    else:
        total = _search(groups, counts, 0, WARPS, cfg)[2]
    return gl.maximum(total - gl.program_id(0) + gl.num_programs(0) - 1, 0) // gl.num_programs(0)


@jit
def nth_tile(groups, counts, n, WARPS: gl.constexpr, cfg: gl.constexpr):
    """This program's n-th tile: (group, first row, rows of the group from there on, tile of columns).

    Past the last tile: any values that are safe to read with.
    """
    place = gl.program_id(0) + n * gl.num_programs(0)
    if cfg.group_block == 0:
        row_tile, column_tile = tile_place(place, counts.num_rows, _column_tiles(counts, cfg), cfg.block_m, cfg.band)
        return 0, row_tile * cfg.block_m, counts.num_rows - row_tile * cfg.block_m, column_tile
    else:
        found = _search(groups, counts, place, WARPS, cfg)
        group, before = found[0], found[1]
        begin, count = _rows_of(groups, counts, group)
        row_tile, column_tile = tile_place(place - before, count, _column_tiles(counts, cfg), cfg.block_m, cfg.band)
        return group, begin + row_tile * cfg.block_m, count - row_tile * cfg.block_m, column_tile


@jit
def weights_of(groups, group):
    """Which weights a group takes; negative: none."""
    if groups.indices is None:
        return group
    else:
        return gl.load(groups.indices + group * groups.indices_stride).to(gl.int32)
