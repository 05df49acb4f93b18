"""Attention over ranks: merging states, exchanging heads for tokens, and rings of KV, on torch.distributed."""

from flashinfer.ops.context_parallel.agree import Facts, Ranks, ranks_of
from flashinfer.ops.context_parallel.exchange import Shapes, all_gather, all_to_all, message_bytes
from flashinfer.ops.context_parallel.merging import merge_over_ranks, merge_ranks
from flashinfer.ops.context_parallel.ring import Chunks, RingPlan, plan_ring, ring_attention, zigzag

__all__ = [
    "Chunks",
    "Facts",
    "Ranks",
    "RingPlan",
    "Shapes",
    "all_gather",
    "all_to_all",
    "merge_over_ranks",
    "merge_ranks",
    "message_bytes",
    "plan_ring",
    "ranks_of",
    "ring_attention",
    "zigzag",
]
