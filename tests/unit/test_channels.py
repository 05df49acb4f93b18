"""The barriers of the Hopper prefill under random schedules: who may touch which shared memory, and when.

`Ring`, `Turns` and the functions below mirror `device/channels.py` and the kernel and its producers in
`ops/attention/gluon_sm90`, name by name, less the arithmetic. `test_model_mirrors_the_kernel` compares the operations,
their order, and the loops and conditions around them; the numbers of barriers and threads that `Ring` and
`prefill_kernel` set are the reader's to compare.
"""

from __future__ import annotations

import random
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.unit.hopper_model import (
    BOX_BYTES,
    Box,
    Gpu,
    Operation,
    Part,
    Role,
    Steps,
    Tile,
    assert_found,
    check,
    copy_arrive,
    copy_load,
    fence_async_shared,
    mbarrier,
    named_arrive,
    named_sync,
    partition_barrier,
    plain_store,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tests.unit.outline import outline

TMA_THREADS, COPYING_THREADS, CONSUMER_THREADS, GROUPS, FIRST_BARRIER = 32, 128, 128, 2, 6
HALVES, AHEAD = 2, 2


class Config(NamedTuple):
    """As `GluonConfig`, of small tiles."""

    stages: int = 2
    q_stages: int = 2
    share_out: bool = False
    turns: bool = True
    rows: int = 64
    block_n: int = 8
    box: int = 2


class Item(NamedTuple):
    """A work item: what the kernel needs of a record, and what it finds. q_lo: first query of the tile. left: whether
    warpgroup 0 needs no more than the left half of the last tile; right: the last one that of the first tile.
    """

    q_lo: int
    kv_tile: int
    kv_tiles: int
    kv_len: int
    qo_len: int
    left: bool = False
    right: bool = False


class Barriers(list[mbarrier]):
    def index(self, i: int) -> mbarrier:  # type: ignore[override]
        return self[i]


class Ring:
    """CONSUMERS: warpgroups. beside: a ring whose tiles come and go with those of this one."""

    def __init__(self, STAGES: int, PARTS: int, BOXES: int, EMPTY: int, PRODUCER_THREADS: int, COPIED: bool,
                 CONSUMERS: int = GROUPS, beside: Ring | None = None) -> None:  # fmt: skip
        self.boxes = [Box() for _ in range(STAGES * BOXES)]
        self.full = Barriers(mbarrier() for _ in range(STAGES)) if beside is None else beside.full
        self.STAGES, self.PARTS, self.BOXES, self.EMPTY, self.COPIED = STAGES, PARTS, BOXES, EMPTY, COPIED
        self.SHIFT = STAGES.bit_length() - 1 if STAGES & (STAGES - 1) == 0 else -1
        self.BYTES = BOXES * BOX_BYTES
        self.THREADS = CONSUMERS * CONSUMER_THREADS + PRODUCER_THREADS
        self.companions = [self]
        if beside is not None:
            beside.companions.append(self)

    def stage(self, n: int) -> int:
        return n & (self.STAGES - 1) if self.SHIFT >= 0 else n % self.STAGES

    def phase(self, n: int) -> int:
        return (n >> self.SHIFT) & 1 if self.SHIFT >= 0 else (n // self.STAGES) & 1

    def acquire(self, n: int) -> Steps:
        if n >= self.STAGES:
            yield named_sync(self.EMPTY + self.stage(n), self.THREADS)

    def expect(self, n: int, BESIDE: int = 0) -> Steps:
        yield mbarrier.expect(self.full.index(self.stage(n)), self.BYTES + BESIDE)

    def expect_nothing(self, n: int) -> Steps:
        yield mbarrier.expect(self.full.index(self.stage(n)), 0)

    def deliver(self, n: int) -> Steps:
        yield copy_arrive(self.full.index(self.stage(n)))

    def box(self, n: int, i: int) -> Box:
        return self.boxes[self.stage(n) * self.BOXES + i]

    def landing(self, n: int) -> mbarrier:
        return self.full.index(self.stage(n))

    def drain(self, n: int, BEYOND: int = 0) -> Steps:
        for i in range(max(n + BEYOND - self.STAGES, 0), n):
            yield named_sync(self.EMPTY + self.stage(i), self.THREADS)

    def wait(self, n: int, pred: bool = True) -> Steps:
        yield mbarrier.wait(self.full.index(self.stage(n)), self.phase(n), pred=pred)
        if self.COPIED:
            yield fence_async_shared()

    def part(self, n: int, i: int) -> Part:
        """Parts have boxes each, or share them."""
        boxes = max(1, self.BOXES // self.PARTS)
        return Part(self.box(n, i * self.BOXES // self.PARTS + x) for x in range(boxes))

    def release(self, n: int) -> Steps:
        yield self._disown(n)
        yield named_arrive(self.EMPTY + self.stage(n), self.THREADS)

    def _disown(self, n: int) -> Operation:
        def operation(gpu: Gpu, me: Role) -> None:
            for ring in self.companions:
                for i in range(ring.BOXES):
                    ring.box(n, i).owners.discard(me.name)

        return operation


class Turns:
    def __init__(self, FIRST: int, ME: int, COUNT: int) -> None:
        self.FIRST, self.ME, self.COUNT = FIRST, ME, COUNT

    def begin(self) -> Steps:
        if self.ME == self.COUNT - 1:
            yield named_arrive(self.FIRST, 2 * CONSUMER_THREADS)

    def take(self) -> Steps:
        yield named_sync(self.FIRST + self.ME, 2 * CONSUMER_THREADS)
        yield partial(self._pass_turn, None, self.ME)

    def give(self) -> Steps:
        yield partial(self._pass_turn, self.ME, None)
        yield named_arrive(self.FIRST + (self.ME + 1) % self.COUNT, 2 * CONSUMER_THREADS)

    def end(self) -> Steps:
        if self.ME == 0:
            yield named_sync(self.FIRST, 2 * CONSUMER_THREADS)

    @staticmethod
    def _pass_turn(before: Any, after: Any, gpu: Gpu, me: Role) -> None:
        check(gpu.turn == before, f"{me.name} and warpgroup {gpu.turn} have the turn at once")
        gpu.turn = after


Channels = tuple[Ring, Ring, Ring]
Operand = tuple[Part, Tile]


def tokens(part: Part, which: str, cfg: Config) -> Part:
    """The boxes with the left or right half of a tile's tokens, or all; copied tiles are one box."""
    half = cfg.block_n // 2 // cfg.box if cfg.box else 0
    boxes = cfg.block_n // cfg.box if cfg.box else 1
    wanted = {"all": range(boxes), "left": range(half or 1), "right": range(half, boxes)}[which]
    return Part(box for i, box in enumerate(part) if i % boxes in wanted)


def _queries(q_desc: str, queries: Ring, n: int, cfg: Config) -> Steps:
    PARTS = GROUPS * HALVES
    yield from queries.acquire(n)
    yield from queries.expect(n)
    for i in range(PARTS):
        yield tma_load((q_desc, n, i // HALVES), queries.landing(n), queries.box(n, i))


def _fill(desc: str, ring: Ring, n: int, place: tuple[int, int], cfg: Config) -> Steps:
    """place: work item, first token."""
    BOXES = cfg.block_n // cfg.box
    for b in range(BOXES // AHEAD):
        if b == 0:
            yield from ring.acquire(n)
            yield from ring.expect(n)
        for x in range(AHEAD):
            for h in range(HALVES):
                yield tma_load((desc, *place), ring.landing(n), ring.box(n, h * BOXES + b * AHEAD + x))


def tma_producer(channels: Channels, items: list[Item], cfg: Config) -> Steps:
    q_desc, k_desc, v_desc = "Q", "K", "V"
    queries, keys, values = channels
    done = 0
    for n in range(0, len(items)):
        kv_tiles = items[n].kv_tiles
        last = items[n].kv_tile + kv_tiles - 1
        yield from _queries(q_desc, queries, n, cfg)
        for j in range(0, kv_tiles + 1):
            if j < kv_tiles:
                yield from _fill(k_desc, keys, done + j, (n, (last - j) * cfg.block_n), cfg)
            if j > 0:
                yield from _fill(v_desc, values, done + j - 1, (n, (last - j + 1) * cfg.block_n), cfg)
        done += kv_tiles
    yield from queries.drain(len(items))
    yield from keys.drain(done)
    yield from values.drain(done)


def _copy(cache: str, ring: Ring, n: int, place: tuple[int, int], cfg: Config) -> Steps:
    yield from ring.acquire(n)
    yield copy_load(ring.part(n, 0), (cache, *place))
    yield from ring.deliver(n)


def copying_producer(channels: Channels, items: list[Item], cfg: Config) -> Steps:
    q_desc, k, v = "Q", "K", "V"
    queries, keys, values = channels
    done = 0
    for n in range(0, len(items)):
        kv_tiles = items[n].kv_tiles
        last = items[n].kv_tile + kv_tiles - 1
        yield from _queries(q_desc, queries, n, cfg)
        for j in range(0, kv_tiles + 1):
            if j < kv_tiles:
                yield from _copy(k, keys, done + j, (n, (last - j) * cfg.block_n), cfg)
            if j > 0:
                yield from _copy(v, values, done + j - 1, (n, (last - j + 1) * cfg.block_n), cfg)
        done += kv_tiles
    yield from queries.drain(len(items))
    yield from keys.drain(done)
    yield from values.drain(done)


def _zero_tail(values: Ring, n: int, rest: int, tile: Tile, cfg: Config) -> Steps:
    BOXES = cfg.block_n // cfg.box
    for h in range(HALVES):
        box = values.box(n, h * BOXES + rest // cfg.box)
        yield box.load(tile)
        yield box.store(tile, reads=1)
    yield fence_async_shared()
    yield partition_barrier()


def _first(q: Operand, channels: Channels, place: tuple[int, int], k: Tile, kv_len: int, of_k: str, turns: Turns,
           cfg: Config) -> Steps:  # fmt: skip
    """place: number of the tile, and of the first one of the next item; k: the K tile that is meant."""
    n, end = place
    _, keys, values = channels
    if cfg.turns:
        yield from turns.take()
    yield warpgroup_mma(q, (tokens(keys.part(n, 0), of_k, cfg), k))
    if cfg.turns:
        yield from turns.give()
    yield warpgroup_mma_wait(0)
    yield from keys.release(n)
    if cfg.box > 0:
        rest = kv_len - k[2]
        if (rest < cfg.block_n) & (rest % cfg.box != 0):
            yield from values.wait(n)
            yield from _zero_tail(values, n, rest, ("V", *k[1:]), cfg)
    yield from keys.wait(n + 1, n + 1 < end)


def _step(q: Operand, channels: Channels, place: tuple[int, int], k: Tile, turns: Turns, cfg: Config,
          of_k: str = "all", of_v: str = "all") -> Steps:  # fmt: skip
    """place, k: as above; the tile's products run beside those of the V tile before. of_k, of_v: see `tokens`."""
    n, end = place
    _, keys, values = channels
    v = ("V", k[1], k[2] + cfg.block_n)
    if cfg.turns:
        yield from turns.take()
    yield warpgroup_mma(q, (tokens(keys.part(n, 0), of_k, cfg), k))
    yield from values.wait(n - 1)
    yield warpgroup_mma((tokens(values.part(n - 1, 0), of_v, cfg), v))
    if cfg.turns:
        yield from turns.give()
    yield warpgroup_mma_wait(1)
    yield from keys.release(n)
    yield from keys.wait(n + 1, n + 1 < end)
    yield warpgroup_mma_wait(0)
    yield from values.release(n - 1)


def _last(channels: Channels, n: int, done: int, v: Tile, of_v: str, cfg: Config) -> Steps:
    queries, _, values = channels
    if not cfg.share_out:
        yield from queries.release(n)
    yield from values.wait(done)
    yield warpgroup_mma((tokens(values.part(done, 0), of_v, cfg), v))
    yield warpgroup_mma_wait(0)
    yield from values.release(done)


def _write(o: Tile, item: Item, outputs: Ring, outlet: int, CID: int, cfg: Config) -> Steps:
    q_lo, qo_len = item.q_lo + CID * cfg.rows, item.qo_len
    if q_lo + cfg.rows <= qo_len:
        yield outputs.part(outlet, CID).store(o)
        yield fence_async_shared()
        for h in range(HALVES):
            yield tma_store(o, outputs.box(outlet, CID * HALVES + h))
    else:
        yield plain_store(o, HALVES)


def _consumer(channels: Channels, outputs: Ring, items: list[Item], CID: int, cfg: Config) -> Steps:
    queries, keys, _ = channels
    LEFT, RIGHT = CID == 0, CID == GROUPS - 1
    turns = Turns(FIRST_BARRIER, CID, GROUPS)
    if cfg.turns:
        yield from turns.begin()
    done = 0
    for n in range(0, len(items)):
        _, kv_tile, kv_tiles, kv_len, _, left, right = items[n]
        last = kv_tile + kv_tiles - 1
        begin = 2 if LEFT and left and kv_tiles > 1 else 1
        stop = kv_tiles - 1 if RIGHT and right and kv_tiles > 1 else kv_tiles
        end = done + kv_tiles
        yield from queries.wait(n)
        q = (queries.part(n, CID), ("Q", n, CID))
        yield from keys.wait(done)
        k = ("K", n, last * cfg.block_n)
        if LEFT and begin == 2:
            yield from _first(q, channels, (done, end), k, kv_len, "left", turns, cfg)
            yield from _step(q, channels, (done + 1, end), ("K", n, (last - 1) * cfg.block_n), turns, cfg, of_v="left")
        else:
            yield from _first(q, channels, (done, end), k, kv_len, "all", turns, cfg)
        for j in range(begin, stop):  # the kernel has three such loops, which differ in their masks
            yield from _step(q, channels, (done + j, end), ("K", n, (last - j) * cfg.block_n), turns, cfg)
        v = ("V", n, kv_tile * cfg.block_n)
        if RIGHT and stop < kv_tiles:
            yield from _step(q, channels, (end - 1, end), ("K", n, kv_tile * cfg.block_n), turns, cfg, of_k="right")
            yield from _last(channels, n, end - 1, v, "right", cfg)
        else:
            yield from _last(channels, n, end - 1, v, "all", cfg)
        done = end
        yield tma_store_wait(0)
        outlet = n if cfg.share_out else 0
        yield from _write(("O", n, CID), items[n], outputs, outlet, CID, cfg)
        if cfg.share_out:
            yield tma_store_wait(0)
            yield from queries.release(n)
    if cfg.turns:
        yield from turns.end()
    yield tma_store_wait(0)


def _ring(STAGES: int, PARTS: int, rows: int, BOX: int, FIRST: int, cfg: Config) -> Ring:
    THREADS = TMA_THREADS if cfg.box else COPYING_THREADS
    return Ring(STAGES, PARTS, PARTS * (HALVES * (rows // BOX) if BOX else 1), FIRST, THREADS, BOX == 0)


def prefill_kernel(gpu: Gpu, items: list[Item], cfg: Config) -> None:
    """Run one program to its end and look at what it leaves."""
    first_empty = FIRST_BARRIER + GROUPS
    queries = _ring(cfg.q_stages, GROUPS, cfg.rows, cfg.rows, first_empty, cfg)
    keys = _ring(cfg.stages, 1, cfg.block_n, cfg.box, first_empty + cfg.q_stages, cfg)
    values = _ring(cfg.stages, 1, cfg.block_n, cfg.box, first_empty + cfg.q_stages + cfg.stages, cfg)
    outputs = queries if cfg.share_out else _ring(1, GROUPS, cfg.rows, cfg.rows, first_empty, cfg)
    channels = (queries, keys, values)
    if cfg.box:
        gpu.start("producer", 1, tma_producer(channels, items, cfg))
    else:
        gpu.start("producer", 4, copying_producer(channels, items, cfg))
    for CID in range(GROUPS):
        gpu.start(f"consumer {CID}", 4, _consumer(channels, outputs, items, CID, cfg))
    gpu.run()
    check(not any(at.came for at in gpu.barriers), "a named barrier is left half counted")
    for ring in channels:
        check(not any(at.arrivals or at.bytes for at in ring.full), "an mbarrier is left in the middle of a phase")
    written = {("O", n, CID): HALVES for n in range(len(items)) for CID in range(GROUPS)}
    check(gpu.written == written, "outputs are missing or written twice")


# ---- The tests


def draw_items(rng: random.Random, cfg: Config) -> list[Item]:
    """0 to 5 items of 1 to 5 KV tiles, whole and ragged at either end."""
    items = []
    for _ in range(rng.randint(0, 5)):
        kv_tile, kv_tiles = rng.randint(0, 3), rng.choice([1, 1, 2, 3, 5])
        end = (kv_tile + kv_tiles) * cfg.block_n
        halves = rng.random() < 0.5, rng.random() < 0.5
        kv_len = rng.choice([end, end - rng.randint(1, cfg.block_n - 1), end + 20])
        items.append(Item(0, kv_tile, kv_tiles, kv_len, rng.randint(1, (GROUPS + 1) * cfg.rows), *halves))
    return items


CONFIGS = [
    Config(stages, q_stages, share_out, turns, box=box)
    for box in (0, 2)
    for stages in (1, 2)
    for q_stages in (1, 2)
    for share_out in (False, True)
    for turns in (False, True)
]


@pytest.mark.parametrize("cfg", CONFIGS, ids=str)
def test_random_schedules(cfg: Config, rng: random.Random) -> None:
    for _ in range(10):
        prefill_kernel(Gpu(rng), draw_items(rng, cfg), cfg)


def no_steps(*_: Any) -> Steps:
    return iter(())


def no_wait(_: int) -> Operation:
    return lambda gpu, me: None


def deliver_at_once(ring: Ring, n: int) -> Steps:
    yield lambda gpu, me: ring.full.index(ring.stage(n)).update(1, 0)


def wait_for_the_other_phase(ring: Ring, n: int, pred: bool = True) -> Steps:
    yield mbarrier.wait(ring.full.index(ring.stage(n)), ring.phase(n) ^ 1, pred=pred)


def give_twice(turns: Turns) -> Steps:
    for _ in range(2):
        yield named_arrive(turns.FIRST + (turns.ME + 1) % turns.COUNT, 2 * CONSUMER_THREADS)


HERE = sys.modules[__name__]
SHARED = Config(share_out=True, q_stages=1)
COPIED = Config(box=0)
MUTANTS = {
    "released before the read completed": (HERE, "warpgroup_mma_wait", no_wait, Config(), "while it is read"),
    "released before the output left": (HERE, "tma_store_wait", no_wait, SHARED, r"'Q'.*overwrites.*'O'.*while"),
    "output buffer in use": (HERE, "tma_store_wait", no_wait, Config(), "stored into a box in use"),
    "no drain": (Ring, "drain", no_steps, Config(), "half counted"),
    "acquires at once": (Ring, "acquire", no_steps, Config(), "before its release|arrived at twice"),
    "copies at once": (Ring, "acquire", no_steps, COPIED, "before its release|arrived at twice"),
    "delivers before its copies land": (Ring, "deliver", deliver_at_once, COPIED, "reads None and means"),
    "copies without a fence": (HERE, "fence_async_shared", partition_barrier, COPIED, "before a fence"),
    "stores without a fence": (HERE, "fence_async_shared", partition_barrier, Config(), "before a fence"),
    "never delivers": (Ring, "deliver", no_steps, COPIED, "deadlock"),
    "waits for the other phase": (Ring, "wait", wait_for_the_other_phase, Config(), "reads None and means"),
    "does not wait for tiles": (Ring, "wait", no_steps, Config(), "reads None and means"),
    "never releases": (Ring, "release", no_steps, Config(), "deadlock"),
    "gives the turn twice": (Turns, "give", give_twice, Config(), "have the turn at once"),
    "keeps the turn": (Turns, "give", no_steps, Config(), "deadlock"),
    "nobody begins": (Turns, "begin", no_steps, Config(), "deadlock"),
    "nobody takes the last turn": (Turns, "end", no_steps, Config(), "half counted"),
    "producer not counted": (HERE, "TMA_THREADS", 0, Config(), "more threads at a barrier than it counts"),
    "too many counted": (HERE, "TMA_THREADS", 64, Config(), "deadlock"),
    "copying warps not counted": (HERE, "COPYING_THREADS", 32, COPIED, "more threads at a barrier than it counts"),
    "turns count one warp": (HERE, "CONSUMER_THREADS", 32, Config(), "more threads at a barrier than it counts"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model finds each fault, and by what the fault does."""
    target, name, faulty, cfg, message = MUTANTS[mutant]
    monkeypatch.setattr(target, name, faulty)
    assert_found(message, lambda rng: prefill_kernel(Gpu(rng), draw_items(rng, cfg), cfg))


PACKAGE = Path(__file__).parents[2] / "flashinfer"
HOPPER = "ops/attention/gluon_sm90"
CHANNEL = ("acquire", "expect", "expect_nothing", "deliver", "drain", "wait", "release")
SOURCES = {
    "device/channels.py": [f"Ring.{x}" for x in CHANNEL] + [f"Turns.{x}" for x in ("begin", "take", "give", "end")],
    f"{HOPPER}/producer.py": ["_queries", "_fill", "tma_producer", "_copy", "copying_producer"],
    f"{HOPPER}/kernel.py": ["_zero_tail", "_first", "_step", "_last", "_write", "_consumer"],
}


@pytest.mark.parametrize(("file", "function"), [(file, name) for file, names in SOURCES.items() for name in names])
def test_model_mirrors_the_kernel(file: str, function: str) -> None:
    expected = outline(PACKAGE / file, function, {"rounds(num_tiles, heads, cfg)": "len(items)"})
    assert expected
    assert outline(Path(__file__), function) == expected
