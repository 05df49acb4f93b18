"""Choosing an implementation: the first row of a table that accepts, or an error with every reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from flashinfer.core.arch import Arch
from flashinfer.core.config import config


class BackendSupportedError(Exception):
    """A named backend cannot run this problem; the message says why."""


@dataclass(frozen=True)
class Impl:
    """One row of an op's table.

    module: dotted path, imported at first use. supports: `(spec, arch) -> None` or the reason why not. layout: the
    same of the tensors of a run, whose strides and addresses no plan knows.
    """

    name: str
    module: str
    supports: Callable[[Any, Arch], str | None]
    layout: Callable[[Any], str | None] = lambda tensors: None

    def load(self) -> ModuleType:
        return import_module(self.module)


@cache
def triton_missing(arch: Arch) -> str | None:
    """Why no Triton kernel runs on `arch` in this process, or None; looked up once, since every plan asks."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if arch.is_cpu and not config().triton_interpret:
        return "CPU tensors run on Triton only through its interpreter (set TRITON_INTERPRET=1 before the first import)"
    return None


# What the original library's backend names mean here. On the CPU everything is torch unless Triton is asked for by its
# own name: its interpreter is for tests.
GPU_ALIASES = {"fa2": "triton", "fa3": "gluon_sm90"}
CPU_ALIASES = {"auto": "torch", "fa2": "torch", "fa3": "torch"}


def wanted_name(arch: Arch, request: str) -> str:
    """The table's name for what the caller asked for; "auto" stays."""
    return (CPU_ALIASES if arch.is_cpu else GPU_ALIASES).get(request, request)


def select(impls: Sequence[Impl], spec: object, arch: Arch, request: str = "auto") -> Impl:
    """The implementation that runs `spec` on `arch`.

    request: "auto" takes the first row that accepts; any other name is that row or an error.
    Raises ValueError for an unknown name, BackendSupportedError with every reason.
    """
    wanted = wanted_name(arch, request)
    names = [impl.name for impl in impls]
    if wanted != "auto" and wanted not in names:
        if wanted != request:
            raise BackendSupportedError(f"backend {request!r} is {wanted!r} here, which this op does not have.")
        known = ", ".join(repr(n) for n in dict.fromkeys(["auto", *names, *GPU_ALIASES]))
        raise ValueError(f"backend: got {request!r}, expected one of {known}. Pass one of these as backend.")
    reasons = []
    for impl in impls:
        if wanted in ("auto", impl.name):
            reason = impl.supports(spec, arch)
            if reason is None:
                return impl
            reasons.append(f"{impl.name}: {reason}")
    raise BackendSupportedError(
        f"no implementation runs this on {arch.name} (backend={request!r}): {'; '.join(reasons)}"
    )
