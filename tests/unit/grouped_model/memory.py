"""What the kernel allocates, and what its roles are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flashinfer.device import channels
from tests.unit.hopper_model import Box, Operation, Part, Readable, Tile, check
from tests.unit.test_channels import Ring

FIRST_BARRIER: int = channels.FIRST_BARRIER.value


class Beside(Ring):
    """Memory that comes and goes with a ring's tiles."""

    def __init__(self, beside: Ring, per_stage: int, cell: Callable[[], Any]) -> None:
        super().__init__(beside.STAGES, per_stage, per_stage, beside.EMPTY, 0, False, beside=beside)
        self.boxes = [cell() for _ in self.boxes]

    def index(self, i: int) -> Any:
        return self.boxes[i]


class Rings(NamedTuple):
    """As the kernel's. tiles: `Word`; beside: `Box` of tails, or those of rows' and of weights' scales."""

    rows: Ring
    weights: Ring
    tiles: Beside
    beside: Any


class Place(NamedTuple):
    """A warpgroup's share of a tile, as the kernel's places: left: rows of the group from `row` on."""

    group: int
    row: int
    left: int
    column: int


class Sums(NamedTuple):
    shape: tuple[int, int]


class Staging:
    """`rows` of the memory through which a warpgroup's results leave."""

    def __init__(self, rows: int, box: Readable | None = None) -> None:
        self.shape, self.box = (rows,), box or Readable()

    def slice(self, begin: int, rows: int) -> Staging:
        assert begin == 0
        return Staging(rows, self.box)

    def store(self, tile: Tile) -> Operation:
        return self.box.store(tile)

    def load(self, tile: Tile) -> Operation:
        return self.box.load(tile)


class Registers(Box):
    """A left operand: products that read it must be over before it is written again."""

    def store(self, tile: Tile, reads: int = 0) -> Operation:
        def operation(gpu: object, me: object) -> None:
            check(not self.readers, f"registers of {self.holds} written while they are read")
            self.holds = tile

        return operation


Channel = tuple[Beside, Beside]
Operand = tuple[Part, Tile]
