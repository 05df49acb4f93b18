"""As `scales.py` of the kernel."""

from __future__ import annotations

from tests.unit.grouped_model.memory import Channel
from tests.unit.hopper_model import Part, Steps, copy_load


def copy_scales(tiles: Channel, stage: int, place: tuple[int, int]) -> Steps:
    of_rows, of_parts = tiles
    PARTS = of_parts.PARTS
    yield copy_load(Part([of_rows.index(stage)]), ("SX", *place))
    for i in range(PARTS):
        yield copy_load(Part([of_parts.index(stage * PARTS + i)]), (f"SW{i}", *place))


def factors_here(tiles: Channel, stage: int, FIRST_ROW: int, FIRST_PART: int, place: tuple[int, int], PARTS: int
                 ) -> Steps:  # fmt: skip
    of_rows, of_parts = tiles
    ALL = of_parts.PARTS
    yield of_rows.index(stage).slice(FIRST_ROW, 64).load(("SX", *place))
    for i in range(PARTS):
        yield of_parts.index(stage * ALL + FIRST_PART + i).load((f"SW{FIRST_PART + i}", *place))
