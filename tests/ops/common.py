"""What tests of the small ops share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def force_backend(monkeypatch: pytest.MonkeyPatch, ops: ModuleType, entry: str, backend: str) -> None:
    """Have the registered ops of `ops`, which all run through its function `entry`, use one implementation."""
    monkeypatch.setattr(ops, entry, partial(getattr(ops, entry), backend=backend))


def skip_unless_runs(backend: str, *dtypes: torch.dtype) -> None:
    """Skip what Triton's interpreter gets wrong: it truncates in conversions to bf16."""
    if backend == "triton" and DEVICE == "cpu" and torch.bfloat16 in dtypes:
        pytest.skip("the interpreter does not round to bf16")


def captured(run: Callable[[], object], *generators: torch.Generator) -> torch.cuda.CUDAGraph:
    """`run` warmed up on a side stream, then captured; generators: those it draws from besides the default one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        run()
    return graph


def far_rows(stride: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal `[rows, width]` of the distance `stride`, the last row beginning 2^31 elements or more after the first."""
    rows = -(-(2**31) // stride) + 1
    room = torch.empty((rows - 1) * stride + width, dtype=dtype, device=DEVICE)
    x = room.as_strided((rows, width), (stride, 1))
    return x.copy_(torch.randn(rows, width, device=DEVICE))
