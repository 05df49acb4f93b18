"""Attention states of disjoint KV, one on each rank, merged over the ranks."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from flashinfer.core import check
from flashinfer.ops import merge
from flashinfer.ops.context_parallel.agree import Facts, ranks_of
from flashinfer.ops.context_parallel.exchange import all_gather, all_to_all

State = tuple[torch.Tensor, torch.Tensor]


def merge_over_ranks(
    o: torch.Tensor, lse: torch.Tensor, group: dist.ProcessGroup | None = None, split_heads: bool = False
) -> State:
    """The state of attention over the KV of all ranks, from each rank's state over its own KV.

    o `[n, num_heads, head_dim]` fp32/fp16/bf16, lse fp32 `[n, num_heads]`, base 2; a rank without KV for a row has lse
    -inf there and anything in o. Returns new (o, lse): of all heads on every rank, the same bits (one all-gather); with
    split_heads of heads `[rank * num_heads / world_size, ...)` alone (one all-to-all, 1 / world_size of the bytes).
    States are merged in rank order in fp32; partial results travel in the dtype of o. Shapes and dtypes must be the
    same on all ranks. Raises TypeError, ValueError, PeerError on all ranks.
    """
    device = o.device if isinstance(o, torch.Tensor) else torch.device("cpu")
    ranks = ranks_of(group, device)
    world_size = ranks.peers.world_size

    def describe() -> Facts:
        check.tensor("o", o, dtypes=check.FLOAT_DTYPES, shape=(None, None, None))
        check.tensor("lse", lse, dtypes=(torch.float32,), shape=o.shape[:2], like=("o", o))
        if split_heads:
            check.multiple("num_heads of o", o.shape[1], "world_size", world_size)
        return {"o.shape": list(o.shape), "o.dtype": str(o.dtype), "split_heads": split_heads}, {}

    ranks.agree("merge_over_ranks", describe)
    if split_heads:
        slices = (world_size, o.shape[1] // world_size)
        states, lses = all_to_all([x.unflatten(1, slices).transpose(0, 1) for x in (o, lse)], group)
    else:
        states, lses = all_gather([o, lse], group)
    return merge_ranks(states, lses)


def merge_ranks(o: torch.Tensor, lse: torch.Tensor, lse_in_nats: bool = False) -> State:
    """The ⊕ over the first dimension. o `[world_size, n, num_heads, head_dim]`, lse `[world_size, n, num_heads]`."""
    merged = o.new_empty(o.shape[1:])
    total = lse.new_empty(lse.shape[1:])
    states = lse.transpose(0, 1)
    merge.merge_many(merged, total, o.transpose(0, 1), states * math.log2(math.e) if lse_in_nats else states)
    return merged, total
