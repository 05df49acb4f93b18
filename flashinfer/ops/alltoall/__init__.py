"""Tokens to the ranks of their experts and back: dispatch and combine of expert parallelism.

What is called again and again, checked and repeated, are `flashinfer.comm.dispatch` and `combine`; here is what they
do the first time. These are no torch ops: which memory a call writes to is a matter of how many came before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.core.peers import Peers
from flashinfer.core.select import Choice, Impl
from flashinfer.ops.alltoall.room import PAYLOADS, Landing, Room, head_bytes, room_bytes, room_of
from flashinfer.ops.alltoall.spec import (
    COMBINE,
    DISPATCH,
    Call,
    Combine,
    CombineSpec,
    Dispatch,
    DispatchSpec,
    Row,
    row_of,
)
from flashinfer.ops.alltoall.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.alltoall.triton", triton_supports),
    Impl("torch", "flashinfer.ops.alltoall.reference", torch_supports),
)
CHOICE = Choice(IMPLS)


class Dispatched(NamedTuple):
    """What a dispatch brought to this rank, and what combine needs to know of it.

    received: of each payload `[world_size, tokens_per_rank, ...]`, memory of the room: row (r, i) is the i-th token
    that rank r sent here. It holds until its combine, or, if it is never combined, until the next dispatch; rows that
    no token fills hold anything. counts: int32 `[world_size]` on the device, how many rows each rank sent. slots: int32
    `[tokens, world_size]`: token t is row `slots[t, d]` of this rank's on rank d, -1 if it was not sent there.
    number: of the dispatch, in its room.
    """

    received: tuple[torch.Tensor, ...]
    counts: torch.Tensor
    slots: torch.Tensor
    call: Call
    number: int


def dispatch(
    room: Room,
    landing: Landing,
    experts: torch.Tensor,
    payloads: tuple[torch.Tensor, ...],
    num_experts: int,
    ids: int = -1,
    invalid_id: int = -1,
) -> None:
    """Send each token once to every rank that holds one of its experts; what the others sent here is in the landing.

    landing: of `room.landing`. experts: int32 `[tokens, top_k]`, contiguous; expert e is on rank
    `e // (num_experts // world_size)`, numbers of no expert are skipped. payloads: `[tokens, ...]` of any dtype, rows
    contiguous. ids: number of the int32 payload that gets invalid_id where no token fills a row. Rows of one rank come
    in the order of its tokens. Checks nothing; callers do (`flashinfer.comm`).
    """
    world_size, call = room.peers.world_size, landing.call
    rows = tuple(row_of(tuple(x.shape[1:]), x.element_size(), x.stride(0) if x.shape[0] > 1 else 0) for x in payloads)
    spec = DispatchSpec(world_size, num_experts, experts.shape[1], rows, ids, room.unreachable)
    of_token = tuple(row.num_bytes for row in rows)
    room.agree(DISPATCH, call, num_experts=num_experts, top_k=spec.top_k, bytes_of_payloads=of_token, ids=ids)
    run = CHOICE.call(spec, room.peers.device, room.backend)
    run(room, call, Dispatch(experts, payloads, landing.received, landing.counts, landing.slots, invalid_id))


def combine(room: Room, call: Call, tensors: Combine) -> None:
    """Send what became of the received rows back; `out[t]` is the sum of what the ranks make of token t.

    call: of the dispatch. Sums are taken in fp32, in the order of ranks. Every dispatch is combined once, at the latest
    before the dispatch after the next. Checks nothing.
    """
    out, payload, _ = tensors
    hidden_size = payload.shape[2]
    spec = CombineSpec(room.peers.world_size, hidden_size, payload.dtype, out.dtype, room.unreachable)
    offset = room.reserve_results(hidden_size * payload.element_size(), call.tokens_per_rank)
    call = call._replace(offset=offset)
    room.agree(COMBINE, call, hidden_size=hidden_size, dtype=payload.dtype)
    CHOICE.call(spec, room.peers.device, room.backend)(room, call, tensors)


__all__ = [
    "CHOICE",
    "IMPLS",
    "PAYLOADS",
    "Call",
    "Combine",
    "CombineSpec",
    "DispatchSpec",
    "Dispatched",
    "Landing",
    "Peers",
    "Room",
    "Row",
    "combine",
    "dispatch",
    "head_bytes",
    "room_bytes",
    "room_of",
]
