"""Mixture of experts: tokens go to the experts that a router chose, and come back as weighted sums."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from flashinfer.core import library
from flashinfer.core.replay import replayed
from flashinfer.core.scratch import Needs, Scratch
from flashinfer.core.select import Choice, Impl
from flashinfer.ops.gemm import Activation, Weights
from flashinfer.ops.moe.spec import BLOCK, Experts, MoE, MoESpec, Routes
from flashinfer.ops.moe.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.moe.triton", triton_supports),
    Impl("torch", "flashinfer.ops.moe.reference", torch_supports),
)
CHOICE = Choice(IMPLS)


_needs = Needs()


def scratch_for(
    out: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor
) -> torch.Tensor | None:
    """Scratch memory for a call of such tensors; None before the first one, which finds out how much it takes."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return None
    return _needs.buffer(_kind_of(out, x, ids, fc1, fc2), x.device)


def _kind_of(*tensors: torch.Tensor) -> Hashable:
    return tensors[0].device, *((t.shape, t.dtype) for t in tensors)


def moe(
    x: torch.Tensor,
    routes: Routes,
    experts: Experts,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    scratch: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`out[t] = sum_j weights[t, j] * expert(ids[t, j])(x[t])` over the experts held here, `[tokens, H]`.

    out_dtype: of a new result; default: that of x, bf16 for fp8. scratch: of `scratch_for`; new if None. Deterministic;
    group sizes stay on the device, so it can be captured in a CUDA graph and replayed for other ids. Of one rank of
    several, the ranks' results add up. Checks nothing; callers do (`flashinfer.fused_moe`).
    """
    fc1, fc2, activation, *others = experts
    if out is None:
        dtype = out_dtype or (torch.bfloat16 if x.dtype.itemsize == 1 else x.dtype)
        out = torch.empty(x.shape[0], fc2.values.shape[1], dtype=dtype, device=x.device)
    if scratch is None:
        scratch = scratch_for(out, x, routes.ids, fc1.values, fc2.values)
    _run(
        out,
        x,
        (routes.ids, routes.weights),
        (fc1.values, fc2.values),
        (fc1.scale, fc2.scale, fc1.global_scale, fc2.global_scale, *others, *activation[1:]),
        (fc1.kind, activation.kind, backend),
        routes.first_expert,
        scratch,
    )
    return out


@replayed
def _run(out: torch.Tensor, x: torch.Tensor, *others: Any) -> None:
    """`run`, with tuples for lists."""
    *lists, first_expert, scratch = others
    run(out, x, *map(list, lists), first_expert, scratch)


@library.register(
    "moe(Tensor(a!) out, Tensor x, Tensor[] routes, Tensor[] weights, Tensor?[] others, str[] names, int first_expert,"
    " Tensor(b!)? scratch) -> ()"
)
def run(
    out: torch.Tensor,
    x: torch.Tensor,
    routes: list[torch.Tensor],
    weights: list[torch.Tensor],
    others: list[torch.Tensor | None],
    names: list[str],
    first_expert: int,
    scratch: torch.Tensor | None,
) -> None:
    """`moe` of tensors: the fields of its records, in the order in which `moe` gives them; then the backend."""
    scale1, scale2, global1, global2, bias1, bias2, hidden_scale, *parameters = others
    kind, activation, backend = names
    experts = Experts(
        Weights(weights[0], None, scale1, kind, global1),
        Weights(weights[1], None, scale2, kind, global2),
        Activation(activation, *parameters),
        bias1,
        bias2,
        hidden_scale,
    )
    tensors = MoE(out, x, Routes(routes[0], routes[1], first_expert), experts)
    if out.numel() > 0:
        memory = Scratch(x, scratch)
        CHOICE.call(tensors.spec, out.device, backend)(tensors, memory)
        _needs.note(_kind_of(out, x, routes[0], *weights), memory.needed)


__all__ = ["BLOCK", "CHOICE", "IMPLS", "Experts", "MoE", "MoESpec", "Routes", "moe", "run", "scratch_for"]
