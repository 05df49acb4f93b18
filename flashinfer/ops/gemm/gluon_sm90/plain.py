"""Tiles whose sums stay in the tensor cores' accumulators from the first product to the last."""

from __future__ import annotations

from flashinfer.device.gluon import gl, jit, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from flashinfer.ops.gemm.gluon_sm90.epilogue import accumulator_layout, write
from flashinfer.ops.gemm.gluon_sm90.packed import multiply_packed
from flashinfer.ops.gemm.gluon_sm90.schedule import takes_tail, told

CONSUMER_WARPS = gl.constexpr(4)


@jit
def _product(rings, n, sums, CID: gl.constexpr, FIRST: gl.constexpr, TAIL: gl.constexpr, cfg: gl.constexpr):
    """Issue the products of tile n of the rings into `sums`: of the tile's rows, and of its tail with half the weights,
    which are that product's rows; and wait for those of tile n - 1."""
    rows, weights = rings.rows, rings.weights
    x = rows.part(n, CID if cfg.split_rows else 0)
    w = weights.part(n, 0 if cfg.split_rows else CID)
    if cfg.weights_first:
        left = w.permute((1, 0)) if cfg.n_major else w
        right = x.permute((1, 0))
    else:
        left = x
        right = w if cfg.n_major else w.permute((1, 0))
    acc = warpgroup_mma(left, right, sums[0], use_acc=not FIRST, is_async=True)
    if TAIL:
        HALF: gl.constexpr = cfg.part_columns // 2
        mine = w.slice(CID * HALF, HALF)
        tail = rings.beside.index(rows.stage(n)).permute((1, 0))
        tail_acc = warpgroup_mma(mine, tail, sums[1], use_acc=not FIRST, is_async=True)
        return warpgroup_mma_wait(2, deps=[acc, tail_acc])
    else:
        return (warpgroup_mma_wait(1, deps=[acc]),)


@jit
def skip(rows, begin, end):
    """Tiles of which this warpgroup needs nothing: only hand the stages back."""
    for n in range(begin, end):
        rows.wait(n)
        rows.release(n)


@jit
def _multiply(rings, staging, o_desc, target, finish, groups, counts, done, place, CID: gl.constexpr,
              TAIL: gl.constexpr, cfg: gl.constexpr):  # fmt: skip
    """A warpgroup's share of a tile, from its products to the output."""
    rows = rings.rows
    COLUMNS: gl.constexpr = cfg.block_m if cfg.weights_first else cfg.part_columns
    sums = (gl.full([64, COLUMNS], 0.0, gl.float32, accumulator_layout(COLUMNS, cfg.bits)),)
    if TAIL:
        HALF: gl.constexpr = cfg.part_columns // 2
        sums = sums + (gl.full([HALF, cfg.tail], 0.0, gl.float32, accumulator_layout(cfg.tail, cfg.bits)),)
    end = done + (counts.depth + cfg.block_k - 1) // cfg.block_k
    rows.wait(done)
    # Its wait waits for nothing: it gives the compiler values of one kind before the loop and in it.
    sums = _product(rings, done, sums, CID, True, TAIL, cfg)
    for n in range(done + 1, end):
        rows.wait(n)
        sums = _product(rings, n, sums, CID, False, TAIL, cfg)
        rows.release(n - 1)
    if TAIL:
        sums = warpgroup_mma_wait(0, deps=[sums[0], sums[1]])
    else:
        sums = (warpgroup_mma_wait(0, deps=[sums[0]]),)
    rows.release(end - 1)
    acc = sums[0].permute((1, 0)) if cfg.weights_first else sums[0]
    write(acc, staging, o_desc, target, finish, groups, place, counts, True, cfg)
    if TAIL:
        group, row, left, column = place
        below = cfg.block_m - cfg.row_share * CID
        place = (group, row + below, left - below, column + cfg.out_columns // 2 * CID)
        half = staging.slice(0, cfg.tail)
        write(sums[1].permute((1, 0)), half, o_desc, target, finish, groups, place, counts, False, cfg)


@jit
def _one_tile(rings, staging, o_desc, target, finish, groups, counts, scales, done, place, rest, CID: gl.constexpr,
              cfg: gl.constexpr):  # fmt: skip
    """A warpgroup's share of a tile, with its tail or without one. rest: rows of the group from the tile's first on."""
    if cfg.scale_block > 0:
        multiply_packed(rings, staging, o_desc, target, finish, groups, counts, scales, done, place, CID, cfg)
    elif cfg.tail > 0:
        if takes_tail(rest, cfg):
            _multiply(rings, staging, o_desc, target, finish, groups, counts, done, place, CID, True, cfg)
        else:
            _multiply(rings, staging, o_desc, target, finish, groups, counts, done, place, CID, False, cfg)
    else:
        _multiply(rings, staging, o_desc, target, finish, groups, counts, done, place, CID, False, cfg)


@jit
def plain_consumer(o_desc, rings, staging, target, finish, groups, counts, scales, CID: gl.constexpr,
                   cfg: gl.constexpr):  # fmt: skip
    """One warpgroup's share of every tile."""
    rows = rings.rows
    ROW: gl.constexpr = cfg.row_share * CID
    COLUMN: gl.constexpr = cfg.column_share * CID
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    rows.wait(done)
    group, first, rest, column_tile = told(rings.tiles, rows.stage(done), CONSUMER_WARPS)
    while group >= 0:
        place = (group, first + ROW, rest - ROW, column_tile * cfg.out_columns + COLUMN)
        # The group may have ended among the rows of the warpgroups before this one.
        if rest <= ROW:
            skip(rows, done, done + steps)
        else:
            _one_tile(rings, staging, o_desc, target, finish, groups, counts, scales, done, place, rest, CID, cfg)
        done += steps
        rows.wait(done)
        group, first, rest, column_tile = told(rings.tiles, rows.stage(done), CONSUMER_WARPS)
    tma_store_wait(0)
