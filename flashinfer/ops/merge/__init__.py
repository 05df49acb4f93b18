"""Merging of attention states (v, lse), associative and exact for empty sides, as torch ops."""

from __future__ import annotations

import torch

from flashinfer.core import library
from flashinfer.core.arch import Arch
from flashinfer.core.select import Choice, Impl, triton_missing


def _triton_supports(spec: None, arch: Arch) -> str | None:
    return triton_missing(arch)


def _torch_supports(spec: None, arch: Arch) -> str | None:
    return None


IMPLS = (
    Impl("triton", "flashinfer.ops.merge.triton", _triton_supports),
    Impl("torch", "flashinfer.ops.merge.reference", _torch_supports),
)


CHOICE = Choice(IMPLS)


@library.register(
    "merge_pair(Tensor(a!) v, Tensor(b!) s, Tensor? v_a, Tensor? s_a, Tensor v_b, Tensor s_b, Tensor? mask) -> ()"
)
def merge_pair(
    v: torch.Tensor,
    s: torch.Tensor,
    v_a: torch.Tensor | None,
    s_a: torch.Tensor | None,
    v_b: torch.Tensor,
    s_b: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    """(v, s) = a ⊕ b where mask (default: everywhere); without a in place. v `[n, heads, dim]`, s fp32 `[n, heads]`.

    A mask is for calls in place.
    """
    a = (v, s) if v_a is None or s_a is None else (v_a, s_a)
    CHOICE.module(None, v.device).merge_pair(a, (v_b, s_b), (v, s), mask)


@library.register("merge_many(Tensor(a!) out, Tensor(b!) out_s, Tensor v, Tensor s) -> ()")
def merge_many(out: torch.Tensor, out_s: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> None:
    """(out, out_s) = the ⊕ of dimension 1. v `[n, states, heads, dim]`, s fp32 `[n, states, heads]`."""
    CHOICE.module(None, v.device).merge_many(v, s, (out, out_s))


__all__ = ["CHOICE", "IMPLS", "merge_many", "merge_pair"]
