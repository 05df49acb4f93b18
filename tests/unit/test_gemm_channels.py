"""The barriers of the grouped products under random schedules, by the model in `grouped_model`.

`test_model_mirrors_the_kernel` compares it with `ops/gemm/gluon_sm90`, file by file: operations, their order, and the
loops and conditions around them. Configurations are the kernel's own; what `_rings` makes of them, and the numbers of
threads and arrivals, are the reader's to compare.
"""

from __future__ import annotations

import inspect
import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

from flashinfer.ops.gemm.gluon_sm90 import gate
from flashinfer.ops.gemm.gluon_sm90.configs import TILES, bits_of, configured
from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig
from flashinfer.ops.gemm.spec import GemmSpec
from tests.unit import grouped_model, test_channels
from tests.unit.grouped_model import epilogue, kernel, packed, plain, producer, scaled
from tests.unit.grouped_model.schedule import Groups
from tests.unit.hopper_model import Gpu, Steps, assert_found, partition_barrier
from tests.unit.outline import outline
from tests.unit.test_channels import (
    Ring,
    Turns,
    deliver_at_once,
    give_twice,
    no_steps,
    no_wait,
    wait_for_the_other_phase,
)

MOST_STAGES = 10


def draw_rows(rng: random.Random, cfg: GemmConfig) -> list[int]:
    """Rows from the first of each of 0 to 9 tiles on: many, a tile's and its tail's, a tile's, and fewer."""
    some = [1000, cfg.block_m + cfg.tail, cfg.block_m + 1, cfg.block_m, cfg.out_rows]
    return [rng.choice([*some, rng.randint(1, cfg.block_m + cfg.tail)]) for _ in range(rng.randint(0, 9))]


def run(rng: random.Random, cfg: GemmConfig) -> None:
    """One program of up to three, of as many steps of K as stages hold, of fewer or of more."""
    groups = Groups(rng, draw_rows(rng, cfg), rng.randint(1, 3), rng.random() < 0.5)
    kernel.grouped_kernel(Gpu(rng), groups, rng.randint(1, (cfg.stages + 2) * cfg.block_k), cfg)


class Case(NamedTuple):
    """A tile of a kind of product, with this many stages."""

    spec: GemmSpec
    tile: str
    stages: int

    @property
    def cfg(self) -> GemmConfig:
        tile = TILES[self.tile, bits_of(self.spec)]
        return configured(self.spec, tile._replace(stages=self.stages), 32, False)


PAIRS = gate.BASE._replace(activation="swiglu")
GATHERED = gate.BASE._replace(gathered=True)
SPECS = {
    "plain": gate.BASE,
    "pairs": PAIRS,
    "kn": gate.BASE._replace(transposed=True),
    "gathered": GATHERED,
    "gathered_pairs": PAIRS._replace(gathered=True),
    "fp8_tensor": gate.TENSOR,
    "fp8_tensor_pairs": gate.TENSOR._replace(activation="swiglu"),
    "fp8_block": gate.BLOCK,
    "fp8_block_pairs": gate.GATED,
    "mxfp4": gate.MXFP4,
    "mxfp4_gathered_pairs": gate.PACKED_UP,
}
CASES = {
    f"{name}.{tile}.{stages}": Case(spec, tile, stages)
    for name, spec in SPECS.items()
    for (tile, bits), made in TILES.items()
    for stages in sorted({2, 3, made.stages})
    if bits == bits_of(spec)
}


@pytest.mark.parametrize("case", CASES)
def test_random_schedules(case: str, rng: random.Random) -> None:
    cfg = CASES[case].cfg
    for _ in range(12):
        run(rng, cfg)


