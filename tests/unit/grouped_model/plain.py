"""As `plain.py` of the kernel."""

from __future__ import annotations

from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig, Shape
from tests.unit.grouped_model.epilogue import write
from tests.unit.grouped_model.memory import Place, Rings, Staging, Sums
from tests.unit.grouped_model.packed import multiply_packed
from tests.unit.grouped_model.schedule import takes_tail, told
from tests.unit.hopper_model import Part, Steps, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from tests.unit.test_channels import Ring


def _product(rings: Rings, n: int, at: tuple[int, int], CID: int, TAIL: bool, cfg: GemmConfig) -> Steps:
    rows, weights = rings.rows, rings.weights
    x = rows.part(n, CID if cfg.split_rows else 0)
    w = weights.part(n, 0 if cfg.split_rows else CID)
    yield warpgroup_mma((w, ("W", *at)), (x, ("X", *at)))
    if TAIL:
        HALF = cfg.part_columns // 2
        mine = w.slice(CID * HALF, HALF)
        tail = Part([rings.beside.index(rows.stage(n))])
        yield warpgroup_mma((mine, ("W", *at)), (tail, ("T", *at)))
        yield warpgroup_mma_wait(2)
    else:
        yield warpgroup_mma_wait(1)


def skip(rows: Ring, begin: int, end: int) -> Steps:
    for n in range(begin, end):
        yield from rows.wait(n)
        yield from rows.release(n)


def _multiply(rings: Rings, staging: Staging, counts: Shape, done: int, place: Place, CID: int, TAIL: bool,
              cfg: GemmConfig) -> Steps:  # fmt: skip
    rows = rings.rows
    COLUMNS = cfg.block_m if cfg.weights_first else cfg.part_columns
    end = done + (counts.depth + cfg.block_k - 1) // cfg.block_k
    yield from rows.wait(done)
    yield from _product(rings, done, (place.group, 0), CID, TAIL, cfg)
    for n in range(done + 1, end):
        yield from rows.wait(n)
        yield from _product(rings, n, (place.group, n - done), CID, TAIL, cfg)
        yield from rows.release(n - 1)
    if TAIL:
        yield warpgroup_mma_wait(0)
    else:
        yield warpgroup_mma_wait(0)
    yield from rows.release(end - 1)
    acc = Sums((COLUMNS, 64) if cfg.weights_first else (64, COLUMNS))
    yield from write(acc, staging, place, True, cfg)
    if TAIL:
        group, row, left, column = place
        below = cfg.block_m - cfg.row_share * CID
        place = Place(group, row + below, left - below, column + cfg.out_columns // 2 * CID)
        half = staging.slice(0, cfg.tail)
        yield from write(Sums((cfg.tail, cfg.part_columns // 2)), half, place, False, cfg)


def _one_tile(rings: Rings, staging: Staging, counts: Shape, done: int, place: Place, rest: int, CID: int,
              cfg: GemmConfig) -> Steps:  # fmt: skip
    if cfg.scale_block > 0:
        yield from multiply_packed(rings, staging, counts, done, place, CID, cfg)
    elif cfg.tail > 0:
        if takes_tail(rest, cfg):
            yield from _multiply(rings, staging, counts, done, place, CID, True, cfg)
        else:
            yield from _multiply(rings, staging, counts, done, place, CID, False, cfg)
    else:
        yield from _multiply(rings, staging, counts, done, place, CID, False, cfg)


def plain_consumer(rings: Rings, staging: Staging, counts: Shape, CID: int, cfg: GemmConfig) -> Steps:
    rows = rings.rows
    ROW = cfg.row_share * CID
    COLUMN = cfg.column_share * CID
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    yield from rows.wait(done)
    group, first, rest, column_tile = yield from told(rings.tiles, rows.stage(done))
    while group >= 0:
        place = Place(group, first + ROW, rest - ROW, column_tile * cfg.out_columns + COLUMN)
        if rest <= ROW:
            yield from skip(rows, done, done + steps)
        else:
            yield from _one_tile(rings, staging, counts, done, place, rest, CID, cfg)
        done += steps
        yield from rows.wait(done)
        group, first, rest, column_tile = yield from told(rings.tiles, rows.stage(done))
    yield tma_store_wait(0)
