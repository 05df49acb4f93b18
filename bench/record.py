"""What a measured problem is made of: its shape, inputs, call, peers and reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Shape(Protocol):
    """What every op's shape record tells."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def num_flops(self) -> int: ...
    def fields(self) -> dict[str, Any]:
        """The parameters, for JSON."""
        ...


def nothing() -> None:
    """For calls that have nothing to plan or to reset."""


def short_error(error: Exception) -> str:
    """Its type and first line, for results files."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@dataclass(frozen=True)
class Call:
    """The public API bound to one set of inputs.

    run: writes `out`, which is full of NaN before the first call. reset: makes the inputs new again before a run whose
    result counts, for calls that work in place.
    """

    plan: Callable[[], object]
    run: Callable[[], object]
    out: torch.Tensor
    reset: Callable[[], object] = nothing


@dataclass(frozen=True)
class Sample:
    """A part of the output, computed without the package.

    label: for messages. rows: indices into the output's first dimension. exact: those rows in fp64. same_dtype: the
    same by torch in the row's own dtype. terms: how many products a result sums up.
    """

    label: str
    rows: torch.Tensor
    exact: torch.Tensor
    same_dtype: torch.Tensor
    terms: int


@dataclass(frozen=True)
class Peer:
    """Something to compare with.

    open: `(shape, inputs)` -> context whose value is the call to time. layout: turns that call's result into the
    row's output, so that the correctness gate holds for the peer too; None when it computes something else. shape: what
    it computes, where that is another shape than the row's.
    """

    name: str
    open: Callable[[Any, Any], AbstractContextManager[Callable[[], torch.Tensor]]]
    layout: Callable[[torch.Tensor], torch.Tensor] | None
    shape: Callable[[Any], Shape] | None = None

    def computes(self, shape: Shape) -> Shape:
        """The shape of its problem in a row of `shape`."""
        return shape if self.shape is None else self.shape(shape)

    def work(self, shape: Shape) -> float:
        """Flops of a row of `shape` over its own, so that times of different shapes compare by time per flop."""
        return 1.0 if self.shape is None else shape.num_flops / self.shape(shape).num_flops


@dataclass(frozen=True)
class Row:
    """One measured problem.

    device: "cuda" or "cpu". make: `(shape, generator)` -> fresh random inputs on the generator's device.
    call: `(shape, inputs)` -> the public API. samples: `(shape, inputs, generator)` -> what the output is checked with.
    graphs: also time calls inside CUDA graphs, where there are any; not for calls that work in place.
    """

    name: str
    op: str
    device: str
    shape: Shape
    make: Callable[[Any, torch.Generator], Any]
    call: Callable[[Any, Any], Call]
    peers: tuple[Peer, ...]
    samples: Callable[[Any, Any, torch.Generator], Iterator[Sample]]
    graphs: bool = False


def nan_like(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, float("nan"))


@contextmanager
def _open_copy(shape: Shape, inputs: Any) -> Iterator[Callable[[], torch.Tensor]]:
    """A device copy that moves (reads plus writes) as many bytes as the row must."""
    source = torch.empty(shape.num_bytes // 2, dtype=torch.uint8, device=inputs.device).random_()
    target = torch.empty_like(source)
    yield lambda: target.copy_(source)


COPY = Peer("copy_same_bytes", _open_copy, None)
