"""All-to-all of expert parallelism: rows to the ranks of their experts and back, and a layer made of the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from flashinfer.core import check
from flashinfer.core.library import untraced
from flashinfer.core.peers import TIMEOUT, Peers
from flashinfer.core.replay import replayed
from flashinfer.fused_moe import cutlass_fused_moe
from flashinfer.ops import alltoall as ops
from flashinfer.ops.alltoall import Dispatched, Room

__all__ = ["combine", "device_of", "dispatch", "expert_parallel_moe", "make_room"]


def make_room(
    max_num_tokens: int,
    dispatch_bytes: int,
    combine_bytes: int,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
    timeout: float = TIMEOUT,
) -> Room:
    """Memory for `dispatch` and `combine` of up to max_num_tokens tokens a rank; every rank of the group makes it.

    dispatch_bytes: of one token in all payloads, combine_bytes: of one token's result. group: all ranks by default.
    device: of the tensors; default: the current GPU for a group with NCCL, else the CPU. timeout: seconds that another
    rank is waited for. Raises PeerError where ranks disagree or one does not come. `room.close()` frees it.
    """
    peers = Peers(group, device_of(group) if device is None else torch.device(device), timeout)
    num_bytes = ops.room_bytes(peers.world_size, max_num_tokens, dispatch_bytes, combine_bytes)
    return Room(peers, max_num_tokens, num_bytes)


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where a group's tensors live: on the current GPU if it has NCCL, else on the CPU."""
    if torch.cuda.is_available() and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@untraced
def dispatch(
    room: Room,
    token_selected_experts: torch.Tensor,
    input_payloads: Sequence[torch.Tensor],
    num_experts: int,
    tokens_per_rank: int,
    *,
    invalid_token_expert_id: int | None = None,
    expert_id_payload_index: int | None = None,
    active: int | None = None,
) -> Dispatched:
    """Send each token once to every rank that holds one of its experts, and receive what the others send here.

    token_selected_experts: int32 `[tokens, top_k]`; expert e is on rank `e // (num_experts / world_size)`, a number
    outside `[0, num_experts)` goes nowhere. input_payloads: `[tokens, ...]` of any dtype on the room's device, each
    token contiguous. tokens_per_rank: the same on all ranks, at least the tokens of each. invalid_token_expert_id: what
    rows that no token fills get in the int32 payload of number expert_id_payload_index. active: bit r for each rank
    that takes part; the others' tokens are lost, and nobody waits for them.

    Returns the received rows, `[world_size, tokens_per_rank, ...]` of each payload, and what `combine` needs; see
    `flashinfer.ops.alltoall.Dispatched` for how long they hold. No host sync. Raises ValueError for wrong tensors, and
    PeerError for a rank that does not come or makes another call: on the CPU at once; on a GPU the first time for a
    kind of call, else from the next call (or `room.check()`) after the kernel has waited in vain.
    """
    room.check()
    payloads, ids = tuple(input_payloads), (invalid_token_expert_id, expert_id_payload_index)
    number, half = room.next()
    active = room.everyone if active is None else active
    _dispatch(token_selected_experts, payloads, room.number, half, active, num_experts, tokens_per_rank, ids)
    room.begin(number)
    return Dispatched(*room.landing(half, active, tokens_per_rank, payloads), number)


@replayed
def _dispatch(
    experts: torch.Tensor,
    payloads: tuple[torch.Tensor, ...],
    number: int,
    half: int,
    active: int,
    num_experts: int,
    tokens_per_rank: int,
    ids: tuple[int | None, int | None],
) -> None:
    room = ops.room_of(number)
    _check_dispatch(room, experts, payloads, num_experts, tokens_per_rank)
    if not active >> room.peers.rank & 1:
        got = f"{active:#b} without rank {room.peers.rank} itself"
        raise ValueError(check.problem("active", got, "a mask with this rank", "Set its bit."))
    invalid_id, index = ids
    landing = room.landing(half, active, tokens_per_rank, payloads)
    if invalid_id is None:
        return ops.dispatch(room, landing, experts, payloads, num_experts)
    ops.dispatch(room, landing, experts, payloads, num_experts, _index(index, payloads), invalid_id)


def _check_dispatch(
    room: Room, experts: torch.Tensor, payloads: Sequence[torch.Tensor], num_experts: int, tokens_per_rank: int
) -> None:
    check.positive("num_experts", num_experts)
    check.multiple("num_experts", num_experts, "the number of ranks", room.peers.world_size)
    check.tensor("token_selected_experts", experts, dtypes=(torch.int32,), shape=(None, None), inner_contiguous=True)
    on_device(room, "token_selected_experts", experts)
    if not experts.is_contiguous():
        got = f"strides {tuple(experts.stride())}"
        raise ValueError(check.problem("token_selected_experts", got, "contiguous rows", "Call .contiguous()."))
    check.positive("runtime_max_tokens_per_rank", tokens_per_rank)
    if not len(experts) <= tokens_per_rank <= room.max_tokens:
        got = f"{tokens_per_rank} with {len(experts)} tokens here and room for {room.max_tokens}"
        expected = "at least the tokens of every rank, at most max_num_tokens"
        raise ValueError(
            check.problem("runtime_max_tokens_per_rank", got, expected, "Pass the largest number of any rank.")
        )
    if not 1 <= len(payloads) <= ops.PAYLOADS:
        got, expected = f"{len(payloads)} tensors", f"1 to {ops.PAYLOADS}"
        raise ValueError(check.problem("input_payloads", got, expected, "Join some of them."))
    for i, x in enumerate(payloads):
        name = f"input_payloads[{i}]"
        check.tensor(name, x, like=("token_selected_experts", experts))
        if x.dim() < 1 or x.shape[0] != len(experts):
            shape = f"[{len(experts)}, ...]"
            raise ValueError(check.problem(name, f"shape {list(x.shape)}", shape, "Pass one row a token."))
        if x.shape[0] and not (x[0].is_contiguous() and x[0].numel()):
            got = f"shape {list(x.shape)}, strides {tuple(x.stride())}"
            raise ValueError(check.problem(name, got, "contiguous rows, not empty", f"Call {name}.contiguous()."))


