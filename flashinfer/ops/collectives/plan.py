"""How a collective is done: which algorithm for how many bytes, and how it is cut into rows."""

from __future__ import annotations

from dataclasses import dataclass

# A row of a plain collective, in bytes; one with a norm has the rows of its tensor.
ROW_BYTES = 8192
# Elements of a row that is sent in fp8; a multiple of what one scale is for.
FP8_COLS = 4096
# Most bytes a rank receives in one shot; beyond, sums of two shots spare the links. Measured on two H200s
# (2026-11-22): equal at 1.5 MiB sent to the other rank; as each rank sends to all others, it shrinks with their number.
ONE_SHOT_BYTES = 3 << 19
# Most bytes of a tensor that go through the mailboxes at once; more goes in several launches.
LAUNCH_BYTES = 16 << 20
# Most bytes of a rank's part in an all-gather by our kernel: at 4 MiB it had 1.3 to 1.8 times NCCL's speed, at 16 MiB
# 0.8 to 1.0 (h200x2-comm-2026-11-22-29d4c07.json).
SHARE_BYTES = 8 << 20


@dataclass(frozen=True)
class Region:
    """A region of the mailboxes, in rows. places: rows of the tensors that it takes. turn: rows of one of its turns."""

    places: int
    turn: int


def uses_two_shots(num_bytes: int, world_size: int) -> bool:
    """Whether an all-reduce of `num_bytes` takes two shots."""
    return num_bytes * max(world_size - 1, 1) > ONE_SHOT_BYTES


def one_shot_region(row_bytes: int, max_bytes: int, world_size: int) -> Region:
    """Room for what goes in one shot: each rank's row for each row."""
    num_bytes = min(max_bytes, ONE_SHOT_BYTES // max(world_size - 1, 1))
    places = max(-(-num_bytes // row_bytes), 1)
    return Region(places, places * world_size)


def two_shot_region(row_bytes: int, max_bytes: int, world_size: int) -> Region:
    """Room for two shots: for every `world_size` rows, one row of each rank and the sums."""
    rows = -(-min(max_bytes, LAUNCH_BYTES) // row_bytes)
    rounds = max(-(-rows // world_size), 1)
    return Region(rounds * world_size, rounds * world_size * 2)