def test_every_kind_of_configuration_is_run() -> None:
    """As the cases come from the kernel's tiles, a kind could be lost with one of them."""
    made = [case.cfg for case in CASES.values()]
    kinds: list[Callable[[GemmConfig], object]] = [
        lambda cfg: cfg.tail and cfg.gathered,
        lambda cfg: cfg.tail and not cfg.gathered,
        lambda cfg: cfg.tail and cfg.gated,
        lambda cfg: cfg.scale_block and cfg.block_m > cfg.out_rows,
        lambda cfg: cfg.scale_block and cfg.gathered,
        lambda cfg: cfg.turns and cfg.subtiles > 1,
        lambda cfg: cfg.scale_rows and not cfg.turns,
        lambda cfg: cfg.n_major,
        lambda cfg: cfg.consumers == 1,
    ]
    assert all(any(map(kind, made)) for kind in kinds)
    assert max(cfg.stages + 2 * cfg.turns for cfg in made) <= MOST_STAGES


# ---- Faults


def edited(function: Callable[..., Steps], *changes: tuple[str, str]) -> Any:
    """A function of the model with these pieces of its source replaced, each of which is there once."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    names = dict(function.__globals__)
    exec(source, names)
    return names[function.__name__]


def moved(function: Callable[..., Steps], piece: str, before: str) -> Any:
    return edited(function, (piece, ""), (before, piece + before))


def pass_no_turns(rows: Ring, turns: Turns, begin: int, end: int, cfg: GemmConfig) -> Steps:
    yield from plain.skip(rows, begin, end)


def place_of_a_warp(groups: Groups, place: int) -> int:
    """Each warp of a program takes from the counter."""
    return groups.programs + (place if groups.taken is None else next(groups.taken))


ROWS, TAILS, PAIR_TAILS = Case(gate.BASE, "128x256", 4), Case(gate.BASE, "128x256t", 4), Case(PAIRS, "128x256t", 4)
COLUMNS, COPIES, COPIED_TAILS = Case(gate.BASE, "64x256", 4), Case(GATHERED, "64x256", 4), Case(GATHERED, "128x256t", 4)
SCALES, TURNS = Case(gate.BLOCK, "64x128", 4), Case(gate.BLOCK, "128x256", 4)
CODES, HALF_TILES = Case(gate.MXFP4, "64x128", 3), Case(gate.MXFP4, "256x128", 3)

# Pieces of the model, and a change of the function that they are of.
ACQUIRE = "            yield from rows.acquire(n)\n"
TELL = """            if k == 0:
                yield from tell(rings.tiles, rows.stage(n), group, row, left, column_tile)
