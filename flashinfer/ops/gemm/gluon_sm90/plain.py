"""Tiles whose sums stay in the tensor cores' accumulators from the first product to the last."""

from __future__ import annotations

from flashinfer.device.gluon import gl, jit, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from flashinfer.ops.gemm.gluon_sm90.epilogue import accumulator_layout, put
from flashinfer.ops.gemm.gluon_sm90.schedule import find_tile, rounds

CONSUMER_WARPS = gl.constexpr(4)


@jit
def product(rings, n, acc, CID: gl.constexpr, FIRST: gl.constexpr, cfg: gl.constexpr):
    """Issue the product of tile n of the rings into `acc`."""
    rows, weights = rings
    x = rows.part(n, CID if cfg.split_rows else 0)
    w = weights.part(n, 0 if cfg.split_rows else CID)
    if cfg.weights_first:
        left = w.permute((1, 0)) if cfg.n_major else w
        return warpgroup_mma(left, x.permute((1, 0)), acc, use_acc=not FIRST, is_async=True)
    else:
        right = w if cfg.n_major else w.permute((1, 0))
        return warpgroup_mma(x, right, acc, use_acc=not FIRST, is_async=True)


@jit
def skip(rows, begin, end):
    """Tiles of which this warpgroup needs nothing: only hand the stages back."""
    for n in range(begin, end):
        rows.wait(n)
        rows.release(n)


@jit
def _write(acc, staging, o_desc, output, row, left, column, counts, cfg: gl.constexpr):
    value = acc.to(o_desc.dtype)
    if cfg.weights_first:
        put(value.permute((1, 0)), staging, o_desc, output, row, left, column, counts)
    else:
        PARTS: gl.constexpr = value.shape[1] // cfg.out_part
        if PARTS == 1:
            put(value, staging, o_desc, output, row, left, column, counts)
        else:
            LAYOUT: gl.constexpr = accumulator_layout(cfg.out_part, 16)
            gl.static_assert(PARTS == 2)
            parts = value.reshape([value.shape[0], PARTS, cfg.out_part]).permute((0, 2, 1)).split()
            for i in gl.static_range(PARTS):
                part = gl.convert_layout(parts[i], LAYOUT)
                put(part, staging, o_desc, output, row, left, column + i * cfg.out_part, counts)


@jit
def _multiply(rings, staging, o_desc, output, groups, counts, done, t, place, CID: gl.constexpr, cfg: gl.constexpr):
    """A warpgroup's share of a tile, from its products to the output; returns the next tile."""
    row, left, column = place
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
    tile = find_tile(groups, counts, t + 1, CONSUMER_WARPS, cfg)
    acc = warpgroup_mma_wait(0, deps=[acc])
    rows.release(end - 1)
    _write(acc, staging, o_desc, output, row, left, column, counts, cfg)
    return tile


@jit
def plain_consumer(o_desc, rings, staging, output, groups, counts, CID: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup's share of every tile, the sums in the tensor cores' own precision."""
    rows = rings[0]
    ROW: gl.constexpr = CID * cfg.out_rows if cfg.split_rows else 0
    COLUMN: gl.constexpr = 0 if cfg.split_rows else CID * cfg.part_columns
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    tile = find_tile(groups, counts, 0, CONSUMER_WARPS, cfg)
    done = 0
    for t in range(0, rounds(groups, counts, CONSUMER_WARPS, cfg)):
        first, rest, column_tile = tile[1], tile[2], tile[3]
        place = (first + ROW, rest - ROW, column_tile * cfg.block_n + COLUMN)
        if ROW == 0:
            tile = _multiply(rings, staging, o_desc, output, groups, counts, done, t, place, CID, cfg)
        else:
            # The group may have ended among the rows of the warpgroups before this one.
            if rest > ROW:
                tile = _multiply(rings, staging, o_desc, output, groups, counts, done, t, place, CID, cfg)
            else:
                skip(rows, done, done + steps)
                tile = find_tile(groups, counts, t + 1, CONSUMER_WARPS, cfg)
        done += steps
    tma_store_wait(0)
