"""The producers of the Hopper products: which tile comes next, and how its rows and weights get into shared memory.

By TMA one warp brings both. Rows that do not lie side by side are gathered: a warpgroup copies them, 16 bytes a thread,
and asks TMA for the weights that go with them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.device.gluon import constexpr_function, copy_load, gl, jit, tma_load
from flashinfer.ops.gemm.gluon_sm90.scales import copy_scales
from flashinfer.ops.gemm.gluon_sm90.schedule import nth_tile, rounds, weights_of

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
    """Tile n of the weights: those of output columns from `column` on, K from k on."""
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
def _tma_producer(sources, rings, groups, counts, scales, cfg: gl.constexpr):
    """One warp: the rows and weights of every tile, by TMA, and copies of their scales."""
    x_desc, w_desc = sources
    rows, weights = rings[0], rings[1]
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    for t in range(0, rounds(groups, counts, cfg.producer_warps, cfg)):
        tile = nth_tile(groups, counts, t, cfg.producer_warps, cfg)
        group, row, column = tile[0], tile[1], tile[3] * cfg.out_columns
        which = weights_of(groups, group)
        place = (which, row, column)
        # Without weights the product is 0 of zeros: NaN in the rows must not come through.
        row = gl.where(which < 0, NOWHERE, row)
        for k in range(0, steps):
            n = done + k
            rows.acquire(n)
            rows.expect(n, weights.BYTES)
            _load_weights(w_desc, weights, n, which, column, k * cfg.block_k, cfg)
            tma_load(x_desc, [row, k * cfg.block_k], rows.landing(n), rows.box(n, 0))
            if cfg.scale_rows > 0:
                copy_scales(rings[2], rows.stage(n), scales, place, k, counts, cfg)
                rows.deliver(n)
        done += steps
    rows.drain(done)


@constexpr_function
def _copy_layout(cfg):
    """Which thread copies which 8 elements of a tile of rows: as many lanes to a row as it has of these."""
    lanes = cfg.block_k // COPY.value
    return gl.BlockedLayout([1, COPY.value], [32 // lanes, lanes], [cfg.producer_warps, 1], [1, 0])


@jit
def _copying_producer(sources, rings, groups, counts, cfg: gl.constexpr):
    """One warpgroup: as `_tma_producer`, the rows copied; K is a multiple of `block_k`."""
    scattered, w_desc = sources
    rows, weights = rings
    LAYOUT: gl.constexpr = _copy_layout(cfg)
    offs_m = gl.arange(0, cfg.block_m, gl.SliceLayout(1, LAYOUT))
    offs_k = gl.arange(0, cfg.block_k, gl.SliceLayout(0, LAYOUT))
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    for t in range(0, rounds(groups, counts, cfg.producer_warps, cfg)):
        group, row, left, column_tile = nth_tile(groups, counts, t, cfg.producer_warps, cfg)
        which = weights_of(groups, group)
        exists = offs_m < gl.where(which < 0, 0, left)
        source = gl.load(scattered.indices + row + offs_m, mask=exists, other=0).to(gl.int64)
        begin = scattered.data + source * scattered.stride * COPY
        for k in range(0, steps):
            n = done + k
            rows.acquire(n)
            weights.expect(n)
            _load_weights(w_desc, weights, n, which, column_tile * cfg.out_columns, k * cfg.block_k, cfg)
            pointers = begin[:, None] + (k * cfg.block_k + offs_k)[None, :]
            copy_load(rows.box(n, 0), pointers, mask=exists[:, None])
            rows.deliver(n)
        done += steps
    rows.drain(done)


@jit
def producer(sources, rings, groups, counts, scales, cfg: gl.constexpr):
    """The producer that the configuration means. sources: a map of the rows, or `Scattered`; a map of the weights."""
    if cfg.gathered:
        _copying_producer(sources, rings, groups, counts, cfg)
    else:
        _tma_producer(sources, rings, groups, counts, scales, cfg)
