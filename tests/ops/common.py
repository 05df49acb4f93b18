"""What tests of the small ops share."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch

from flashinfer.core import replay
from flashinfer.core.select import BackendSupportedError

IMPLEMENTATIONS = ("torch", "triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def force(monkeypatch: pytest.MonkeyPatch, op: str, backend: str, skip: bool = True) -> str:
    """Make "auto" of `flashinfer.ops.<op>` mean `backend`; what that refuses is skipped with its reason, or raises.

    Triton runs through its interpreter where there is no GPU (tests/conftest.py sets it up).
    """
    if backend == "triton":
        pytest.importorskip("triton")
    choice = import_module(f"flashinfer.ops.{op}").CHOICE
    monkeypatch.setattr(choice, "auto", backend)
    replay.forget()
    for name in ("module", "call") if skip else ():
        monkeypatch.setattr(choice, name, _skipping(getattr(choice, name)))
    return backend


def _skipping(chosen: Callable[..., object]) -> Callable[..., object]:
    def choose(*arguments: object) -> object:
        try:
            return chosen(*arguments)
        except BackendSupportedError as refusal:
            pytest.skip(str(refusal))

    return choose


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
