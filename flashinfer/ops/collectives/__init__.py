"""Collectives of a group of ranks, as torch ops that write their results to tensors they are given.

What a group holds between calls is a `Workspace`; the ops know it by its number.
"""

from __future__ import annotations

import torch

from flashinfer.core import library
from flashinfer.core.select import Choice, Impl
from flashinfer.ops.collectives.plan import ROW_BYTES, uses_two_shots
from flashinfer.ops.collectives.spec import CollectiveSpec, Reduce
from flashinfer.ops.collectives.support import torch_supports, triton_supports
from flashinfer.ops.collectives.workspace import Workspace, workspace_of

IMPLS = (
    Impl("triton", "flashinfer.ops.collectives.triton", triton_supports),
    Impl("torch", "flashinfer.ops.collectives.reference", torch_supports),
)
CHOICE = Choice(IMPLS)


def reduce(
    tensors: Reduce, workspace: Workspace, eps: float, weight_bias: float, two_shot: bool | None, backend: str = "auto"
) -> None:
    """All-reduce, and what `tensors` asks for beside it. two_shot: None leaves the algorithm to the number of bytes."""
    input = tensors.input
    num_bytes, world_size = input.numel() * input.element_size(), workspace.peers.world_size
    if num_bytes == 0:
        return
    normed = tensors.weight is not None
    spec = CollectiveSpec(
        "all_reduce",
        input.dtype,
        input.shape[-1] if normed else ROW_BYTES // input.element_size(),
        world_size,
        uses_two_shots(num_bytes, world_size) if two_shot is None else two_shot,
        tensors.residual is not None,
        weight_bias if normed else None,
        None if tensors.quantised is None else tensors.quantised.dtype,
        workspace.unreachable,
    )
    CHOICE.call(spec, input.device, backend)(tensors, workspace, eps)


def share(kind: str, out: torch.Tensor, input: torch.Tensor, workspace: Workspace, backend: str = "auto") -> None:
    """All-gather or reduce-scatter over the first dimension."""
    if input.numel() == 0:
        return
    cols, world_size = ROW_BYTES // input.element_size(), workspace.peers.world_size
    spec = CollectiveSpec(kind, input.dtype, cols, world_size, unreachable=workspace.unreachable)
    CHOICE.call(spec, input.device, backend)(out, input, workspace)


@library.register(
    "all_reduce(Tensor input, Tensor(a!)? total, Tensor? residual, Tensor(b!)? residual_out, Tensor(c!)? normed, "
    "Tensor? weight, Tensor(d!)? quantised, Tensor? scale, int workspace, float eps, float weight_bias, "
    "bool? two_shot) -> ()"
)
def all_reduce(
    input: torch.Tensor,
    total: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    normed: torch.Tensor | None,
    weight: torch.Tensor | None,
    quantised: torch.Tensor | None,
    scale: torch.Tensor | None,
    workspace: int,
    eps: float,
    weight_bias: float,
    two_shot: bool | None,
) -> None:
    """`total = sum over ranks of input`, and what follows from it (`Reduce`)."""
    tensors = Reduce(input, total, residual, residual_out, normed, weight, quantised, scale)
    reduce(tensors, workspace_of(workspace), eps, weight_bias, two_shot)


@library.register("all_gather(Tensor(a!) out, Tensor input, int workspace) -> ()")
def all_gather(out: torch.Tensor, input: torch.Tensor, workspace: int) -> None:
    """`out[rank] = input of that rank`, out `[world_size * n, ...]` for input `[n, ...]`."""
    share("all_gather", out, input, workspace_of(workspace))


@library.register("reduce_scatter(Tensor(a!) out, Tensor input, int workspace) -> ()")
def reduce_scatter(out: torch.Tensor, input: torch.Tensor, workspace: int) -> None:
    """`out = sum over ranks of their input[this rank]`, input `[world_size * n, ...]` for out `[n, ...]`."""
    share("reduce_scatter", out, input, workspace_of(workspace))


__all__ = [
    "CHOICE",
    "IMPLS",
    "CollectiveSpec",
    "Reduce",
    "Workspace",
    "all_gather",
    "all_reduce",
    "reduce",
    "reduce_scatter",
    "share",
]
