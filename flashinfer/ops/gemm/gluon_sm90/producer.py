"""The producers of the Hopper products: which tile comes next, and how its rows and weights get into shared memory.

By TMA one warp brings both. Rows that do not lie side by side are gathered: a warpgroup copies them, 16 bytes a thread,
and asks TMA for the weights that go with them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.device.gluon import constexpr_function, copy_load, gl, jit, tma_load
from flashinfer.ops.gemm.gluon_sm90.scales import copy_scales
from flashinfer.ops.gemm.gluon_sm90.schedule import place_after, takes_tail, tell, tile_at, weights_of

# A coordinate past every tensor: TMA fills the box with zeros.
NOWHERE = gl.constexpr(0x7F000000)
# Elements of 16 bits that a thread copies at once.
COPY = gl.constexpr(8)


class Scattered(NamedTuple):
    """Rows to be gathered: data `[T, K]`, `stride` units of COPY elements apart; indices int32 or int64 `[nnz]`."""

    data: torch.Tensor
    stride: int
    indices: torch.Tensor


@jit
def _load_weights(w_desc, weights, n, which, column, k, cfg: gl.constexpr):
    """Tile n of the weights: those of output columns from `column` on, step k of K."""
    k *= cfg.weight_depth
    BOXES: gl.constexpr = weights.BOXES
    for i in gl.static_range(BOXES):
        if cfg.gated:
            where = [which, column // cfg.gate_block, 0, 0, k]
        elif cfg.n_major:
            where = [which, k, column + i * cfg.block_k]
        else:
            where = [which, column, k]
        tma_load(w_desc, where, weights.landing(n), weights.box(n, i))


@jit
def _load_rows(x_desc, rings, n, row, left, k, cfg: gl.constexpr):
    """Tile n of the rows, those from `row` on, after what it announces: its bytes and those of the weights."""
    rows, weights = rings.rows, rings.weights
    if cfg.tail > 0:
        if takes_tail(left, cfg):
            rows.expect(n, weights.BYTES + cfg.tail_bytes)
            tma_load(x_desc, [row + cfg.block_m, k], rows.landing(n), rings.beside.index(rows.stage(n)))
        else:
            rows.expect(n, weights.BYTES)
    else:
        rows.expect(n, weights.BYTES)
    for i in gl.static_range(rows.BOXES):
        tma_load(x_desc, [row + i * cfg.row_box, k], rows.landing(n), rows.box(n, i))


@jit
def _end(rings, done, cfg: gl.constexpr):
    """After `done` tiles of the rings: tell the consumers that no other comes."""
    rows = rings.rows
    rows.acquire(done)
    tell(rings.tiles, rows.stage(done), -1, 0, 0, 0, cfg.producer_warps)
    rows.expect_nothing(done)
    if cfg.gathered or cfg.scale_rows > 0:
        rows.deliver(done)
    rows.drain(done, 1)


@jit
def _tma_producer(sources, rings, groups, counts, scales, cfg: gl.constexpr):
    """One warp: the rows and weights of every tile, by TMA, and copies of their scales."""
    x_desc, w_desc = sources
    rows, weights = rings.rows, rings.weights
    WARPS: gl.constexpr = cfg.producer_warps
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    place = gl.program_id(0)
    exists, group, row, left, column_tile = tile_at(groups, counts, place, WARPS, cfg)
    while exists:
        place = place_after(groups, place)
        column = column_tile * cfg.out_columns
        which = weights_of(groups, group)
        # Without weights the product is 0 of zeros: NaN in the rows must not come through.
        source = gl.where(which < 0, NOWHERE, row)
        for k in range(0, steps):
            n = done + k
            rows.acquire(n)
            if k == 0:
                tell(rings.tiles, rows.stage(n), group, row, left, column_tile, WARPS)
            _load_rows(x_desc, rings, n, source, left, k * cfg.block_k, cfg)
            _load_weights(w_desc, weights, n, which, column, k, cfg)
            if cfg.scale_rows > 0:
                copy_scales(rings.beside, rows.stage(n), scales, (which, row, column), k, counts, cfg)
                rows.deliver(n)
        done += steps
        exists, group, row, left, column_tile = tile_at(groups, counts, place, WARPS, cfg)
    _end(rings, done, cfg)


@constexpr_function
def _copy_layout(cfg):
    """Which thread copies which 8 elements of a tile of rows: as many lanes to a row as it has of these."""
    lanes = cfg.block_k // COPY.value
    return gl.BlockedLayout([1, COPY.value], [32 // lanes, lanes], [cfg.producer_warps, 1], [1, 0])


@jit
def _copying_producer(sources, rings, groups, counts, cfg: gl.constexpr):
    """One warpgroup: as `_tma_producer`, the rows copied; K is a multiple of `block_k`."""
    scattered, w_desc = sources
    rows, weights = rings.rows, rings.weights
    WARPS: gl.constexpr = cfg.producer_warps
    LAYOUT: gl.constexpr = _copy_layout(cfg)
    offs_m = gl.arange(0, cfg.block_m, gl.SliceLayout(1, LAYOUT))
    offs_k = gl.arange(0, cfg.block_k, gl.SliceLayout(0, LAYOUT))
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    place = gl.program_id(0)
    exists, group, row, left, column_tile = tile_at(groups, counts, place, WARPS, cfg)
    while exists:
        place = place_after(groups, place)
        which = weights_of(groups, group)
        mask = offs_m < gl.where(which < 0, 0, left)
        source = gl.load(scattered.indices + row + offs_m, mask=mask, other=0).to(gl.int64)
        begin = scattered.data + source * scattered.stride * COPY
        if cfg.tail > 0:
            offs_tail = cfg.block_m + gl.arange(0, cfg.tail, gl.SliceLayout(1, LAYOUT))
            tail_mask = offs_tail < gl.where(which < 0, 0, left)
            source = gl.load(scattered.indices + row + offs_tail, mask=tail_mask, other=0).to(gl.int64)
            tail_begin = scattered.data + source * scattered.stride * COPY
        for k in range(0, steps):
            n = done + k
            rows.acquire(n)
            if k == 0:
                tell(rings.tiles, rows.stage(n), group, row, left, column_tile, WARPS)
            weights.expect(n)
            _load_weights(w_desc, weights, n, which, column_tile * cfg.out_columns, k, cfg)
            columns = (k * cfg.block_k + offs_k)[None, :]
            copy_load(rows.box(n, 0), begin[:, None] + columns, mask=mask[:, None])
            if cfg.tail > 0:
                if takes_tail(left, cfg):
                    copy_load(rings.beside.index(rows.stage(n)), tail_begin[:, None] + columns, mask=tail_mask[:, None])
            rows.deliver(n)
        done += steps
        exists, group, row, left, column_tile = tile_at(groups, counts, place, WARPS, cfg)
    _end(rings, done, cfg)


@jit
def producer(sources, rings, groups, counts, scales, cfg: gl.constexpr):
    """The producer that the configuration means. sources: a map of the rows, or `Scattered`; a map of the weights."""
    if cfg.gathered:
        _copying_producer(sources, rings, groups, counts, cfg)
    else:
        _tma_producer(sources, rings, groups, counts, scales, cfg)
