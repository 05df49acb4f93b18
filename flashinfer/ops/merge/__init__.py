"""Merging of attention states (v, lse): associative, exact for empty sides."""

from __future__ import annotations

from types import ModuleType

import torch

from flashinfer.core.arch import Arch, arch_of
from flashinfer.core.select import Impl, select, triton_missing

State = tuple[torch.Tensor, torch.Tensor]


def _triton_supports(spec: None, arch: Arch) -> str | None:
    return triton_missing(arch)


def _torch_supports(spec: None, arch: Arch) -> str | None:
    return None


IMPLS = (
    Impl("triton", "flashinfer.ops.merge.triton", _triton_supports),
    Impl("torch", "flashinfer.ops.merge.reference", _torch_supports),
)


def merge_pair(a: State, b: State, out: State, mask: torch.Tensor | None = None, backend: str = "auto") -> None:
    """out = a ⊕ b where mask (default: everywhere); `out` may be `a`. v `[n, heads, dim]`, s fp32 `[n, heads]`."""
    _impl(a[0], backend).merge_pair(a, b, out, mask)


def merge_many(v: torch.Tensor, s: torch.Tensor, out: State, backend: str = "auto") -> None:
    """out = the ⊕ of dimension 1. v `[n, states, heads, dim]`, s fp32 `[n, states, heads]`."""
    _impl(v, backend).merge_many(v, s, out)


def _impl(v: torch.Tensor, backend: str) -> ModuleType:
    return select(IMPLS, None, arch_of(v.device), backend).load()
