"""As `packed.py` of the kernel."""

from __future__ import annotations

from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig, Shape
from tests.unit.grouped_model.epilogue import write
from tests.unit.grouped_model.memory import Place, Registers, Rings, Staging, Sums
from tests.unit.hopper_model import Part, Steps, warpgroup_mma, warpgroup_mma_wait
from tests.unit.test_channels import Ring

ROWS = 64


def _numbers(weights: Ring, n: int, CID: int, at: tuple[int, int]) -> Steps:
    yield weights.part(n, CID).load(("W", *at))


def _operand(left: Registers, at: tuple[int, int]) -> Steps:
    yield left.store(("L", *at))


def multiply_packed(rings: Rings, staging: Staging, counts: Shape, done: int, place: Place, CID: int, cfg: GemmConfig
                    ) -> Steps:  # fmt: skip
    if cfg.block_m > cfg.out_rows:
        if place[2] <= cfg.out_rows:
            yield from _multiply_rows(rings, staging, counts, done, place, cfg.out_rows, CID, cfg)
        else:
            yield from _multiply_rows(rings, staging, counts, done, place, cfg.block_m, CID, cfg)
    else:
        yield from _multiply_rows(rings, staging, counts, done, place, cfg.block_m, CID, cfg)


def _multiply_rows(rings: Rings, staging: Staging, counts: Shape, done: int, place: Place, COUNT: int, CID: int,
                   cfg: GemmConfig) -> Steps:  # fmt: skip
    rows, weights = rings.rows, rings.weights
    last = done + (counts.depth + cfg.block_k - 1) // cfg.block_k - 1
    group, row, rest, column = place
    left = Registers()
    yield from rows.wait(done)
    yield from _numbers(weights, done, CID, (group, 0))
    for n in range(done, last):
        at = (group, n - done)
        yield from _operand(left, at)
        yield warpgroup_mma((Part([left]), ("L", *at)), (rows.part(n, 0).slice(0, COUNT), ("X", *at)))
        yield from rows.wait(n + 1)
        yield from _numbers(weights, n + 1, CID, (group, n + 1 - done))
        yield from rows.wait(n + 1)
        yield warpgroup_mma_wait(0)
        yield from rows.release(n)
    at = (group, last - done)
    yield from _operand(left, at)
    yield warpgroup_mma((Part([left]), ("L", *at)), (rows.part(last, 0).slice(0, COUNT), ("X", *at)))
    yield warpgroup_mma_wait(0)
    yield from rows.release(last)
    for i in range(COUNT // cfg.out_rows):
        there = Place(group, row + i * cfg.out_rows, rest - i * cfg.out_rows, column)
        yield from write(Sums((cfg.out_rows, ROWS)), staging, there, True, cfg)
