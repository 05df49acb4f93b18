"""The all-to-all by torch.distributed, on any backend: its meaning, and what runs where no kernel can.

Each rank sends all others equally many rows, filled or not, so that nobody waits for counts: it can be captured in a
CUDA graph with NCCL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from flashinfer.core import check
from flashinfer.core.arch import Arch
from flashinfer.core.select import BackendSupportedError
from flashinfer.ops.alltoall.room import Room
from flashinfer.ops.alltoall.spec import Call, Combine, CombineSpec, Dispatch, DispatchSpec


def bind(spec: DispatchSpec | CombineSpec, arch: Arch) -> Callable[..., None]:
    """The call `(room, call, tensors)` for one kind."""
    return partial(dispatch, spec) if isinstance(spec, DispatchSpec) else partial(combine, spec)


def slots_of(experts: torch.Tensor, num_experts: int, world_size: int) -> torch.Tensor:
    """int32 `[tokens, world_size]`: which of this rank's rows on rank d a token is, -1 if it has no expert there."""
    ranks = torch.where((experts >= 0) & (experts < num_experts), experts // (num_experts // world_size), -1)
    sent = (ranks[:, :, None] == torch.arange(world_size, device=ranks.device)).any(1)
    return torch.where(sent, sent.cumsum(0) - 1, -1).int()


@torch.no_grad()
def dispatch(spec: DispatchSpec, room: Room, call: Call, tensors: Dispatch) -> None:
    """Send each token's rows to the ranks that hold one of its experts, one behind the other in the tokens' order."""
    _everyone(room, call)
    slots = slots_of(tensors.experts, spec.num_experts, spec.world_size)
    tensors.slots.copy_(slots)
    counts = (slots >= 0).sum(0).int()
    counts_here = torch.empty_like(counts)
    dist.all_to_all_single(counts_here, counts, group=room.peers.group)
    tensors.counts.copy_(counts_here)
    tokens, rows = len(slots), call.tokens_per_rank
    # A token that is not sent lies behind the rows, where nobody looks.
    places = torch.where(slots >= 0, slots, rows).long()
    for x, received in zip(tensors.payloads, tensors.received, strict=True):
        data = x.reshape(tokens, math.prod(x.shape[1:])).view(torch.uint8)
        sent = data.new_zeros(spec.world_size, rows + 1, data.shape[1])
        for rank in range(spec.world_size):
            sent[rank, places[:, rank]] = data
        into = received.view(spec.world_size * rows, math.prod(x.shape[1:])).view(torch.uint8)
        dist.all_to_all_single(into, sent[:, :rows].contiguous().view(into.shape), group=room.peers.group)
    if spec.ids >= 0:
        ids = tensors.received[spec.ids]
        empty = torch.arange(rows, device=ids.device) >= tensors.counts[:, None]
        ids.flatten(2).masked_fill_(empty[:, :, None], tensors.invalid_id)


@torch.no_grad()
def combine(spec: CombineSpec, room: Room, call: Call, tensors: Combine) -> None:
    """Send each row back to where it came from; `out[t]` is the sum of what came back for token t, rank by rank."""
    _everyone(room, call)
    out, payload, slots = tensors
    sent = payload.contiguous().view(torch.uint8)
    back = torch.empty_like(sent)
    dist.all_to_all_single(back, sent, group=room.peers.group)
    rows = back.view(spec.dtype)
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for rank in range(spec.world_size):
        slot = slots[:, rank].long()
        total += torch.where((slot >= 0)[:, None], rows[rank, slot.clamp(min=0)].float(), 0.0)
    out.copy_(total)


def _everyone(room: Room, call: Call) -> None:
    if call.active != room.everyone:
        absent = [rank for rank in range(room.peers.world_size) if not call.active >> rank & 1]
        got = f"a mask without ranks {absent}"
        raise BackendSupportedError(
            check.problem("active_rank_mask", got, "all ranks, where torch.distributed moves the rows", "Pass None.")
        )
