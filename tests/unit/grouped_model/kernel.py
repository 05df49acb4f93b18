"""As `kernel.py` of the kernel: one program from its first operation to its last, and what it must leave."""

from __future__ import annotations

from collections import Counter

from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig, Shape
from tests.unit.grouped_model.memory import FIRST_BARRIER, Beside, Rings, Staging
from tests.unit.grouped_model.plain import plain_consumer
from tests.unit.grouped_model.producer import _copying_producer, _tma_producer
from tests.unit.grouped_model.scaled import scaled_consumer
from tests.unit.grouped_model.schedule import NUMBERS, Groups, takes_tail
from tests.unit.hopper_model import Box, Gpu, Readable, Tile, Word, check, mbarrier
from tests.unit.test_channels import Barriers, Ring


def producer_threads(cfg: GemmConfig) -> int:
    return cfg.producer_threads


def arrivals(cfg: GemmConfig) -> int:
    """On the mbarrier of a stage; a warp that copies arrives once."""
    return 1 + cfg.producer_warps if cfg.gathered or cfg.scale_rows > 0 else 1


def _rings(cfg: GemmConfig) -> Rings:
    PARTS = cfg.consumers if cfg.split_rows else 1
    WEIGHT_PARTS = cfg.block_n // cfg.part_columns
    BOXES = 1 if cfg.gathered else cfg.block_m // cfg.row_box
    WEIGHT_BOXES = cfg.block_n // cfg.block_k if cfg.n_major else 1
    FIRST, THREADS = FIRST_BARRIER, producer_threads(cfg)
    rows = Ring(cfg.stages, PARTS, BOXES, FIRST, THREADS, cfg.gathered, cfg.consumers)
    rows.full = Barriers(mbarrier(arrivals(cfg)) for _ in range(cfg.stages))
    weights = Ring(cfg.stages, WEIGHT_PARTS, WEIGHT_BOXES, FIRST, THREADS, False, cfg.consumers, beside=rows)
    tiles = Beside(rows, NUMBERS, Word)
    if cfg.scale_rows > 0:
        return Rings(rows, weights, tiles, (Beside(rows, 1, Readable), Beside(rows, WEIGHT_PARTS, Readable)))
    if cfg.tail > 0:
        return Rings(rows, weights, tiles, Beside(rows, 1, lambda: Box(cfg.tail_bytes)))
    return Rings(rows, weights, tiles, ())


def grouped_kernel(gpu: Gpu, groups: Groups, depth: int, cfg: GemmConfig) -> None:
    rings, counts = _rings(cfg), Shape(0, depth)
    team = tuple(f"producer {warp}" for warp in range(cfg.producer_warps))
    producer = _copying_producer if cfg.gathered else _tma_producer
    for name in team:
        gpu.start(name, 1, producer(rings, groups, counts, cfg), team)
    consumer = scaled_consumer if cfg.scaled else plain_consumer
    for CID in range(cfg.consumers):
        gpu.start(f"consumer {CID}", 4, consumer(rings, Staging(cfg.out_rows), counts, CID, cfg))
    gpu.run()
    check(not any(at.came for at in gpu.barriers), "a named barrier is left half counted")
    check(not any(at.arrivals or at.bytes for at in rings.rows.full), "an mbarrier is left in the middle of a phase")
    check(gpu.written == expected(groups, cfg), "outputs are missing or written twice")


def expected(groups: Groups, cfg: GemmConfig) -> Counter[Tile]:
    """Every row of this program's tiles, once, in all columns."""
    found: Counter[Tile] = Counter()
    for n in groups.mine():
        first, left = groups.firsts[n], groups.rows[n]
        rows = left if cfg.tail > 0 and takes_tail(left, cfg) else min(left, cfg.block_m)
        column = groups.columns[n] * cfg.out_columns
        for row in range(first, first + rows):
            found.update((f"O{n}", row, column + i) for i in range(0, cfg.out_columns, cfg.out_part))
    return found
