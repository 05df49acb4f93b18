"""Mixture of experts: tokens go to the experts that a router chose, and come back as weighted sums."""

from __future__ import annotations

import torch

from flashinfer.core import library
from flashinfer.core.select import Choice, Impl
from flashinfer.ops.gemm import Activation, Weights
from flashinfer.ops.moe.spec import BLOCK, Experts, MoE, MoESpec, Routes
from flashinfer.ops.moe.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.moe.triton", triton_supports),
    Impl("torch", "flashinfer.ops.moe.reference", torch_supports),
)
CHOICE = Choice(IMPLS)


def moe(
    x: torch.Tensor,
    routes: Routes,
    experts: Experts,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`out[t] = sum_j weights[t, j] * expert(ids[t, j])(x[t])` over the experts held here, `[tokens, H]`.

    out_dtype: of a new result; default: that of x, bf16 for fp8. Deterministic; group sizes stay on the device, so it
    can be captured in a CUDA graph and replayed for other ids. Of one rank of several, the ranks' results add up.
    Checks nothing; callers do (`flashinfer.fused_moe`).
    """
    if out is None:
        dtype = out_dtype or (torch.bfloat16 if x.dtype.itemsize == 1 else x.dtype)
        hidden_size = experts.fc2.values.shape[1]
        out = torch.empty(x.shape[0], hidden_size, dtype=dtype, device=x.device)
    fc1, fc2, activation, *others = experts
    run(
        out,
        x,
        [routes.ids, routes.weights],
        [fc1.values, fc2.values],
        [fc1.scale, fc2.scale, fc1.global_scale, fc2.global_scale, *others, *activation[1:]],
        [fc1.kind, activation.kind],
        routes.first_expert,
        backend,
    )
    return out


@library.register(
    "moe(Tensor(a!) out, Tensor x, Tensor[] routes, Tensor[] weights, Tensor?[] others, str[] kinds, int first_expert,"
    " str backend) -> ()"
)
def run(
    out: torch.Tensor,
    x: torch.Tensor,
    routes: list[torch.Tensor],
    weights: list[torch.Tensor],
    others: list[torch.Tensor | None],
    kinds: list[str],
    first_expert: int,
    backend: str,
) -> None:
    """`moe` of tensors: the fields of its records, in the order in which `moe` gives them."""
    scale1, scale2, global1, global2, bias1, bias2, hidden_scale, *parameters = others
    kind, activation = kinds
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
        CHOICE.call(tensors.spec, out.device, backend)(tensors)


__all__ = ["BLOCK", "CHOICE", "IMPLS", "Experts", "MoE", "MoESpec", "Routes", "moe", "run"]
