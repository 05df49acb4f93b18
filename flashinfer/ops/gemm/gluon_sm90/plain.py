"""Tiles whose sums stay in the tensor cores' accumulators from the first product to the last."""

from __future__ import annotations

from flashinfer.device.gluon import gl, jit, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from flashinfer.ops.gemm.gluon_sm90.epilogue import accumulator_layout, finished, halves, put
from flashinfer.ops.gemm.gluon_sm90.schedule import nth_tile, rounds

CONSUMER_WARPS = gl.constexpr(4)


@jit
def product(rings, n, acc, CID: gl.constexpr, FIRST: gl.constexpr, cfg: gl.constexpr):
    """Issue the product of tile n of the rings into `acc`."""
    rows, weights = rings[0], rings[1]
    x = rows.part(n, CID if cfg.split_rows else 0)
    w = weights.part(n, 0 if cfg.split_rows else CID)
    if cfg.weights_first:
        left = w.permute((1, 0)) if cfg.n_major else w
        right = x.permute((1, 0))
    else:
        left = x
        right = w if cfg.n_major else w.permute((1, 0))
    return warpgroup_mma(left, right, acc, use_acc=not FIRST, is_async=True)


@jit
def skip(rows, begin, end):
    """Tiles of which this warpgroup needs nothing: only hand the stages back."""
    for n in range(begin, end):
        rows.wait(n)
        rows.release(n)


@jit
def _write(acc, staging, o_desc, target, finish, groups, place, counts, cfg: gl.constexpr):
    group, row, left, column = place
    x = acc
    if cfg.weights_first:
        x = acc.permute((1, 0))
    if cfg.gated:
        up, gate = halves(x, cfg.gate_block)
        value = finished(up, gate, finish, groups, place, counts, cfg).to(o_desc.dtype)
        put(value, staging, o_desc, target, row, left, column, counts)
    elif x.shape[1] == cfg.out_part:
        value = finished(x, None, finish, groups, place, counts, cfg).to(o_desc.dtype)
        put(value, staging, o_desc, target, row, left, column, counts)
    else:
        # One after the other: what is done to all sums at once takes more registers than there are.
        LAYOUT: gl.constexpr = accumulator_layout(cfg.out_part, cfg.bits)
        parts = halves(x, cfg.out_part)
        for i in gl.static_range(2):
            at = (group, row, left, column + i * cfg.out_part)
            part = gl.convert_layout(parts[i], LAYOUT)
            value = finished(part, None, finish, groups, at, counts, cfg).to(o_desc.dtype)
            put(value, staging, o_desc, target, row, left, at[3], counts)


@jit
def _multiply(rings, staging, o_desc, target, finish, groups, counts, done, t, place, CID: gl.constexpr,
              cfg: gl.constexpr):  # fmt: skip
    """A warpgroup's share of a tile, from its products to the output; returns the next tile."""
    rows = rings[0]
    COLUMNS: gl.constexpr = cfg.block_m if cfg.weights_first else cfg.part_columns
    zero = gl.full([64, COLUMNS], 0.0, gl.float32, accumulator_layout(COLUMNS, cfg.bits))
    end = done + (counts.depth + cfg.block_k - 1) // cfg.block_k
    rows.wait(done)
    acc = product(rings, done, zero, CID, True, cfg)
    # Waits for nothing: it gives the compiler a value of one kind before the loop and in it.
    acc = warpgroup_mma_wait(1, deps=[acc])
    for n in range(done + 1, end):
        rows.wait(n)
        acc = product(rings, n, acc, CID, False, cfg)
        acc = warpgroup_mma_wait(1, deps=[acc])
        rows.release(n - 1)
    # The search for the next tile runs beside the last product.
    tile = nth_tile(groups, counts, t + 1, CONSUMER_WARPS, cfg)
    acc = warpgroup_mma_wait(0, deps=[acc])
    rows.release(end - 1)
    _write(acc, staging, o_desc, target, finish, groups, place, counts, cfg)
    return tile


@jit
def plain_consumer(o_desc, rings, staging, target, finish, groups, counts, CID: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup's share of every tile."""
    rows = rings[0]
    ROW: gl.constexpr = cfg.row_share * CID
    COLUMN: gl.constexpr = cfg.column_share * CID
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    tile = nth_tile(groups, counts, 0, CONSUMER_WARPS, cfg)
    done = 0
    for t in range(0, rounds(groups, counts, CONSUMER_WARPS, cfg)):
        group, first, rest, column_tile = tile
        place = (group, first + ROW, rest - ROW, column_tile * cfg.out_columns + COLUMN)
        if ROW == 0:
            tile = _multiply(rings, staging, o_desc, target, finish, groups, counts, done, t, place, CID, cfg)
        # The group may have ended among the rows of the warpgroups before this one.
        elif rest > ROW:
            tile = _multiply(rings, staging, o_desc, target, finish, groups, counts, done, t, place, CID, cfg)
        else:
            skip(rows, done, done + steps)
            tile = nth_tile(groups, counts, t + 1, CONSUMER_WARPS, cfg)
        done += steps
    tma_store_wait(0)
