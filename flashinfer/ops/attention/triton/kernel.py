"""The attention kernel: persistent programs, each with an equal share of all KV tiles (see `plan.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.ops.attention.device.hooks import exponent_factor, fold_bounds
from flashinfer.ops.attention.triton.merge import finish, merge_tile, owner
from flashinfer.ops.attention.triton.tiles import attend_tiles, load_tile, rotate_tile


@dataclass(frozen=True)
class KernelConfig:
    """Everything a kernel is compiled for, besides the dtypes and the variant's functions.

    block_qk, block_vo: head dims rounded up to powers of two (>= 16). skip_masks: tiles that need
    no mask branch around it. natural_logits: logits are scaled before the hooks (else one factor in the exponent does
    it). masks_have_bounds: see `hooks.Traits`. item_cost: see `plan.Tiling`. merge_rows: rows of a query
    tile that can hold a query.
    """

    num_kv_heads: int
    group: int
    head_dim_qk: int
    head_dim_vo: int
    block_qk: int
    block_vo: int
    page_size: int
    paged: bool
    block_m: int
    block_n: int
    num_stages: int
    split_kv: bool
    skip_masks: bool
    natural_logits: bool
    masks_have_bounds: bool
    item_cost: int
    merge_rows: int


class Queries(NamedTuple):
    """q `[rows, num_qo_heads, head_dim_qk]`, strides in elements."""

    data: torch.Tensor
    stride_row: int
    stride_head: int


class Partials(NamedTuple):
    """States of shared tiles, two slots a program: o fp32 `[slots, block_m, block_vo]`, base-2 lse; a counter each."""

    o: torch.Tensor
    lse: torch.Tensor
    counters: torch.Tensor


@triton.jit
def _load_record(row):
    request = tl.load(row).to(tl.int32)
    q_tile = tl.load(row + 1).to(tl.int32)
    kv_tile = tl.load(row + 2).to(tl.int32)
    kv_tiles = tl.load(row + 3).to(tl.int32)
    kv_len = tl.load(row + 4).to(tl.int32)
    kv_begin = tl.load(row + 5).to(tl.int32)
    q_begin = tl.load(row + 6).to(tl.int32)
    qo_len = tl.load(row + 7).to(tl.int32)
    return request, q_tile, kv_tile, kv_tiles, kv_len, kv_begin, q_begin, qo_len


@triton.jit
def _attend(queries, pages, item, rows, mask_row, q_range, tiles, hooks, factors, cfg: tl.constexpr):
    """The softmax state of one query tile against the KV tiles [tiles[0], tiles[1])."""
    _, _, kv_len, _, qo_len = item
    qo_idx, qo_head = rows
    q_begin, q_lo, q_hi = q_range
    offs_q = (q_begin + qo_idx).to(tl.int64) * queries.stride_row + qo_head.to(tl.int64) * queries.stride_head
    offs_qk = tl.arange(0, cfg.block_qk)
    q = load_tile(queries.data, offs_q, offs_qk, mask_row, cfg.head_dim_qk, cfg.block_qk)
    if queries.data.dtype.element_ty.is_fp8():
        q = q.to(tl.float16)
    if len(hooks.query) > 0:
        pos = kv_len - qo_len + qo_idx
        q = rotate_tile(hooks.query, q, queries.data, offs_q, pos, mask_row, cfg.head_dim_qk, cfg.block_qk)
    m_i = tl.full([cfg.block_m], float("-inf"), tl.float32)
    l_i = tl.full([cfg.block_m], 0.0, tl.float32)
    acc = tl.full([cfg.block_m, cfg.block_vo], 0.0, tl.float32)
    begin, end = tiles
    _, _, full_lo, full_hi = fold_bounds(hooks.bounds, q_lo, q_hi, qo_len, kv_len, cfg.masks_have_bounds)
    run = (begin, end, (full_lo + cfg.block_n - 1) // cfg.block_n, full_hi // cfg.block_n)
    m_i, l_i, acc = attend_tiles((m_i, l_i, acc), q, pages, item, rows, hooks, factors, run, cfg)
    return m_i * exponent_factor(hooks.logits, factors.sm_scale, cfg.natural_logits), l_i, acc


@triton.jit
def _work_item(queries, pages, output, partials, hooks, factors, item, span, share, cfg: tl.constexpr):
    """One query tile and KV head against `count` of its KV tiles, from tile `offset` of them on.

    item: (request, q_tile, kv_tile, kv_tiles, kv_len, kv_begin, q_begin, qo_len, kv_head); span: (offset, count);
    share: (program, place of the item's first KV tile in the whole, floor, extra).
    """
    request, q_tile, kv_tile, kv_tiles, kv_len, kv_begin, q_begin, qo_len, kv_head = item
    offset, count = span
    program, place_of_first, floor, extra = share
    offs_m = tl.arange(0, cfg.block_m)
    packed = q_tile * cfg.block_m + offs_m
    mask_row = packed < qo_len * cfg.group
    rows = (packed // cfg.group, kv_head * cfg.group + packed % cfg.group)
    q_lo = q_tile * cfg.block_m // cfg.group
    q_hi = tl.minimum(((q_tile + 1) * cfg.block_m - 1) // cfg.group + 1, qo_len)
    place = (request, kv_head, kv_len, kv_begin, qo_len)
    tiles = (kv_tile + offset, kv_tile + offset + count)
    m_i, l_i, acc = _attend(queries, pages, place, rows, mask_row, (q_begin, q_lo, q_hi), tiles, hooks, factors, cfg)
    if count == kv_tiles:
        finish(output, factors, m_i, l_i, acc, q_begin + rows[0], rows[1], mask_row, cfg)
    else:
        slot = 2 * program + tl.where(offset == 0, 1, 0)
        offs_vo = tl.arange(0, cfg.block_vo)
        offs_slot = slot * cfg.block_m + offs_m
        inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
        tl.store(partials.o + offs_slot[:, None] * cfg.block_vo + offs_vo[None, :], acc * inverse[:, None])
        tl.store(partials.lse + offs_slot, tl.where(l_i == 0, float("-inf"), m_i + tl.math.log2(l_i)))
        begin_owner = owner(place_of_first, floor, extra)
        last_owner = owner(place_of_first + kv_tiles - 1, floor, extra)
        # Every warp's stores come before the one thread that counts this program as arrived.
        tl.debug_barrier()
        arrived = tl.atomic_add(partials.counters + begin_owner, 1, sem="acq_rel", scope="gpu")
        if arrived == last_owner - begin_owner:
            # The counter is ready for the next run.
            tl.store(partials.counters + begin_owner, 0)
            left = qo_len * cfg.group - q_tile * cfg.block_m
            base = (q_begin, q_tile * cfg.block_m, kv_head)
            merge_tile(output, factors, partials, begin_owner, last_owner, left, base, cfg)


@triton.jit
def attention_kernel(queries, pages, output, tables, partials, hooks, factors, cfg: tl.constexpr):
    """Grid: one program a share. tables: `planner.ScheduleTables`; item order: record, KV head, KV tile."""
    program = tl.program_id(0)
    row = tables.shares + program * 16
    request, q_tile, kv_tile, kv_tiles, kv_len, kv_begin, q_begin, qo_len = _load_record(row)
    place = tl.load(row + 8)
    first = tl.load(row + 9)
    record = tl.load(row + 10)
    floor = tl.load(row + 11)
    extra = tl.load(row + 12)
    end = tl.load(row + 24)
    while place < end:
        done = (place - first).to(tl.int32)
        length = kv_tiles + cfg.item_cost
        kv_head = done // length
        passed = done - kv_head * length
        offset = tl.maximum(passed - cfg.item_cost, 0)
        following = place + (length - passed)
        count = kv_tiles - offset
        if cfg.split_kv:
            # A share may end within the item: even before its first KV tile, and then there is nothing to do.
            following = tl.minimum(following, end)
            left = passed + (following - place).to(tl.int32) - cfg.item_cost
            count = tl.minimum(left, kv_tiles) - offset
        item = (request, q_tile, kv_tile, kv_tiles, kv_len, kv_begin, q_begin, qo_len, kv_head)
        share = (program, place - passed + cfg.item_cost, floor, extra)
        ends_record = following >= first + length.to(tl.int64) * cfg.num_kv_heads
        next_record = record + tl.where(ends_record, 1, 0)
        # Short items: the next record is asked for before this one is worked on. Long ones need the registers.
        if not cfg.skip_masks:
            upcoming = _load_record(tables.records + next_record * 8)
            next_first = tl.load(tables.first + next_record)
        # Without split_kv an item belongs, whole, to the share in which it begins.
        mine = count > 0 if cfg.split_kv else passed == 0
        if mine:
            _work_item(queries, pages, output, partials, hooks, factors, item, (offset, count), share, cfg)
        if cfg.skip_masks:
            upcoming = _load_record(tables.records + next_record * 8)
            next_first = tl.load(tables.first + next_record)
        place = following
        record = next_record
        first = next_first
        request, q_tile, kv_tile, kv_tiles, kv_len, kv_begin, q_begin, qo_len = upcoming
