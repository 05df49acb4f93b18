"""As `epilogue.py` of the kernel. Results are counted row by row: ("O", row, first column of a store)."""

from __future__ import annotations

from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig
from tests.unit.grouped_model.memory import Place, Staging, Sums
from tests.unit.hopper_model import (
    Steps,
    Tile,
    check,
    fence_async_shared,
    partition_barrier,
    plain_store,
    tma_store,
    tma_store_wait,
)


def _put_rows(staging: Staging, value: Tile, left: int) -> Steps:
    yield staging.load(value)
    yield plain_store(value, 1, min(left, staging.shape[0]))


def put(staging: Staging, place: Place, BOX: bool) -> Steps:
    group, row, left, column = place
    value = (f"O{group}", row, column)
    yield tma_store_wait(0)
    yield partition_barrier()
    yield staging.store(value)
    if BOX:
        if left >= staging.shape[0]:
            yield fence_async_shared()
            yield tma_store(value, staging.box, staging.shape[0])
        else:
            yield from _put_rows(staging, value, left)
    else:
        yield from _put_rows(staging, value, left)


def write(x: Sums, staging: Staging, place: Place, BOX: bool, cfg: GemmConfig) -> Steps:
    check(x.shape[0] == staging.shape[0], "sums of other rows than are stored at once")
    WIDTH = cfg.out_part * (2 if cfg.gated else 1)
    PARTS = x.shape[1] // WIDTH
    for i in range(PARTS):
        yield from put(staging, place._replace(column=place.column + i * cfg.out_part), BOX)