def on_device(room: Room, name: str, x: torch.Tensor) -> None:
    if x.device != room.peers.device:
        expected = f"{room.peers.device}, as the workspace"
        raise ValueError(check.problem(name, f"a tensor on {x.device}", expected, f"Move it with {name}.to(...)."))


def _index(index: int | None, payloads: Sequence[torch.Tensor]) -> int:
    if index is None or not 0 <= index < len(payloads):
        expected = f"the number of a payload below {len(payloads)}, for invalid_token_expert_id"
        raise ValueError(check.problem("expert_id_payload_index", index, expected, "Pass it, or no invalid id."))
    check.tensor(f"input_payloads[{index}]", payloads[index], dtypes=(torch.int32,))
    return index


@untraced
def combine(
    room: Room,
    dispatched: Dispatched,
    payload: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Send each row back to the rank it came from; each token's rows are added up there, `[tokens, hidden_size]`.

    payload: `[world_size, tokens_per_rank, hidden_size]`, fp32, fp16 or bf16, innermost stride 1: what the experts made
    of the received rows, their weights applied. Rows that no token fills are not read. Sums in fp32, in the order of
    ranks, so deterministic. A token that went nowhere gets zeros. out: of out_dtype, default: payload's. Errors as for
    `dispatch`; RuntimeError for a dispatch that is too old, or was combined.
    """
    room.check()
    room.expect(dispatched.number)
    _, _, slots, call, number = dispatched
    if out is None:
        check.tensor("payload", payload, shape=(None, None, None))
        dtype = payload.dtype if out_dtype is None else check.choice("output_dtype", out_dtype, check.FLOAT_DTYPES)
        out = payload.new_empty((slots.shape[0], payload.shape[2]), dtype=dtype)
    _combine(out, payload, slots, room.number, call.half, call.active, call.tokens_per_rank, out_dtype)
    room.end(number)
    return out


@replayed
def _combine(
    out: torch.Tensor,
    payload: torch.Tensor,
    slots: torch.Tensor,
    number: int,
    half: int,
    active: int,
    tokens_per_rank: int,
    out_dtype: torch.dtype | None,
) -> None:
    room = ops.room_of(number)
    shape = (room.peers.world_size, tokens_per_rank, None)
    check.tensor("payload", payload, dtypes=check.FLOAT_DTYPES, shape=shape, inner_contiguous=True)
    on_device(room, "payload", payload)
    dtypes = check.FLOAT_DTYPES if out_dtype is None else (out_dtype,)
    like, of_out = ("payload", payload), (len(slots), payload.shape[2])
    check.tensor("output", out, dtypes=dtypes, shape=of_out, like=like, inner_contiguous=True)
    ops.combine(room, ops.Call(tokens_per_rank, half, active), ops.Combine(out, payload, slots))


def expert_parallel_moe(
    room: Room,
    input: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor,
    fc1_expert_weights: torch.Tensor,
    fc2_expert_weights: torch.Tensor,
    tokens_per_rank: int,
    quant_scales: Sequence[torch.Tensor] | None = None,
    output_dtype: torch.dtype | None = None,
    **options: Any,
) -> torch.Tensor:
    """A mixture of experts spread over the room's ranks: dispatch, `cutlass_fused_moe` of this rank's experts, combine.

    input, token_selected_experts (int32), token_final_scales: this rank's tokens, as `cutlass_fused_moe` takes them;
    weights: this rank's experts, `[num_experts / world_size, ...]`. tokens_per_rank: as in `dispatch`. output_dtype:
    default: input's. options: of `cutlass_fused_moe`. Returns `[tokens, hidden_size]`. Each rank rounds its part of a
    token's sum to output_dtype before it is sent. The room holds rows of input, experts and weights; its
    combine_bytes are those of a row of output_dtype. Group sizes stay on the device: it can be captured in a graph.
    """
    world_size, rank = room.peers.world_size, room.peers.rank
    num_experts = fc1_expert_weights.shape[0] * world_size
    payloads = (input, token_selected_experts, token_final_scales)
    sent = dispatch(
        room,
        token_selected_experts,
        payloads,
        num_experts,
        tokens_per_rank,
        invalid_token_expert_id=-1,
        expert_id_payload_index=1,
    )
    rows, experts, scales = (x.flatten(0, 1) for x in sent.received)
    results = cutlass_fused_moe(
        rows,
        experts,
        scales,
        fc1_expert_weights,
        fc2_expert_weights,
        input.dtype if output_dtype is None else output_dtype,
        quant_scales,
        ep_size=world_size,
        ep_rank=rank,
        **options,
    )
    return combine(room, sent, results.view(world_size, tokens_per_rank, -1))
