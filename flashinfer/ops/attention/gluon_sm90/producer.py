"""The producers of the Hopper prefill: which work comes next, and how its Q, K and V get into shared memory.

By TMA one warp brings boxes of a page (or of ragged tokens). Pages too small or odd for a box are gathered: a warpgroup
copies token by token, 16 bytes a thread.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.device.gluon import constexpr_function, copy_load, gl, jit, tma_load
from flashinfer.ops.attention.plan import RECORD_FIELDS

# A TMA box is at most 128 bytes wide under the widest swizzle.
BOX_COLUMNS = gl.constexpr(64)
# A coordinate past every tensor: TMA fills the box with zeros.
NOWHERE = gl.constexpr(0x7F000000)
# Elements of 16 bits that a thread copies at once.
COPY = gl.constexpr(8)
COPY_WARPS = gl.constexpr(4)
FIELDS = gl.constexpr(RECORD_FIELDS)


class Cache(NamedTuple):
    """K or V `[pages, page_size, num_kv_heads, head_dim]` to be gathered; strides in units of COPY elements."""

    data: torch.Tensor
    stride_page: int
    stride_token: int
    stride_head: int


@jit
def rounds(num_tiles, heads, cfg: gl.constexpr):
    """How many work items this program has."""
    total = num_tiles * heads.num_heads
    if cfg.persistent:
        return (total - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
    else:
        return gl.where(gl.program_id(0) < total, 1, 0)


@jit
def work_item(work, num_tiles, n, cfg: gl.constexpr):
    """Record and query head of this program's n-th work item: blocks of heads, then records, then heads."""
    place = gl.program_id(0) + n * gl.num_programs(0)
    a_block = num_tiles * cfg.head_block
    block = place // a_block
    left = place - block * a_block
    slot = left // cfg.head_block
    return work.tiles + slot * FIELDS, block * cfg.head_block + (left - slot * cfg.head_block)


