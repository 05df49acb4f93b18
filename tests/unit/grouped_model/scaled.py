"""As `scaled.py` of the kernel."""

from __future__ import annotations

from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig, Shape
from tests.unit.grouped_model.epilogue import put
from tests.unit.grouped_model.memory import FIRST_BARRIER, Operand, Place, Rings, Staging
from tests.unit.grouped_model.scales import factors_here
from tests.unit.grouped_model.schedule import told
from tests.unit.hopper_model import Steps, tma_store_wait, warpgroup_mma, warpgroup_mma_wait
from tests.unit.test_channels import Ring, Turns


def _product(x: Operand, weights: Ring, n: int, PART: int, turns: Turns, cfg: GemmConfig) -> Steps:
    if cfg.turns:
        yield from turns.take()
    yield warpgroup_mma(x, (weights.part(n, PART), ("W", *x[1][1:])))
    if cfg.turns:
        yield from turns.give()


def _share(rings: Rings, turns: Turns, done: int, end: int, group: int, CID: int, cfg: GemmConfig) -> Steps:
    rows, weights = rings.rows, rings.weights
    PARTS = cfg.subtiles
    FIRST = 0 if cfg.split_rows else CID * PARTS
    for n in range(done, end):
        yield from rows.wait(n)
        at = (group, n - done)
        x = (rows.part(n, CID if cfg.split_rows else 0), ("X", *at))
        if cfg.scale_rows > 0:
            yield from factors_here(rings.beside, rows.stage(n), cfg.row_share * CID, FIRST, at, PARTS)
        for i in range(PARTS - 1):
            yield from _product(x, weights, n, FIRST + i, turns, cfg)
            yield warpgroup_mma_wait(0)
            yield from rows.wait(n)
        yield from _product(x, weights, n, FIRST + PARTS - 1, turns, cfg)
        yield warpgroup_mma_wait(0)
        yield from rows.release(n)


def _pass(rows: Ring, turns: Turns, begin: int, end: int, cfg: GemmConfig) -> Steps:
    PARTS = cfg.subtiles
    for n in range(begin, end):
        yield from rows.wait(n)
        if cfg.turns:
            for _ in range(PARTS):
                yield from turns.take()
                yield from turns.give()
        yield from rows.release(n)


def _write_sums(staging: Staging, place: Place, cfg: GemmConfig) -> Steps:
    if cfg.gated:
        yield from put(staging, place, True)
    else:
        PARTS = cfg.subtiles
        for i in range(PARTS):
            yield from put(staging, place._replace(column=place.column + i * cfg.part_columns), True)


def scaled_consumer(rings: Rings, staging: Staging, counts: Shape, CID: int, cfg: GemmConfig) -> Steps:
    rows = rings.rows
    ROW = cfg.row_share * CID
    COLUMN = cfg.column_share * CID
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    turns = Turns(FIRST_BARRIER + cfg.stages, CID, cfg.consumers)
    if cfg.turns:
        yield from turns.begin()
    yield from rows.wait(done)
    group, first, rest, column_tile = yield from told(rings.tiles, rows.stage(done))
    while group >= 0:
        place = Place(group, first + ROW, rest - ROW, column_tile * cfg.out_columns + COLUMN)
        end = done + steps
        if ROW > 0:
            end = end if rest > ROW else done
        yield from _share(rings, turns, done, end, group, CID, cfg)
        if ROW > 0:
            yield from _pass(rows, turns, end, done + steps, cfg)
        if rest > ROW:
            yield from _write_sums(staging, place, cfg)
        done += steps
        yield from rows.wait(done)
        group, first, rest, column_tile = yield from told(rings.tiles, rows.stage(done))
    if cfg.turns:
        yield from turns.end()
    yield tma_store_wait(0)
