"""The barriers of the grouped products under random schedules, by the model of `test_channels`.

The functions mirror the kernel in `ops/gemm/gluon_sm90`, name by name, less the arithmetic.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit import test_channels
from tests.unit.hopper_model import (
    Box,
    Gpu,
    Operation,
    Part,
    Steps,
    Tile,
    assert_found,
    check,
    copy_load,
    fence_async_shared,
    mbarrier,
    partition_barrier,
    plain_store,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tests.unit.outline import outline
from tests.unit.test_channels import (
    Barriers,
    Ring,
    Turns,
    deliver_at_once,
    give_twice,
    no_steps,
    no_wait,
    wait_for_the_other_phase,
)

FIRST_BARRIER, PRODUCER_THREADS, COPYING_THREADS = 6, 32, 128
# Of an mbarrier of tiles whose rows or scales are copied: the announcement of TMA's bytes, and the copying warps.
ARRIVALS = 2


class Config(NamedTuple):
    """As `GemmConfig`, of small tiles. steps: tiles of K; out_parts: stores of a warpgroup's tile."""

    stages: int = 4
    consumers: int = 2
    split_rows: bool = True
    scaled: bool = False
    gated: bool = False
    subtiles: int = 1
    out_parts: int = 1
    steps: int = 3
    block_m: int = 8
    out_part: int = 1
    scale_rows: int = 0
    gathered: bool = False
    turns: bool = False

    @property
    def row_share(self) -> int:
        return self.block_m // self.consumers if self.split_rows else 0

    @property
    def out_rows(self) -> int:
        return self.row_share or self.block_m


class Sums(NamedTuple):
    """Columns are counted in those of a store."""

    shape: tuple[int, int]


class Place(NamedTuple):
    """A warpgroup's share of a tile: its number among the program's, the rows of the group left, the warpgroup."""

    t: int
    left: int
    CID: int


class Scale(Box):
    """A value of each row, or of a part of the weights, that threads copy and threads read, at once."""

    def slice(self, begin: int, rows: int) -> Scale:
        return self

    def load(self, tile: Tile) -> Operation:
        return lambda gpu, me: check(self.holds == tile, f"{me.name} reads {self.holds} and means {tile}")


class Scales(Ring):
    """Memory that comes and goes with a ring's tiles."""

    def __init__(self, beside: Ring, per_stage: int) -> None:
        super().__init__(beside.STAGES, per_stage, per_stage, beside.EMPTY, 0, False, beside=beside)
        self.boxes = [Scale() for _ in self.boxes]

    def index(self, i: int) -> Scale:
        box = self.boxes[i]
        assert isinstance(box, Scale)
        return box


Rings = tuple[Ring, Ring, tuple[Scales, Scales]]


def _load_weights(w_desc: str, weights: Ring, n: int, place: tuple[int, int]) -> Steps:
    BOXES = weights.BOXES
    for i in range(BOXES):
        yield tma_load((w_desc, *place), weights.landing(n), weights.box(n, i))


def copy_scales(tiles: tuple[Scales, Scales], stage: int, place: tuple[int, int]) -> Steps:
    of_rows, of_parts = tiles
    PARTS = of_parts.PARTS
    yield copy_load(Part([of_rows.index(stage)]), ("SX", *place))
    for i in range(PARTS):
        yield copy_load(Part([of_parts.index(stage * PARTS + i)]), (f"SW{i}", *place))


def _tma_producer(rings: Rings, tiles: list[int], cfg: Config) -> Steps:
    x_desc, w_desc = "X", "W"
    rows, weights = rings[0], rings[1]
    steps = cfg.steps
    done = 0
    for t in range(0, len(tiles)):
        for k in range(0, steps):
            n = done + k
            yield from rows.acquire(n)
            yield from rows.expect(n, weights.BYTES)
            yield from _load_weights(w_desc, weights, n, (t, k))
            yield tma_load((x_desc, t, k), rows.landing(n), rows.box(n, 0))
            if cfg.scale_rows > 0:
                yield from copy_scales(rings[2], rows.stage(n), (t, k))
                yield from rows.deliver(n)
        done += steps
    yield from rows.drain(done)


def _copying_producer(rings: Rings, tiles: list[int], cfg: Config) -> Steps:
    w_desc = "W"
    rows, weights = rings[0], rings[1]
    steps = cfg.steps
    done = 0
    for t in range(0, len(tiles)):
        for k in range(0, steps):
            n = done + k
            yield from rows.acquire(n)
            yield from weights.expect(n)
            yield from _load_weights(w_desc, weights, n, (t, k))
            yield copy_load(Part([rows.box(n, 0)]), ("X", t, k))
            yield from rows.deliver(n)
        done += steps
    yield from rows.drain(done)


