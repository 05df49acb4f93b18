"""Tiles of fp8 operands: the sums of 128 products are scaled and added up in fp32 registers.

The tensor cores keep about 14 bits of an fp8 sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), and block scales
change every 128 elements of K in any case.
"""

from __future__ import annotations

from flashinfer.device.channels import FIRST_BARRIER, Turns
from flashinfer.device.gluon import gl, jit, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from flashinfer.ops.gemm.gluon_sm90.epilogue import accumulator_layout, finished, put
from flashinfer.ops.gemm.gluon_sm90.plain import CONSUMER_WARPS
from flashinfer.ops.gemm.gluon_sm90.scales import factors_here
from flashinfer.ops.gemm.gluon_sm90.schedule import told


@jit
def _product(x, weights, n, PART: gl.constexpr, zero, turns, cfg: gl.constexpr):
    """Issue the product with a part of tile n of the weights, in this warpgroup's turn if they take turns."""
    if cfg.turns:
        turns.take()
    value = warpgroup_mma(x, weights.part(n, PART).permute((1, 0)), zero, use_acc=False, is_async=True)
    if cfg.turns:
        turns.give()
    return value


@jit
def _share(rings, turns, done, end, CID: gl.constexpr, cfg: gl.constexpr):
    """Sums `[64, part_columns]` of each part of a warpgroup's share of a tile."""
    rows, weights = rings.rows, rings.weights
    LAYOUT: gl.constexpr = accumulator_layout(cfg.part_columns, cfg.bits)
    PARTS: gl.constexpr = cfg.subtiles
    FIRST: gl.constexpr = 0 if cfg.split_rows else CID * PARTS
    sums = ()
    for _ in gl.static_range(PARTS):
        sums = sums + (gl.full([64, cfg.part_columns], 0.0, gl.float32, LAYOUT),)
    zero = gl.full([64, cfg.part_columns], 0.0, gl.float32, LAYOUT)
    for n in range(done, end):
        rows.wait(n)
        x = rows.part(n, CID if cfg.split_rows else 0)
        factors = ()
        if cfg.scale_rows > 0:
            factors = factors_here(rings.beside, rows.stage(n), cfg.row_share * CID, FIRST, LAYOUT, cfg)
        newer = ()
        for i in gl.static_range(PARTS - 1):
            value = _product(x, weights, n, FIRST + i, zero, turns, cfg)
            value = warpgroup_mma_wait(0, deps=[value])
            if cfg.scale_rows > 0:
                value = value * (factors[0] * factors[i + 1])[:, None]
            newer = newer + (sums[i] + value,)
            # Passes at once. Its loop ends a basic block, which keeps the compiler from computing two parts' sums at
            # once: their registers would spill.
            rows.wait(n)
        value = _product(x, weights, n, FIRST + PARTS - 1, zero, turns, cfg)
        if cfg.scale_rows > 0:
            factor = factors[0] * factors[PARTS]
        value = warpgroup_mma_wait(0, deps=[value])
        rows.release(n)
        if cfg.scale_rows > 0:
            value = value * factor[:, None]
        sums = newer + (sums[PARTS - 1] + value,)
    return sums


@jit
def _pass(rows, turns, begin, end, cfg: gl.constexpr):
    """Tiles of which this warpgroup needs nothing: hand the stages back, and the turns on."""
    PARTS: gl.constexpr = cfg.subtiles
    for n in range(begin, end):
        rows.wait(n)
        if cfg.turns:
            for _ in gl.static_range(PARTS):
                turns.take()
                turns.give()
        rows.release(n)


@jit
def _write_sums(sums, staging, o_desc, target, finish, groups, place, counts, cfg: gl.constexpr):
    group, row, left, column = place
    if cfg.gated:
        value = finished(sums[0], sums[1], finish, groups, place, counts, cfg).to(o_desc.dtype)
        put(value, staging, o_desc, target, row, left, column, counts, True)
    else:
        PARTS: gl.constexpr = cfg.subtiles
        for i in gl.static_range(PARTS):
            at = (group, row, left, column + i * cfg.part_columns)
            value = finished(sums[i], None, finish, groups, at, counts, cfg).to(o_desc.dtype)
            put(value, staging, o_desc, target, row, left, at[3], counts, True)


@jit
def scaled_consumer(o_desc, rings, staging, target, finish, groups, counts, CID: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup's share of every tile."""
    rows = rings.rows
    ROW: gl.constexpr = cfg.row_share * CID
    COLUMN: gl.constexpr = cfg.column_share * CID
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    turns = Turns(FIRST_BARRIER + cfg.stages, CID, cfg.consumers)
    if cfg.turns:
        turns.begin()
    rows.wait(done)
    group, first, rest, column_tile = told(rings.tiles, rows.stage(done), CONSUMER_WARPS)
    while group >= 0:
        place = (group, first + ROW, rest - ROW, column_tile * cfg.out_columns + COLUMN)
        end = done + steps
        if ROW > 0:
            # The group may have ended among the rows of the warpgroups before this one.
            end = gl.where(rest > ROW, end, done)
        sums = _share(rings, turns, done, end, CID, cfg)
        if ROW > 0:
            _pass(rows, turns, end, done + steps, cfg)
        if rest > ROW:
            _write_sums(sums, staging, o_desc, target, finish, groups, place, counts, cfg)
        done += steps
        rows.wait(done)
        group, first, rest, column_tile = told(rings.tiles, rows.stage(done), CONSUMER_WARPS)
    if cfg.turns:
        turns.end()
    tma_store_wait(0)
