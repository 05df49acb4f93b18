"""Which tile of the product is the i-th: found on the device from the group sizes, without a planner."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Groups(NamedTuple):
    """See `Rows`; both None: equal shares of all rows."""

    indptr: torch.Tensor | None
    lengths: torch.Tensor | None


@triton.jit
def rows_of(groups, group, num_rows, num_groups):
    """(first row, number of rows) of groups `group`; groups past the last have none."""
    mask = group < num_groups
    if groups[0] is None:
        room = num_rows // num_groups
        begin = group * room
        count = tl.zeros_like(begin) + room
        if groups[1] is not None:
            count = tl.minimum(tl.load(groups[1] + group, mask=mask, other=0).to(tl.int32), room)
    else:
        begin = tl.load(groups[0] + group, mask=mask, other=0).to(tl.int32)
        end = tl.load(groups[0] + group + 1, mask=mask, other=0).to(tl.int32)
        count = tl.minimum(end, num_rows) - begin
    return begin, tl.where(mask, tl.maximum(count, 0), 0)


@triton.jit
def count_tiles(groups, num_rows, num_groups, tiles_n, cfg: tl.constexpr):
    """Tiles of all groups."""
    if cfg.single:
        total = (num_rows + cfg.block_m - 1) // cfg.block_m
    else:
        total = 0
        for first in range(0, num_groups, cfg.group_block):
            offs = first + tl.arange(0, cfg.group_block)
            _, count = rows_of(groups, offs, num_rows, num_groups)
            total += tl.sum((count + cfg.block_m - 1) // cfg.block_m, 0)
    return total * tiles_n


@triton.jit
def find_tile(groups, tile, num_rows, num_groups, tiles_n, cfg: tl.constexpr):
    """(group, first row of the tile, rows of the group from there on, column tile) of tile `tile`.

    Within a group tiles go by bands of `cfg.band` row tiles, row tile fastest: programs that run side by side share
    weights, and the band's rows stay in the L2 cache.
    """
    group = tl.full((), 0, tl.int32)
    begin = 0
    count = num_rows
    if not cfg.single:
        before = 0
        total = 0
        for first in range(0, num_groups, cfg.group_block):
            offs = first + tl.arange(0, cfg.group_block)
            _, counts = rows_of(groups, offs, num_rows, num_groups)
            upto = total + tl.cumsum((counts + cfg.block_m - 1) // cfg.block_m * tiles_n, 0)
            passed = upto <= tile
            group += tl.sum(passed.to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(passed, upto, 0), 0))
            total = tl.max(upto, 0)
        begin, count = rows_of(groups, group, num_rows, num_groups)
        tile -= before
    tiles_m = (count + cfg.block_m - 1) // cfg.block_m
    per_band = cfg.band * tiles_n
    band = tile // per_band
    height = tl.minimum(tiles_m - band * cfg.band, cfg.band)
    within = tile - band * per_band
    tile_n = within // height
    row = (band * cfg.band + within - tile_n * height) * cfg.block_m
    if cfg.shared_room:
        group = row // (num_rows // num_groups)
    return group, begin + row, count - row, tile_n