def product(rings: Rings, n: int, place: tuple[int, int], CID: int, cfg: Config) -> Steps:
    rows, weights = rings[0], rings[1]
    x = rows.part(n, CID if cfg.split_rows else 0)
    w = weights.part(n, 0 if cfg.split_rows else CID)
    yield warpgroup_mma((x, ("X", *place)), (w, ("W", *place)))


def skip(rows: Ring, begin: int, end: int) -> Steps:
    for n in range(begin, end):
        yield from rows.wait(n)
        yield from rows.release(n)


class Staging(Box):
    """Threads read back what threads wrote, at once: that takes no fence."""

    def load(self, tile: Tile) -> Operation:
        return lambda gpu, me: check(self.holds == tile, f"{me.name} reads {self.holds} and means {tile}")


def put(value: Tile, staging: Staging, left: int, cfg: Config) -> Steps:
    ROWS = cfg.out_rows
    yield tma_store_wait(0)
    yield partition_barrier()
    yield staging.store(value)
    if left >= ROWS:
        yield fence_async_shared()
        yield tma_store(value, staging)
    else:
        yield staging.load(value)
        yield plain_store(value, 1)


def output(place: Place, i: int) -> Tile:
    return f"O{i}", place.t, place.CID


def _write(staging: Staging, place: Place, cfg: Config) -> Steps:
    x = Sums((64, cfg.out_parts))
    if cfg.gated:  # noqa: SIM114
        yield from put(output(place, 0), staging, place.left, cfg)
    elif x.shape[1] == cfg.out_part:
        yield from put(output(place, 0), staging, place.left, cfg)
    else:
        for i in range(2):
            yield from put(output(place, i), staging, place.left, cfg)


def _multiply(rings: Rings, staging: Staging, done: int, place: Place, cfg: Config) -> Steps:
    rows, t, CID = rings[0], place.t, place.CID
    end = done + cfg.steps
    yield from rows.wait(done)
    yield from product(rings, done, (t, 0), CID, cfg)
    yield warpgroup_mma_wait(1)
    for n in range(done + 1, end):
        yield from rows.wait(n)
        yield from product(rings, n, (t, n - done), CID, cfg)
        yield warpgroup_mma_wait(1)
        yield from rows.release(n - 1)
    yield warpgroup_mma_wait(0)
    yield from rows.release(end - 1)
    yield from _write(staging, place, cfg)


def plain_consumer(rings: Rings, staging: Staging, tiles: list[int], CID: int, cfg: Config) -> Steps:
    rows = rings[0]
    ROW = cfg.row_share * CID
    steps = cfg.steps
    done = 0
    for t in range(0, len(tiles)):
        rest = tiles[t]
        place = Place(t, rest - ROW, CID)
        if ROW == 0:  # noqa: SIM114
            yield from _multiply(rings, staging, done, place, cfg)
        elif rest > ROW:
            yield from _multiply(rings, staging, done, place, cfg)
        else:
            yield from skip(rows, done, done + steps)
        done += steps
    yield tma_store_wait(0)


def factors_here(tiles: tuple[Scales, Scales], stage: int, FIRST_ROW: int, FIRST_PART: int, place: tuple[int, int],
                 cfg: Config) -> Steps:  # fmt: skip
    of_rows, of_parts = tiles
    PARTS, ALL = cfg.subtiles, of_parts.PARTS
    yield of_rows.index(stage).slice(FIRST_ROW, 64).load(("SX", *place))
    for i in range(PARTS):
        yield of_parts.index(stage * ALL + FIRST_PART + i).load((f"SW{FIRST_PART + i}", *place))


def _product(x: tuple[Part, Tile], weights: Ring, n: int, PART: int, turns: Turns, cfg: Config) -> Steps:
    if cfg.turns:
        yield from turns.take()
    yield warpgroup_mma(x, (weights.part(n, PART), ("W", *x[1][1:])))
    if cfg.turns:
        yield from turns.give()


def _share(rings: Rings, turns: Turns, done: int, end: int, place: Place, cfg: Config) -> Steps:
    rows, weights = rings[0], rings[1]
    CID = place.CID
    PARTS = cfg.subtiles
    FIRST = 0 if cfg.split_rows else CID * PARTS
    for n in range(done, end):
        yield from rows.wait(n)
        x = (rows.part(n, CID if cfg.split_rows else 0), ("X", place.t, n - done))
        if cfg.scale_rows > 0:
            at = (place.t, n - done)
            yield from factors_here(rings[2], rows.stage(n), cfg.row_share * CID, FIRST, at, cfg)
        for i in range(PARTS - 1):
            yield from _product(x, weights, n, FIRST + i, turns, cfg)
            yield warpgroup_mma_wait(0)
            yield from rows.wait(n)
        yield from _product(x, weights, n, FIRST + PARTS - 1, turns, cfg)
        yield warpgroup_mma_wait(0)
        yield from rows.release(n)


