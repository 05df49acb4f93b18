"""The records of an all-to-all: what kind it is (host values), and the tensors it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

# The kinds of calls, in the order in which they come.
DISPATCH, COMBINE = 0, 1


@dataclass(frozen=True)
class Row:
    """What a payload holds of one token: `words` words of `size` bytes, 4, 2 or 1."""

    words: int
    size: int

    @property
    def num_bytes(self) -> int:
        return self.words * self.size


@dataclass(frozen=True)
class DispatchSpec:
    """One kind of dispatch.

    Expert e is on rank `e // (num_experts // world_size)`. rows: of the payloads. ids: which payload gets
    `invalid_id` in the rows that no token fills, -1 if none. unreachable: why kernels cannot work on all ranks'
    memory, None if they can.
    """

    world_size: int
    num_experts: int
    top_k: int
    rows: tuple[Row, ...]
    ids: int = -1
    unreachable: str | None = None


@dataclass(frozen=True)
class CombineSpec:
    """One kind of combine: rows of `hidden_size` elements of dtype come back, sums are rounded to out_dtype."""

    world_size: int
    hidden_size: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    unreachable: str | None = None


class Call(NamedTuple):
    """What all ranks say alike about one call.

    tokens_per_rank: rows that each rank has for each other rank; none has more tokens. half: which half of the memory
    the call uses. active: bit r is set if rank r takes part. offset: of combine's rows in a half, in bytes.
    """

    tokens_per_rank: int
    half: int
    active: int
    offset: int = 0


class Dispatch(NamedTuple):
    """The tensors of a dispatch, on one device.

    experts: int32 `[tokens, top_k]`, contiguous; a number that no expert has is sent nowhere. payloads:
    `[tokens, ...]`, each row contiguous. received: contiguous `[world_size, tokens_per_rank, ...]`, row (r, i) being
    the i-th token that rank r sent here. counts: int32 `[world_size]`, how many each rank sent. slots: int32
    `[tokens, world_size]`, contiguous: token t is row `slots[t, d]` of this rank's on rank d, -1 if it was not sent
    there. invalid_id: of payload `spec.ids`.
    """

    experts: torch.Tensor
    payloads: tuple[torch.Tensor, ...]
    received: tuple[torch.Tensor, ...]
    counts: torch.Tensor
    slots: torch.Tensor
    invalid_id: int = -1


class Combine(NamedTuple):
    """The tensors of a combine, on one device.

    out: `[tokens, hidden_size]`, innermost stride 1: for each token the sum, in fp32 and in the order of ranks, of what
    came back. payload: `[world_size, tokens_per_rank, hidden_size]`, innermost stride 1: what became of the received
    rows; those that no token fills are not read. slots: of the dispatch.
    """

    out: torch.Tensor
    payload: torch.Tensor
    slots: torch.Tensor


# Bytes of each region of a half: what begins in a half begins at a multiple.
ALIGNMENT = 256


def region_bytes(row_bytes: int, world_size: int, tokens_per_rank: int) -> int:
    """Bytes of the rows of all ranks, up to where the next region may begin."""
    return -(-row_bytes * world_size * tokens_per_rank // ALIGNMENT) * ALIGNMENT


def row_of(shape: tuple[int, ...], itemsize: int, stride: int) -> Row:
    """A row of a payload `[tokens, *shape]` whose tokens lie `stride` elements apart."""
    num_bytes = itemsize
    for n in shape:
        num_bytes *= n
    size = next(size for size in (4, 2, 1) if num_bytes % size == 0 and stride * itemsize % size == 0)
    return Row(num_bytes // size, size)
