"""Which tile comes next: the producer works it out from the group sizes, so that no planner runs first.

The tiles of a group stand in bands of `cfg.band` tiles of rows; inside of a band the rows run fastest, so that programs
side by side share weights, and the rows of a band stay in the L2 cache. Groups follow one another. Programs take tiles
round robin, or, where they would drift apart over many of them, whenever they are free: tiles that share weights are
then begun together. Consumers learn of each tile through shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.gluon import constexpr_function, gl, jit

# Of a tile: group, first row, rows of the group from there on, tile of columns.
NUMBERS = gl.constexpr(4)


class Groups(NamedTuple):
    """indptr, lengths: see `Rows`; both None: equal shares of all rows. indices: see `Weights`; None: its own.

    taken: int32 `[1]`, 0 before the launch, counts tiles that programs took after their first ones; None: round robin.
    """

    indptr: torch.Tensor | None
    lengths: torch.Tensor | None
    indices: torch.Tensor | None
    indices_stride: int
    taken: torch.Tensor | None


class Counts(NamedTuple):
    """num_rows: of the product, at most; num_groups; columns: of the output; depth: K."""

    num_rows: int
    num_groups: int
    columns: int
    depth: int


@triton.jit
def row_tiles_of(rows, block_m, TAIL: tl.constexpr):
    """Tiles of groups of `rows` rows: the last one takes up to TAIL more than it has, which spares another one."""
    if TAIL > 0:
        rows = tl.maximum(rows - TAIL, tl.minimum(rows, 1))
    return (rows + block_m - 1) // block_m


@triton.jit
def tile_place(n, rows, column_tiles, block_m, BAND: tl.constexpr, TAIL: tl.constexpr):
    """(tile of rows, tile of columns) of the n-th tile of a group of `rows` rows."""
    row_tiles = row_tiles_of(rows, block_m, TAIL)
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
    tiles = row_tiles_of(rows[1], cfg.block_m, cfg.tail) * _column_tiles(counts, cfg)
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
def tile_at(groups, counts, place, WARPS: gl.constexpr, cfg: gl.constexpr):
    """(whether there is a tile `place`, its group, first row, rows of the group from there on, tile of columns).

    Past the last tile: any values that are safe to read with. WARPS: those of the role that asks.
    """
    if cfg.group_block == 0:
        rows, columns = counts.num_rows, _column_tiles(counts, cfg)
        row_tile, column_tile = tile_place(place, rows, columns, cfg.block_m, cfg.band, cfg.tail)
        row = row_tile * cfg.block_m
        return place < row_tiles_of(rows, cfg.block_m, cfg.tail) * columns, 0, row, rows - row, column_tile
    else:
        group, before, total = _search(groups, counts, place, WARPS, cfg)
        begin, count = _rows_of(groups, counts, group)
        columns = _column_tiles(counts, cfg)
        row_tile, column_tile = tile_place(place - before, count, columns, cfg.block_m, cfg.band, cfg.tail)
        row = row_tile * cfg.block_m
        return place < total, group, begin + row, count - row, column_tile


@jit
def takes_tail(left, cfg: gl.constexpr):
    """Whether the last rows of the group, `left` from the tile's first one on, are the tile's and its tail."""
    return (left > cfg.block_m) & (left <= cfg.block_m + cfg.tail)


@jit
def place_after(groups, place):
    """The tile that this program takes after tile `place`."""
    if groups.taken is None:
        return place + gl.num_programs(0)
    else:
        return gl.num_programs(0) + gl.atomic_add(groups.taken, 1, sem="relaxed")


@constexpr_function
def _one_layout(warps):
    return gl.BlockedLayout([1], [32], [warps], [0])


@jit
def tile_memory(cfg: gl.constexpr):
    """Shared memory of the tiles' numbers, a set for every stage of the rings: of the tile that begins in it."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [cfg.stages * NUMBERS, 1], FLAT)


@jit
def tell(memory, stage, group, row, left, column_tile, WARPS: gl.constexpr):
    """Producer, once the stage is free and before anything arrives on it: the tile that begins; group -1: none does."""
    numbers = (group, row, left, column_tile)
    for i in gl.static_range(NUMBERS):
        memory.index(stage * NUMBERS + i).store(gl.full([1], numbers[i], gl.int32, _one_layout(WARPS)))


@jit
def told(memory, stage, WARPS: gl.constexpr):
    """Consumer, once the stage has arrived: (group, first row, rows of the group from there on, tile of columns)."""
    numbers = ()
    for i in gl.static_range(NUMBERS):
        numbers = numbers + (gl.max(memory.index(stage * NUMBERS + i).load(_one_layout(WARPS)), 0),)
    return numbers


@jit
def weights_of(groups, group):
    """Which weights a group takes; negative: none."""
    if groups.indices is None:
        return group
    else:
        return gl.load(groups.indices + group * groups.indices_stride).to(gl.int32)