def _pass(rows: Ring, turns: Turns, begin: int, end: int, cfg: Config) -> Steps:
    PARTS = cfg.subtiles
    for n in range(begin, end):
        yield from rows.wait(n)
        if cfg.turns:
            for _ in range(PARTS):
                yield from turns.take()
                yield from turns.give()
        yield from rows.release(n)


def _write_sums(staging: Staging, place: Place, cfg: Config) -> Steps:
    if cfg.gated:
        yield from put(output(place, 0), staging, place.left, cfg)
    else:
        PARTS = cfg.subtiles
        for i in range(PARTS):
            yield from put(output(place, i), staging, place.left, cfg)


def scaled_consumer(rings: Rings, staging: Staging, tiles: list[int], CID: int, cfg: Config) -> Steps:
    rows = rings[0]
    ROW = cfg.row_share * CID
    steps = cfg.steps
    done = 0
    turns = Turns(FIRST_BARRIER + cfg.stages, CID, cfg.consumers)
    if cfg.turns:
        yield from turns.begin()
    for t in range(0, len(tiles)):
        rest = tiles[t]
        place = Place(t, rest - ROW, CID)
        end = done + steps
        if ROW > 0:
            end = end if rest > ROW else done
        yield from _share(rings, turns, done, end, place, cfg)
        if ROW > 0:
            yield from _pass(rows, turns, end, done + steps, cfg)
        if rest > ROW:
            yield from _write_sums(staging, place, cfg)
        done += steps
    if cfg.turns:
        yield from turns.end()
    yield tma_store_wait(0)


def grouped_kernel(gpu: Gpu, tiles: list[int], cfg: Config) -> None:
    """Run one program to its end and look at what it leaves. tiles: the rows of its group from each on."""
    shared = (cfg.stages, FIRST_BARRIER, COPYING_THREADS if cfg.gathered else PRODUCER_THREADS)
    row_parts = cfg.consumers if cfg.split_rows else 1
    weight_parts = (1 if cfg.split_rows else cfg.consumers) * cfg.subtiles
    rows = Ring(shared[0], row_parts, 1, *shared[1:], cfg.gathered, cfg.consumers)
    if cfg.gathered or cfg.scale_rows > 0:
        rows.full = Barriers(mbarrier(ARRIVALS) for _ in range(cfg.stages))
    weights = Ring(shared[0], weight_parts, 1, *shared[1:], False, cfg.consumers, beside=rows)
    rings = rows, weights, (Scales(rows, 1), Scales(rows, weight_parts))
    warps, producer = (4, _copying_producer) if cfg.gathered else (1, _tma_producer)
    gpu.start("producer", warps, producer(rings, tiles, cfg))
    consumer = scaled_consumer if cfg.scaled else plain_consumer
    for CID in range(cfg.consumers):
        gpu.start(f"consumer {CID}", 4, consumer(rings, Staging(), tiles, CID, cfg))
    gpu.run()
    check(not any(at.came for at in gpu.barriers), "a named barrier is left half counted")
    check(not any(at.arrivals or at.bytes for at in rows.full), "an mbarrier is left in the middle of a phase")
    parts = (1 if cfg.gated else cfg.subtiles) if cfg.scaled else cfg.out_parts
    expected = {
        (f"O{i}", t, CID): 1
        for t, rest in enumerate(tiles)
        for CID in range(cfg.consumers)
        for i in range(parts)
        if rest > cfg.row_share * CID
    }
    check(gpu.written == expected, "outputs are missing or written twice")


# ---- The tests


def draw_tiles(rng: random.Random, cfg: Config) -> list[int]:
    """0 to 6 tiles: whole, of some rows, and of so few that a warpgroup has none."""
    return [rng.choice([100, cfg.block_m, rng.randint(1, cfg.block_m)]) for _ in range(rng.randint(0, 6))]


PLAIN = [
    Config(stages, consumers, split_rows, out_parts=out_parts, steps=steps)
    for stages in (2, 3, 4, 6)
    for consumers, split_rows in ((2, True), (2, False), (1, True))
    for out_parts, steps in ((1, 1), (2, 5))
]
GATHERED = [cfg._replace(gathered=True) for cfg in PLAIN if cfg.consumers == 2]
SCALED = [
    Config(stages, consumers, split_rows, True, gated, subtiles, steps=steps)
    for stages in (2, 6)
    for consumers, split_rows in ((2, True), (2, False), (1, True))
    for gated, subtiles, steps in ((False, 1, 1), (False, 2, 5), (True, 2, 3))
]
COPIED = [cfg._replace(scale_rows=1) for cfg in SCALED]
# Eight stages and two turns are all the barriers there are.
TURNS = [cfg._replace(turns=True, stages=stages) for cfg in COPIED if cfg.consumers == 2 for stages in (cfg.stages, 8)]


