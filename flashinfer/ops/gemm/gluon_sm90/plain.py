"""Tiles whose sums stay in the tensor cores' accumulators from the first product to the last."""

from __future__ import annotations

from flashinfer.device.gluon import gl, jit, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from flashinfer.ops.gemm.gluon_sm90.epilogue import accumulator_layout, finished, halves, put
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
def _write(x, staging, o_desc, target, finish, groups, place, counts, BOX: gl.constexpr, cfg: gl.constexpr):
    """Sums `[rows, columns]` to the output, from `place` on. BOX: rows are as many as TMA stores at once."""
    group, row, left, column = place
    # One part after the other: what is done to all sums at once takes more registers than there are.
    WIDTH: gl.constexpr = cfg.out_part * (2 if cfg.gated else 1)
    PARTS: gl.constexpr = x.shape[1] // WIDTH
    parts = (x,)
    if PARTS == 2:
        parts = halves(x, WIDTH)
    if PARTS == 4:
        first, second = halves(x, 2 * WIDTH)
        parts = halves(first, WIDTH) + halves(second, WIDTH)
    for i in gl.static_range(PARTS):
        at = (group, row, left, column + i * cfg.out_part)
        if cfg.gated:
            up, gate = halves(parts[i], cfg.gate_block)
        else:
            up, gate = parts[i], None
        value = finished(up, gate, finish, groups, at, counts, cfg).to(o_desc.dtype)
        put(value, staging, o_desc, target, row, left, at[3], counts, BOX)


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
    _write(acc, staging, o_desc, target, finish, groups, place, counts, True, cfg)
    if TAIL:
        group, row, left, column = place
        below = cfg.block_m - cfg.row_share * CID
        place = (group, row + below, left - below, column + cfg.out_columns // 2 * CID)
        half = staging.slice(0, cfg.tail)
        _write(sums[1].permute((1, 0)), half, o_desc, target, finish, groups, place, counts, False, cfg)


@jit
def _share(rings, staging, o_desc, target, finish, groups, counts, done, place, rest, CID: gl.constexpr,
           cfg: gl.constexpr):  # fmt: skip
    """A warpgroup's share of a tile, with its tail or without one. rest: rows of the group from the tile's first on."""
    if cfg.tail > 0:
        if takes_tail(rest, cfg):
            _multiply(rings, staging, o_desc, target, finish, groups, counts, done, place, CID, True, cfg)
        else:
            _multiply(rings, staging, o_desc, target, finish, groups, counts, done, place, CID, False, cfg)
    else:
        _multiply(rings, staging, o_desc, target, finish, groups, counts, done, place, CID, False, cfg)


@jit
def plain_consumer(o_desc, rings, staging, target, finish, groups, counts, CID: gl.constexpr, cfg: gl.constexpr):
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
            _share(rings, staging, o_desc, target, finish, groups, counts, done, place, rest, CID, cfg)
        done += steps
        rows.wait(done)
        group, first, rest, column_tile = told(rings.tiles, rows.stage(done), CONSUMER_WARPS)
    tma_store_wait(0)
