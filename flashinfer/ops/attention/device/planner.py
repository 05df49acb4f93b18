"""The planner on the device: one program makes the schedule of `plan.py` from the index tensors."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.core.launch import Prebound, alignment
from flashinfer.core.workspace import Arena
from flashinfer.ops.attention.device.hooks import fold_bounds
from flashinfer.ops.attention.plan import RECORD_FIELDS, SHARE_FIELDS
from flashinfer.ops.attention.spec import Batch

PLANNER_BLOCK = 1024


@dataclass(frozen=True)
class PlannerConfig:
    """What the planner is compiled for; see `plan.Tiling` and `plan.schedule`.

    page_size: 1 if ragged. masks_have_bounds: see `hooks.Traits`.
    """

    num_kv_heads: int
    group: int
    page_size: int
    block_m: int
    block_n: int
    item_cost: int
    masks_have_bounds: bool


class Requests(NamedTuple):
    """The index arrays of a batch, int32 on the device; None where the spec says the same without them."""

    qo_indptr: torch.Tensor | None
    kv_indptr: torch.Tensor
    last_page_len: torch.Tensor | None


class ScheduleTables(NamedTuple):
    """What the planner writes; see `plan.Schedule`. tile_base: int32 `[batch + 1]`, query tiles before a request."""

    first: torch.Tensor
    records: torch.Tensor
    shares: torch.Tensor
    tile_base: torch.Tensor


@triton.jit
def _query_range(requests, i, mask, total_rows, QO_LEN: tl.constexpr):
    """First query row and number of queries of requests i, inside the rows that there are."""
    if QO_LEN > 0:
        begin = i * QO_LEN
        length = tl.where(mask, QO_LEN, 0)
    else:
        begin = tl.minimum(tl.load(requests.qo_indptr + i, mask=mask, other=0), total_rows)
        end = tl.minimum(tl.load(requests.qo_indptr + i + 1, mask=mask, other=0), total_rows)
        length = tl.maximum(end - begin, 0)
    return begin, length


@triton.jit
def _kv_range(requests, i, mask, PAGE_SIZE: tl.constexpr):
    """First entry of the page table and number of tokens of requests i."""
    begin = tl.load(requests.kv_indptr + i, mask=mask, other=0)
    pages = tl.load(requests.kv_indptr + i + 1, mask=mask, other=0) - begin
    if requests.last_page_len is None:
        tokens = pages * PAGE_SIZE
    else:
        last = tl.load(requests.last_page_len + i, mask=mask, other=0)
        tokens = tl.where(pages > 0, (pages - 1) * PAGE_SIZE + last, 0)
    return begin, tl.maximum(tokens, 0)


@triton.jit
def _last_not_above(table, value, count, mask, BLOCK: tl.constexpr):
    """Largest index in [0, count) whose entry of a rising table is <= value; entry 0 counts as such."""
    low = tl.full([BLOCK], 0, tl.int32)
    high = tl.full([BLOCK], 0, tl.int32) + tl.maximum(count - 1, 0)
    left = count
    while left > 1:
        middle = (low + high + 1) // 2
        open_ = low < high
        not_above = tl.load(table + middle, mask=mask & open_, other=0) <= value
        low = tl.where(open_ & not_above, middle, low)
        high = tl.where(open_ & (not_above == 0), middle - 1, high)
        left = (left + 1) // 2
    return low


@triton.jit
def _count_query_tiles(
    requests, tile_base, batch_size, total_rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    total = 0
    for base in range(0, batch_size, BLOCK):
        i = base + tl.arange(0, BLOCK)
        mask = i < batch_size
        _, qo_len = _query_range(requests, i, mask, total_rows, 0)
        tiles = (qo_len * GROUP + BLOCK_M - 1) // BLOCK_M
        tl.store(tile_base + i, total + tl.cumsum(tiles, 0) - tiles, mask=mask)
        total += tl.sum(tiles, 0)
    tl.store(tile_base + batch_size, total)
    return total


@triton.jit(do_not_specialize=["batch_size", "total_rows", "num_programs"])
def planner_kernel(
    requests,
    tables,
    bounds,
    batch_size,
    total_rows,
    num_programs,
    cfg: tl.constexpr,
    QO_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program. QO_LEN: queries of every request if uniform, else 0. total_rows: rows of q; none past is read."""
    TILES: tl.constexpr = (QO_LEN * cfg.group + cfg.block_m - 1) // cfg.block_m
    if QO_LEN > 0:
        num_records = batch_size * TILES
    else:
        counted = _count_query_tiles(requests, tables.tile_base, batch_size, total_rows, cfg.group, cfg.block_m, BLOCK)
        # What the tables hold: only a prefix sum that falls somewhere counts more.
        num_records = tl.minimum(counted, (total_rows * cfg.group + cfg.block_m - 1) // cfg.block_m + batch_size)
        tl.debug_barrier()
    total = tl.full([], 0, tl.int64)
    for base in range(0, num_records, BLOCK):
        record = base + tl.arange(0, BLOCK)
        mask = record < num_records
        if QO_LEN > 0:
            i = record // TILES
            q_tile = record % TILES
        else:
            i = _last_not_above(tables.tile_base, record, batch_size, mask, BLOCK)
            q_tile = record - tl.load(tables.tile_base + i, mask=mask, other=0)
        q_begin, qo_len = _query_range(requests, i, mask, total_rows, QO_LEN)
        kv_begin, kv_len = _kv_range(requests, i, mask, cfg.page_size)
        q_lo = q_tile * cfg.block_m // cfg.group
        q_hi = tl.minimum(((q_tile + 1) * cfg.block_m - 1) // cfg.group + 1, qo_len)
        lo, hi, _, _ = fold_bounds(bounds, q_lo, q_hi, qo_len, kv_len, cfg.masks_have_bounds)
        kv_tile = tl.where(hi > lo, lo // cfg.block_n, 0)
        kv_tiles = tl.where(hi > lo, (hi + cfg.block_n - 1) // cfg.block_n - kv_tile, 1)
        cost = tl.where(mask, (kv_tiles + cfg.item_cost) * cfg.num_kv_heads, 0).to(tl.int64)
        tl.store(tables.first + record, total + tl.cumsum(cost, 0) - cost, mask=mask)
        total += tl.sum(cost, 0)
        row = tables.records + record.to(tl.int64) * 8
        tl.store(row + 0, i, mask=mask)
        tl.store(row + 1, q_tile, mask=mask)
        tl.store(row + 2, kv_tile, mask=mask)
        tl.store(row + 3, kv_tiles, mask=mask)
        tl.store(row + 4, kv_len, mask=mask)
        tl.store(row + 5, kv_begin, mask=mask)
        tl.store(row + 6, q_begin, mask=mask)
        tl.store(row + 7, qo_len, mask=mask)
    tl.store(tables.first + num_records, total)
    tl.debug_barrier()
    floor = total // num_programs
    extra = total - floor * num_programs
    for base in range(0, num_programs + 1, BLOCK):
        program = base + tl.arange(0, BLOCK)
        mask = program <= num_programs
        begin = program * floor + tl.minimum(program, extra)
        record = _last_not_above(tables.first, begin, num_records, mask, BLOCK)
        row = tables.shares + program * 16
        # A program's first record is copied to its share: one load less to wait for before its first page number.
        offs_field = tl.arange(0, 8)
        present = mask & (program * 0 < num_records)
        fields = tl.load(tables.records + record[:, None] * 8 + offs_field[None, :], mask=present[:, None], other=0)
        tl.store(row[:, None] + offs_field[None, :], fields, mask=mask[:, None])
        tl.store(row + 8, begin, mask=mask)
        tl.store(row + 9, tl.load(tables.first + record, mask=mask, other=0), mask=mask)
        tl.store(row + 10, record, mask=mask)
        tl.store(row + 11, floor + program * 0, mask=mask)
        tl.store(row + 12, extra + program * 0, mask=mask)


_launch_planner = Prebound(planner_kernel)


def planner_tables(arena: Arena, num_programs: int, batch: Batch, cfg: PlannerConfig) -> ScheduleTables:
    """Tables large enough for `batch.total_rows` queries, however they fall on requests."""
    assert batch.total_rows is not None
    capacity = -(-batch.total_rows * cfg.group // cfg.block_m) + batch.batch_size
    return ScheduleTables(
        arena.private("first", (capacity + 1,), torch.int64),
        # One record past the end may be read ahead; it is never worked on.
        arena.private("records", (capacity + 1, RECORD_FIELDS), torch.int64),
        arena.private("shares", (num_programs + 1, SHARE_FIELDS), torch.int64),
        arena.private("tile_base", (batch.batch_size + 1,), torch.int32),
    )


def launch_planner(
    cfg: PlannerConfig,
    batch: Batch,
    tables: ScheduleTables,
    bounds: tuple[Any, ...],
    uniform_qo_len: int | None,
    num_programs: int,
    key: Hashable,
) -> None:
    """Fill the tables; key: what `bounds` and cfg depend on (see `Prebound`)."""
    indices = Requests(batch.qo_indptr, batch.kv_indptr, batch.last_page_len)
    uniform = uniform_qo_len or 0
    _launch_planner(
        (1, 1, 1),
        (cfg, key, alignment(*indices), *(x is None for x in indices), uniform),
        (indices, tables, bounds, batch.batch_size, batch.total_rows, num_programs, cfg, uniform, PLANNER_BLOCK),
        batch.kv_indptr.device,
        num_warps=8,
    )
