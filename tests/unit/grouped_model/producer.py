"""As `producer.py` of the kernel. Tiles are (what, group, step of K)."""

from __future__ import annotations

from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig, Shape
from tests.unit.grouped_model.memory import Rings
from tests.unit.grouped_model.scales import copy_scales
from tests.unit.grouped_model.schedule import Groups, place_after, takes_tail, tell, tile_at
from tests.unit.hopper_model import Part, Steps, copy_load, tma_load
from tests.unit.test_channels import Ring


def _load_weights(w_desc: str, weights: Ring, n: int, group: int, k: int) -> Steps:
    BOXES = weights.BOXES
    for i in range(BOXES):
        yield tma_load((w_desc, group, k), weights.landing(n), weights.box(n, i))


def _load_rows(x_desc: str, rings: Rings, n: int, group: int, left: int, k: int, cfg: GemmConfig) -> Steps:
    rows, weights = rings.rows, rings.weights
    if cfg.tail > 0:
        if takes_tail(left, cfg):
            yield from rows.expect(n, weights.BYTES + cfg.tail_bytes)
            yield tma_load(("T", group, k), rows.landing(n), rings.beside.index(rows.stage(n)))
        else:
            yield from rows.expect(n, weights.BYTES)
    else:
        yield from rows.expect(n, weights.BYTES)
    for i in range(rows.BOXES):
        yield tma_load((x_desc, group, k), rows.landing(n), rows.box(n, i))


def _end(rings: Rings, done: int, cfg: GemmConfig) -> Steps:
    rows = rings.rows
    yield from rows.acquire(done)
    yield from tell(rings.tiles, rows.stage(done), -1, 0, 0, 0)
    yield from rows.expect_nothing(done)
    if cfg.gathered or cfg.scale_rows > 0:
        yield from rows.deliver(done)
    yield from rows.drain(done, 1)


def _tma_producer(rings: Rings, groups: Groups, counts: Shape, cfg: GemmConfig) -> Steps:
    x_desc, w_desc = "X", "W"
    rows, weights = rings.rows, rings.weights
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    place = groups.program
    exists, group, row, left, column_tile = tile_at(groups, counts, place)
    while exists:
        place = place_after(groups, place)
        for k in range(0, steps):
            n = done + k
            yield from rows.acquire(n)
            if k == 0:
                yield from tell(rings.tiles, rows.stage(n), group, row, left, column_tile)
            yield from _load_rows(x_desc, rings, n, group, left, k, cfg)
            yield from _load_weights(w_desc, weights, n, group, k)
            if cfg.scale_rows > 0:
                yield from copy_scales(rings.beside, rows.stage(n), (group, k))
                yield from rows.deliver(n)
        done += steps
        exists, group, row, left, column_tile = tile_at(groups, counts, place)
    yield from _end(rings, done, cfg)


def _copying_producer(rings: Rings, groups: Groups, counts: Shape, cfg: GemmConfig) -> Steps:
    """One warp of it."""
    w_desc = "W"
    rows, weights = rings.rows, rings.weights
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    place = groups.program
    exists, group, row, left, column_tile = tile_at(groups, counts, place)
    while exists:
        place = place_after(groups, place)
        for k in range(0, steps):
            n = done + k
            yield from rows.acquire(n)
            if k == 0:
                yield from tell(rings.tiles, rows.stage(n), group, row, left, column_tile)
            yield from weights.expect(n)
            yield from _load_weights(w_desc, weights, n, group, k)
            yield copy_load(Part([rows.box(n, 0)]), ("X", group, k))
            if cfg.tail > 0:  # noqa: SIM102
                if takes_tail(left, cfg):
                    yield copy_load(Part([rings.beside.index(rows.stage(n))]), ("T", group, k))
            yield from rows.deliver(n)
        done += steps
        exists, group, row, left, column_tile = tile_at(groups, counts, place)
    yield from _end(rings, done, cfg)