@pytest.mark.parametrize("cfg", PLAIN + GATHERED + SCALED + COPIED + TURNS, ids=str)
def test_random_schedules(cfg: Config, rng: random.Random) -> None:
    for _ in range(15):
        grouped_kernel(Gpu(rng), draw_tiles(rng, cfg), cfg)


def pass_no_turns(rows: Ring, turns: Turns, begin: int, end: int, cfg: Config) -> Steps:
    yield from skip(rows, begin, end)


HERE = sys.modules[__name__]
ROWS = Config(gathered=True)
BLOCKS = Config(scaled=True, subtiles=2, scale_rows=1, turns=True)
MUTANTS = {
    "released before the read completed": (HERE, "warpgroup_mma_wait", no_wait, Config(), "while it is read"),
    "sums used before they are there": (HERE, "warpgroup_mma_wait", no_wait, Config(scaled=True), "while it is read"),
    "output buffer in use": (HERE, "tma_store_wait", no_wait, Config(out_parts=2), "stored into a box in use"),
    "no drain": (Ring, "drain", no_steps, Config(), "half counted"),
    "acquires at once": (Ring, "acquire", no_steps, Config(), "before its release|arrived at twice"),
    "stores without a fence": (HERE, "fence_async_shared", partition_barrier, Config(), "before a fence"),
    "waits for the other phase": (Ring, "wait", wait_for_the_other_phase, Config(), "reads None and means"),
    "does not wait for tiles": (Ring, "wait", no_steps, Config(), "reads None and means"),
    "never releases": (Ring, "release", no_steps, Config(), "deadlock"),
    "keeps the tiles it skips": (HERE, "skip", no_steps, Config(), "deadlock"),
    "producer not counted": (HERE, "PRODUCER_THREADS", 0, Config(), "more threads at a barrier than it counts"),
    "scales not delivered": (Ring, "deliver", no_steps, BLOCKS, "deadlock"),
    "scales delivered before they land": (Ring, "deliver", deliver_at_once, BLOCKS, "reads None and means .'S"),
    "scales not counted": (HERE, "ARRIVALS", 1, BLOCKS, "reads None and means|arrived at twice"),
    "scales counted twice": (HERE, "ARRIVALS", 3, BLOCKS, "deadlock"),
    "scales not waited for": (Ring, "wait", no_steps, BLOCKS, "reads None and means .'S"),
    "tiles passed without their turns": (HERE, "_pass", pass_no_turns, BLOCKS, "deadlock|half counted"),
    "gives the turn twice": (Turns, "give", give_twice, BLOCKS, "have the turn at once"),
    "keeps the turn": (Turns, "give", no_steps, BLOCKS, "deadlock"),
    "nobody begins": (Turns, "begin", no_steps, BLOCKS, "deadlock"),
    "nobody takes the last turn": (Turns, "end", no_steps, BLOCKS, "half counted"),
    "copying warps not counted": (HERE, "COPYING_THREADS", 32, ROWS, "more threads at a barrier than it counts"),
    "copies without a fence": (test_channels, "fence_async_shared", partition_barrier, ROWS, "before a fence"),
    "rows not delivered": (Ring, "deliver", no_steps, ROWS, "deadlock"),
    "rows delivered before they land": (Ring, "deliver", deliver_at_once, ROWS, "reads"),
    "too many counted": (HERE, "PRODUCER_THREADS", 64, Config(), "deadlock"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model finds each fault, and by what the fault does."""
    target, name, faulty, cfg, message = MUTANTS[mutant]
    monkeypatch.setattr(target, name, faulty)
    assert_found(message, lambda rng: grouped_kernel(Gpu(rng), draw_tiles(rng, cfg), cfg))


HOPPER = Path(__file__).parents[2] / "flashinfer" / "ops" / "gemm" / "gluon_sm90"
SOURCES = {
    "producer.py": ["_load_weights", "_tma_producer", "_copying_producer"],
    "plain.py": ["product", "skip", "_write", "_multiply", "plain_consumer"],
    "scaled.py": ["_product", "_share", "_pass", "_write_sums", "scaled_consumer"],
    "scales.py": ["copy_scales", "factors_here"],
    "epilogue.py": ["put"],
}


@pytest.mark.parametrize(("file", "function"), [(file, name) for file, names in SOURCES.items() for name in names])
def test_model_mirrors_the_kernel(file: str, function: str) -> None:
    expected = outline(HOPPER / file, function)
    assert expected
    assert outline(Path(__file__), function) == expected
