"""Tiles of all programs, and how one of these learns of its own."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from itertools import accumulate, count
from typing import Any

from flashinfer.ops.gemm.gluon_sm90 import schedule
from tests.unit.grouped_model.memory import Beside
from tests.unit.hopper_model import Operation, Steps

NUMBERS = 4
takes_tail: Any = schedule.takes_tail.fn
Found = tuple[bool, int, int, int, int]


class Groups:
    """Tile n is of group n. rows: of its group from its first row on. program: which of `programs` this one is.

    counted: tiles are taken from a counter, from which others take too.
    """

    def __init__(self, rng: random.Random, rows: list[int], programs: int, counted: bool) -> None:
        self.rows, self.programs, self.program = rows, programs, rng.randrange(programs)
        self.firsts = [rng.randrange(10_000) for _ in rows]
        self.columns = [rng.randrange(10) for _ in rows]
        self.taken = accumulate(rng.randrange(programs) + (i > 0) for i in count()) if counted else None
        self.after: dict[int, int] = {}

    def mine(self) -> Iterator[int]:
        """The tiles of this program."""
        place = self.program
        while place < len(self.rows):
            yield place
            place = place_after(self, place)


def tile_at(groups: Groups, counts: object, place: int) -> Found:
    if place >= len(groups.rows):
        return False, 0, 0, 0, 0
    return True, place, groups.firsts[place], groups.rows[place], groups.columns[place]


def place_after(groups: Groups, place: int) -> int:
    """All warps of a program get one answer."""
    if groups.taken is None:
        return place + groups.programs
    if place not in groups.after:
        groups.after[place] = groups.programs + next(groups.taken)
    return groups.after[place]


def tell(memory: Beside, stage: int, group: int, row: int, left: int, column_tile: int) -> Steps:
    numbers = (group, row, left, column_tile)
    for i in range(NUMBERS):
        yield memory.index(stage * NUMBERS + i).store(numbers[i])


def told(memory: Beside, stage: int) -> Generator[Operation, None, list[int]]:
    numbers: list[int] = []
    for i in range(NUMBERS):
        yield memory.index(stage * NUMBERS + i).load(numbers)
    return numbers
