"""Collectives by torch.distributed, on any backend: their meaning, and what runs where no kernel can."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from flashinfer.core.arch import Arch
from flashinfer.ops.collectives.spec import CollectiveSpec, Reduce, word_of
from flashinfer.ops.collectives.workspace import Workspace


def bind(spec: CollectiveSpec, arch: Arch) -> Callable[..., None]:
    """The call `(tensors, workspace, eps)` for one kind of collective."""
    return KINDS[spec.kind](spec)


def _parts(x: torch.Tensor, workspace: Workspace) -> list[torch.Tensor]:
    """`x` of each rank; moved as bytes, since not every backend knows every dtype."""
    mine = x.contiguous().view(torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(workspace.peers.world_size)]
    dist.all_gather(parts, mine, group=workspace.peers.group)
    return [part.view(x.dtype).view(x.shape) for part in parts]


def _sum(x: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    """The sum over ranks, fp32: in their order on the CPU; on GPUs in whatever order NCCL has, in x's dtype."""
    if x.is_cuda:
        total = x.clone()
        dist.all_reduce(total, group=workspace.peers.group)
        return total.float()
    first, *others = _parts(x, workspace)
    total = first.float()
    for part in others:
        total += part
    return total


def all_reduce(spec: CollectiveSpec) -> Callable[[Reduce, Workspace, float], None]:
    @torch.no_grad()
    def run(tensors: Reduce, workspace: Workspace, eps: float) -> None:
        workspace.agree(word_of(spec, tensors.input.numel()))
        total = _sum(tensors.input, workspace)
        if tensors.total is not None:
            tensors.total.copy_(total)
        if tensors.residual is not None:
            total = total + tensors.residual
        if tensors.residual_out is not None:
            tensors.residual_out.copy_(total)
        if tensors.weight is None:
            return
        assert spec.weight_bias is not None
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
        normed = normed * (tensors.weight.float() + spec.weight_bias)
        if tensors.normed is not None:
            tensors.normed.copy_(normed)
        if tensors.quantised is not None:
            assert tensors.scale is not None
            limit = torch.finfo(tensors.quantised.dtype).max
            tensors.quantised.copy_((normed * (1.0 / tensors.scale)).clamp(-limit, limit))

    return run


def all_gather(spec: CollectiveSpec) -> Callable[[torch.Tensor, torch.Tensor, Workspace], None]:
    @torch.no_grad()
    def run(out: torch.Tensor, input: torch.Tensor, workspace: Workspace) -> None:
        workspace.agree(word_of(spec, input.numel()))
        out.copy_(torch.stack(_parts(input, workspace)).view(out.shape))

    return run


def reduce_scatter(spec: CollectiveSpec) -> Callable[[torch.Tensor, torch.Tensor, Workspace], None]:
    @torch.no_grad()
    def run(out: torch.Tensor, input: torch.Tensor, workspace: Workspace) -> None:
        workspace.agree(word_of(spec, out.numel()))
        rank, world_size = workspace.peers.rank, workspace.peers.world_size
        out.copy_(_sum(input, workspace).view(world_size, *out.shape)[rank])

    return run


KINDS: dict[str, Callable[[CollectiveSpec], Callable[..., None]]] = {
    "all_reduce": all_reduce,
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
}
