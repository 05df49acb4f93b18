"""Ring attention: one long sequence split over ranks; KV goes round while queries stay."""

from __future__ import annotations

import torch
import torch.distributed as dist

from flashinfer.core import check
from flashinfer.ops import context_parallel
from flashinfer.ops.context_parallel import Chunks, RingPlan, plan_ring, zigzag

__all__ = ["RingPlan", "plan_ring", "ring_attention", "zigzag"]


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    causal: bool = False,
    *,
    chunks: Chunks | None = None,
    plan: RingPlan | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of this rank's queries over the KV of all ranks of `group` (None: the default group).

    q `[qo_len, num_qo_heads, head_dim]`, k `[kv_len, num_kv_heads, head_dim]`, v likewise with its own head_dim; one of
    fp32/fp16/bf16, innermost stride 1. Lengths may differ from rank to rank and may be 0; heads and dtype may not.
    causal: the sequence is the ranks' rows in rank order, and each rank has q, k and v of the same tokens. chunks: the
    pieces that this rank's rows are instead, as (number of the piece in the sequence, tokens in it); `zigzag` deals
    them so that ranks work alike, which contiguous shares under a causal mask do not. plan: from `plan_ring` with the
    same group, causal and chunks, and any tensors of these shapes; without it every call asks the other ranks for their
    lengths, which costs the host some 0.3 ms. sm_scale: None is 1 / sqrt(head_dim).

    Returns o `[qo_len, num_qo_heads, head_dim of v]` in q's dtype, with return_lse also fp32 `[qo_len, num_qo_heads]`,
    base 2. Each KV block is sent on while it is attended to; parts, in q's dtype, are merged in fp32 in the order in
    which blocks come, which differs between ranks. All ranks call it alike. Raises TypeError, ValueError, PeerError.
    """
    if plan is None:
        plan = plan_ring((q, k, v), group, causal, chunks)
    else:
        rows = (sum(length for _, length in plan.own_queries), plan.kv_lens[plan.rank])
        for name, x, length in (("q", q, rows[0]), ("k", k, rows[1]), ("v", v, rows[1])):
            check.tensor(name, x, shape=(length, None, None), like=("q", q))
    o, lse = context_parallel.ring_attention(q, k, v, plan, sm_scale, backend)
    return (o, lse) if return_lse else o