@jit
def _queries(q_desc, queries, n, record, qo_head, GROUPS: gl.constexpr, cfg: gl.constexpr):
    """The n-th work item's queries, by TMA."""
    HALVES: gl.constexpr = cfg.head_dim // BOX_COLUMNS
    PARTS: gl.constexpr = GROUPS * HALVES
    q_row = gl.load(record + 6) + gl.load(record + 1) * (GROUPS * cfg.rows)
    queries.acquire(n)
    queries.expect(n)
    for i in gl.static_range(PARTS):
        where = [q_row + i // HALVES * cfg.rows, qo_head, i % HALVES * BOX_COLUMNS]
        tma_load(q_desc, where, queries.landing(n), queries.box(n, i))


@jit
def _fill(desc, ring, n, place, indices, cfg: gl.constexpr):
    """Tile n of a ring: the block_n tokens from `token` on. place: (first entry or token of the request, token,
    kv_len, KV head)."""
    kv_begin, token, kv_len, kv_head = place
    HALVES: gl.constexpr = cfg.head_dim // BOX_COLUMNS
    BOXES: gl.constexpr = cfg.block_n // cfg.box
    # Page numbers are asked for two at a time, the first ones before the wait for a free stage.
    AHEAD: gl.constexpr = 2 if BOXES > 1 else 1
    BATCHES: gl.constexpr = BOXES // AHEAD
    for b in gl.static_range(BATCHES):
        pages = ()
        for x in gl.static_range(AHEAD):
            at = token + (b * AHEAD + x) * cfg.box
            if cfg.page_size > 0:
                page = gl.load(indices + kv_begin + at // cfg.page_size, mask=at < kv_len, other=NOWHERE)
            else:
                page = gl.where(at < kv_len, 0, NOWHERE)
            pages = pages + (page,)
        if b == 0:
            ring.acquire(n)
            ring.expect(n)
        for x in gl.static_range(AHEAD):
            slot = token + (b * AHEAD + x) * cfg.box
            if cfg.page_size > 0:
                slot = slot % cfg.page_size
            else:
                slot = slot + kv_begin
            for h in gl.static_range(HALVES):
                where = [pages[x], slot, kv_head, h * BOX_COLUMNS]
                tma_load(desc, where, ring.landing(n), ring.box(n, h * BOXES + b * AHEAD + x))


@jit
def tma_producer(sources, channels, work, heads, indices, GROUPS: gl.constexpr, cfg: gl.constexpr):
    """One warp: queries, then K_0, K_1, V_0, K_2, V_1, ... of each work item, from its last tile to its first."""
    q_desc, k_desc, v_desc = sources
    queries, keys, values = channels
    num_tiles = gl.load(work.num_tiles)
    done = 0
    for n in range(0, rounds(num_tiles, heads, cfg)):
        record, qo_head = work_item(work, num_tiles, n, cfg)
        kv_tiles = gl.load(record + 3)
        last = gl.load(record + 2) + kv_tiles - 1
        kv_len = gl.load(record + 4)
        kv_begin = gl.load(record + 5)
        kv_head = qo_head // heads.group
        _queries(q_desc, queries, n, record, qo_head, GROUPS, cfg)
        for j in range(0, kv_tiles + 1):
            if j < kv_tiles:
                _fill(k_desc, keys, done + j, (kv_begin, (last - j) * cfg.block_n, kv_len, kv_head), indices, cfg)
            if j > 0:
                place = (kv_begin, (last - j + 1) * cfg.block_n, kv_len, kv_head)
                _fill(v_desc, values, done + j - 1, place, indices, cfg)
        done += kv_tiles
    queries.drain(rounds(num_tiles, heads, cfg))
    keys.drain(done)
    values.drain(done)


@constexpr_function
def producer_warps(cfg):
    """How many warps produce: one asks TMA, a warpgroup copies."""
    return 1 if cfg.box > 0 else COPY_WARPS.value


@constexpr_function
def _copy_layout(cfg):
    """Which thread copies which 8 elements of a tile: as many lanes to a token as it has of these."""
    lanes = cfg.head_dim // COPY.value
    return gl.BlockedLayout([1, COPY.value], [32 // lanes, lanes], [COPY_WARPS.value, 1], [1, 0])


@constexpr_function
def _place_layout(cfg):
    """One token a thread, so that each warp holds those that it copies: shuffles hand them out."""
    lanes = cfg.head_dim // COPY.value
    rows = 32 // lanes
    among = [[COPY_WARPS.value * rows << i] for i in range(lanes.bit_length() - 1)]
    among = [basis if basis[0] < cfg.block_n else [0] for basis in among]
    lane_bases = among + [[1 << i] for i in range(rows.bit_length() - 1)]
    return gl.DistributedLinearLayout([], lane_bases, [[rows], [2 * rows]], [], [cfg.block_n])


@jit
def _places(indices, kv_begin, token, kv_len, cfg: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the block_n tokens from `token` on lie in the cache, as page * page_size + slot; -1 where there is none."""
    at = token + gl.arange(0, cfg.block_n, LAYOUT)
    inside = (at >= 0) & (at < kv_len)
    page = gl.load(indices + kv_begin + at // cfg.page_size, mask=inside, other=0)
    return gl.where(inside, page * cfg.page_size + at % cfg.page_size, -1)


@jit
def _copy(cache, ring, n, places, kv_head, cfg: gl.constexpr):
    """Tile n of a ring, its tokens gathered; those that are not there become zeros."""
    LAYOUT: gl.constexpr = _copy_layout(cfg)
    token = gl.convert_layout(places, gl.SliceLayout(1, LAYOUT))
    offs_d = gl.arange(0, cfg.head_dim, gl.SliceLayout(0, LAYOUT))
    page = (token // cfg.page_size).to(gl.int64)
    offs = page * cache.stride_page + (token % cfg.page_size).to(gl.int64) * cache.stride_token
    base = cache.data + kv_head.to(gl.int64) * cache.stride_head * COPY
    ring.acquire(n)
    pointers = base + (offs * COPY)[:, None] + offs_d[None, :]
    copy_load(ring.part(n, 0), pointers, mask=(token >= 0)[:, None])
    ring.deliver(n)


@jit
def copying_producer(sources, channels, work, heads, indices, GROUPS: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup, in the order of `tma_producer`. The places of a tile are read one tile ahead, one a thread."""
    q_desc, k, v = sources
    queries, keys, values = channels
    PLACES: gl.constexpr = _place_layout(cfg)
    num_tiles = gl.load(work.num_tiles)
    done = 0
    for n in range(0, rounds(num_tiles, heads, cfg)):
        record, qo_head = work_item(work, num_tiles, n, cfg)
        kv_tiles = gl.load(record + 3)
        last = gl.load(record + 2) + kv_tiles - 1
        kv_len = gl.load(record + 4)
        kv_begin = gl.load(record + 5)
        kv_head = qo_head // heads.group
        places = _places(indices, kv_begin, last * cfg.block_n, kv_len, cfg, PLACES)
        # Not `places`: Triton takes two names of one value for one, and would not carry the second through the loop.
        older = gl.full([cfg.block_n], -1, gl.int32, PLACES)
        _queries(q_desc, queries, n, record, qo_head, GROUPS, cfg)
        for j in range(0, kv_tiles + 1):
            newer = _places(indices, kv_begin, (last - j - 1) * cfg.block_n, kv_len, cfg, PLACES)
            if j < kv_tiles:
                _copy(k, keys, done + j, places, kv_head, cfg)
            if j > 0:
                _copy(v, values, done + j - 1, older, kv_head, cfg)
            older = places
            places = newer
        done += kv_tiles
    queries.drain(rounds(num_tiles, heads, cfg))
    keys.drain(done)
    values.drain(done)


@jit
def producer(sources, channels, work, heads, indices, GROUPS: gl.constexpr, cfg: gl.constexpr):
    """The producer that the configuration means."""
    if cfg.box > 0:
        tma_producer(sources, channels, work, heads, indices, GROUPS, cfg)
    else:
        copying_producer(sources, channels, work, heads, indices, GROUPS, cfg)