"""
LOAD_WEIGHTS = "            yield from _load_weights(w_desc, weights, n, group, k)\n"
DELIVER = "            yield from rows.deliver(n)\n"
END_TELL = "    yield from tell(rings.tiles, rows.stage(done), -1, 0, 0, 0)\n"
END_DELIVER = "        yield from rows.deliver(done)\n"
DRAIN = "    yield from rows.drain(done, 1)\n"
FIRST_TOLD = "    yield from rows.wait(done)\n    group"
NEXT_TOLD = "        yield from rows.wait(done)\n        group"
PRODUCT_OVER = "        yield warpgroup_mma_wait(0)\n        yield from rows.release(n)\n"
EMPTIED = "    yield tma_store_wait(0)\n"
NEXT_NUMBERS = "        yield from rows.wait(n + 1)\n        yield from _numbers"

END, MULTIPLY_ROWS, PLAIN = producer._end, packed._multiply_rows, plain.plain_consumer
TMA, COPY = producer._tma_producer, producer._copying_producer
UNSEEN, UNRELEASED, IN_USE = "that it need not see", "before its release", "stored into a box in use"
READ_LATE, MANY = "while it is read", "more threads at a barrier than it counts"

MUTANTS: dict[str, tuple[Any, str, Any, Case, str]] = {
    "tells after the arrival": (kernel, "_tma_producer", moved(TMA, TELL, LOAD_WEIGHTS), ROWS, UNSEEN),
    "tells before the stage is free": (kernel, "_tma_producer", moved(TMA, TELL, ACQUIRE), ROWS, UNRELEASED),
    "warps tell after they arrived": (
        kernel, "_copying_producer", edited(COPY, (TELL, ""), (DELIVER, DELIVER + TELL)), COPIES, UNSEEN),
    "warps take tiles of their own": (producer, "place_after", place_of_a_warp, COPIES, "is read|overwrites|deadlock"),
    "tells the end after the arrival": (producer, "_end", moved(END, END_TELL, DRAIN), ROWS, UNSEEN),
    "tells the end in no stage of its own": (
        producer, "_end", edited(END, ("    yield from rows.acquire(done)\n", "")), ROWS, UNRELEASED),
    "nothing arrives at the end": (
        producer, "_end", edited(END, ("    yield from rows.expect_nothing(done)\n", "")), ROWS, "deadlock"),
    "copying warps do not arrive at the end": (
        producer, "_end", edited(END, (END_DELIVER, "        pass\n")), COPIES, "deadlock"),
    "no scales arrive at the end": (producer, "_end", edited(END, (END_DELIVER, "        pass\n")), SCALES, "deadlock"),
    "drains what the end has acquired": (Ring, "drain", edited(Ring.drain, ("n + BEYOND", "n")), ROWS, "deadlock"),
    "no drain": (Ring, "drain", no_steps, ROWS, "half counted"),
    "first tile read before it is told": (
        kernel, "plain_consumer", edited(PLAIN, ("\n" + FIRST_TOLD, "\n    group")), ROWS, UNSEEN),
    "next tile read before it is told": (
        kernel, "plain_consumer", edited(PLAIN, (NEXT_TOLD, "        group")), ROWS, UNSEEN),
    "blocks read before they are told": (
        kernel, "scaled_consumer", edited(scaled.scaled_consumer, (NEXT_TOLD, "        group")), TURNS, UNSEEN),
    "tail's bytes not announced": (
        producer, "_load_rows", edited(producer._load_rows, (" + cfg.tail_bytes", "")), TAILS,
        "reads None and means .'T'|arrived at twice"),
    "tail not copied": (
        kernel, "_copying_producer", edited(COPY, ("if takes_tail(left, cfg)", "if False")), COPIED_TAILS,
        "reads .* and means .'T'"),
    "tail's product still runs": (
        plain, "_product", edited(plain._product, ("mma_wait(2)", "mma_wait(3)")), TAILS, READ_LATE),
    "warpgroups disagree on a tail": (
        plain, "_one_tile", edited(plain._one_tile, ("takes_tail(rest", "takes_tail(place.left")), TAILS,
        "means .'T'|outputs"),
    "half of a tail written twice": (
        plain, "_multiply", edited(plain._multiply, (" // 2 * CID", " // 2")), PAIR_TAILS, "outputs"),
    "tail stored while the tile's rows leave": (
        epilogue, "put", edited(epilogue.put, (EMPTIED, "    if BOX:\n    " + EMPTIED)), TAILS, IN_USE),
    "output buffer in use": (epilogue, "tma_store_wait", no_wait, ROWS, IN_USE),
    "halves of a tile in one buffer": (epilogue, "tma_store_wait", no_wait, HALF_TILES, IN_USE),
    "stores without a fence": (epilogue, "fence_async_shared", partition_barrier, ROWS, "before a fence"),
    "half a tile too often": (
        plain, "multiply_packed", edited(packed.multiply_packed, ("<= cfg.out_rows", "< cfg.block_m")), HALF_TILES,
        "outputs"),
    "left operand overwritten": (
        packed, "_multiply_rows", edited(MULTIPLY_ROWS, (PRODUCT_OVER, "        yield from rows.release(n)\n")), CODES,
        "registers of .* written while"),
    "rows released under the product": (
        packed, "_multiply_rows", moved(MULTIPLY_ROWS, "        yield from rows.release(n)\n",
                                        "        yield warpgroup_mma_wait(0)\n"), CODES, READ_LATE),
    "codes read before they arrive": (
        packed, "_multiply_rows", edited(MULTIPLY_ROWS, (NEXT_NUMBERS, "        yield from _numbers")), CODES,
        "and means .'W'"),
    "released before the read completed": (plain, "warpgroup_mma_wait", no_wait, COLUMNS, READ_LATE),
    "sums used before they are there": (scaled, "warpgroup_mma_wait", no_wait, SCALES, READ_LATE),
    "acquires at once": (Ring, "acquire", no_steps, ROWS, "before its release|arrived at twice"),
    "waits for the other phase": (Ring, "wait", wait_for_the_other_phase, ROWS, UNSEEN),
    "does not wait": (Ring, "wait", no_steps, ROWS, UNSEEN),
    "never releases": (Ring, "release", no_steps, ROWS, "deadlock"),
    "keeps the tiles it skips": (plain, "skip", no_steps, ROWS, "deadlock"),
    "producer not counted": (kernel, "producer_threads", lambda cfg: 0, ROWS, MANY),
    "too many counted": (kernel, "producer_threads", lambda cfg: 64, ROWS, "deadlock"),
    "copying warps not counted": (kernel, "producer_threads", lambda cfg: 32, COPIES, MANY),
    "scales not delivered": (Ring, "deliver", no_steps, TURNS, "deadlock"),
    "scales delivered before they land": (Ring, "deliver", deliver_at_once, TURNS, "reads None and means .'S"),
    "scales not counted": (kernel, "arrivals", lambda cfg: 1, TURNS, "reads None and means|arrived at twice"),
    "scales counted twice": (kernel, "arrivals", lambda cfg: 3, TURNS, "deadlock"),
    "a warp not counted": (kernel, "arrivals", lambda cfg: 4, COPIES, "reads|arrived at twice"),
    "tiles passed without their turns": (scaled, "_pass", pass_no_turns, TURNS, "deadlock|half counted"),
    "gives the turn twice": (Turns, "give", give_twice, TURNS, "have the turn at once"),
    "keeps the turn": (Turns, "give", no_steps, TURNS, "deadlock"),
    "nobody begins": (Turns, "begin", no_steps, TURNS, "deadlock"),
    "nobody takes the last turn": (Turns, "end", no_steps, TURNS, "half counted"),
    "copies without a fence": (test_channels, "fence_async_shared", partition_barrier, COPIES, "before a fence"),
    "rows not delivered": (Ring, "deliver", no_steps, COPIES, "deadlock"),
    "rows delivered before they land": (Ring, "deliver", deliver_at_once, COPIES, "reads"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_fail(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model finds each fault, and by what the fault does."""
    target, name, faulty, case, message = MUTANTS[mutant]
    monkeypatch.setattr(target, name, faulty)
    assert_found(message, lambda rng: run(rng, case.cfg))


HOPPER = Path(gate.__file__).parent
MODEL = Path(grouped_model.__file__).parent
SOURCES = {
    "producer.py": ["_load_weights", "_load_rows", "_end", "_tma_producer", "_copying_producer"],
    "plain.py": ["_product", "skip", "_multiply", "_one_tile", "plain_consumer"],
    "packed.py": ["_numbers", "multiply_packed", "_multiply_rows"],
    "scaled.py": ["_product", "_share", "_pass", "_write_sums", "scaled_consumer"],
    "scales.py": ["copy_scales", "factors_here"],
    "schedule.py": ["tell", "told"],
    "epilogue.py": ["_put_rows", "put", "write"],
}


@pytest.mark.parametrize(("file", "function"), [(file, name) for file, names in SOURCES.items() for name in names])
def test_model_mirrors_the_kernel(file: str, function: str) -> None:
    expected = outline(HOPPER / file, function)
    assert expected
    assert outline(MODEL / file, function) == expected
