"""Collectives by torch.distributed, on any backend: their meaning, and what runs where no kernel can."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from flashinfer.core.arch import Arch
from flashinfer.core.peers import gather_into, scatter_sums
from flashinfer.ops.collectives.spec import CollectiveSpec, Mix, Reduce, word_of
from flashinfer.ops.collectives.workspace import Workspace


def bind(spec: CollectiveSpec, arch: Arch) -> Callable[..., None]:
    """The call `(tensors, workspace, eps)` for one kind of collective."""
    return KINDS[spec.kind](spec)


def _parts(x: torch.Tensor, workspace: Workspace) -> list[torch.Tensor]:
    """`x` of each rank; moved as bytes, since not every backend knows every dtype."""
    mine = x.contiguous().view(-1).view(torch.uint8)
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


def mixed(input: torch.Tensor, mix: Mix) -> torch.Tensor:
    """The rows that a rank reduces, `[num_rows, hidden_size]`."""
    rows = input.view(-1, input.shape[-1]).float()
    if mix.table is not None:
        place = mix.table.view(mix.num_rows, mix.num_parts).long()
        parts = rows[place.clamp(min=0)].masked_fill(place[..., None] < 0, 0.0)
        factors = None if mix.factors is None else mix.factors.view(place.shape).float()
        factors = None if factors is None else factors.masked_fill(place < 0, 0.0)
    else:
        parts = rows.view(mix.num_parts, mix.num_rows, -1).transpose(0, 1)
        factors = None if mix.factors is None else mix.factors.view(mix.num_parts, mix.num_rows).T.float()
    total = (parts if factors is None else parts * factors[..., None]).sum(1) * mix.scale
    if mix.added is not None:
        total += mix.added.view(total.shape)
    return total.to(input.dtype)


def _quantise(normed: torch.Tensor, tensors: Reduce) -> None:
    codes = tensors.quantised
    assert codes is not None
    limit = torch.finfo(codes.dtype).max
    if tensors.scales is not None:
        scales = normed.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1, keepdim=True).clamp(min=2.0**-9) / limit
        tensors.scales.view(scales.shape).copy_(scales)
        normed = normed / scales
    elif tensors.scale is not None:
        normed = normed * (1.0 / tensors.scale)
    codes.copy_(normed.clamp(-limit, limit))


def all_reduce(spec: CollectiveSpec) -> Callable[[Reduce, Mix | None, Workspace, float], None]:
    @torch.no_grad()
    def run(tensors: Reduce, mix: Mix | None, workspace: Workspace, eps: float) -> None:
        mine = tensors.input if mix is None else mixed(tensors.input, mix)
        workspace.agree(word_of(spec, mine.numel()))
        total = _sum(mine, workspace)
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
            _quantise(normed, tensors)

    return run


def rounded_to_fp8(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """fp32 `x` as it is after sending: e4m3 times the scale of each `group_size` elements, row after row."""
    groups = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % group_size)).view(-1, group_size)
    scale = groups.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(-1, keepdim=True).clamp(min=2.0**-100) / 448.0
    sent = (groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale
    return sent.flatten()[: x.numel()].view(x.shape)


def all_reduce_fp8(spec: CollectiveSpec) -> Callable[[torch.Tensor, torch.Tensor, Workspace], None]:
    @torch.no_grad()
    def run(out: torch.Tensor, input: torch.Tensor, workspace: Workspace) -> None:
        workspace.agree(word_of(spec, input.numel()))
        parts = [rounded_to_fp8(part.float(), spec.group_size) for part in _parts(input, workspace)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        out.copy_(rounded_to_fp8(total, spec.group_size))

    return run


def all_gather(spec: CollectiveSpec) -> Callable[[torch.Tensor, torch.Tensor, Workspace], None]:
    @torch.no_grad()
    def run(out: torch.Tensor, input: torch.Tensor, workspace: Workspace) -> None:
        workspace.agree(word_of(spec, input.numel()))
        # As bytes, since not every backend knows every dtype.
        received, mine = (x.view(-1).view(torch.uint8) for x in (out, input))
        gather_into(received, mine, group=workspace.peers.group)

    return run


def reduce_scatter(spec: CollectiveSpec) -> Callable[[torch.Tensor, torch.Tensor, Workspace], None]:
    @torch.no_grad()
    def run(out: torch.Tensor, input: torch.Tensor, workspace: Workspace) -> None:
        workspace.agree(word_of(spec, out.numel()))
        rank, world_size = workspace.peers.rank, workspace.peers.world_size
        if out.is_cuda and workspace.peers.has_nccl:
            scatter_sums(out.view(-1), input.view(-1), group=workspace.peers.group)
            return
        out.copy_(_sum(input, workspace).view(world_size, *out.shape)[rank])

    return run


KINDS: dict[str, Callable[[CollectiveSpec], Callable[..., None]]] = {
    "all_reduce": all_reduce,
    "all_reduce_fp8": all_reduce_fp8,
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
}
