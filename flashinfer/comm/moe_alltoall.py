"""All-to-all of a mixture of experts with FlashInfer's names and signatures.

What a workspace is to FlashInfer is a room here (`flashinfer.ops.alltoall`): memory that all ranks see, or, where there
is no such memory, this rank's own. `backend` and `enable_pdl` are accepted everywhere and change no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

from flashinfer.comm.alltoall import combine, device_of, dispatch
from flashinfer.core import check
from flashinfer.core.peers import Peers
from flashinfer.core.select import BackendSupportedError
from flashinfer.ops import alltoall as ops
from flashinfer.ops.alltoall import Dispatched, Room
from flashinfer.ops.quantization import SfLayout

__all__ = [
    "MoeAlltoAll",
    "moe_a2a_active_rank_mask",
    "moe_a2a_combine",
    "moe_a2a_dispatch",
    "moe_a2a_get_workspace_size_per_rank",
    "moe_a2a_initialize",
    "moe_a2a_sanitize_expert_ids",
    "moe_a2a_wrap_payload_tensor_in_workspace",
]

BACKENDS = ("trtllm", "cake")
MASK_BITS = 64
# The room of each workspace, by the address of its memory.
_rooms: WeakValueDictionary[int, Room] = WeakValueDictionary()


class Metainfo(NamedTuple):
    """What FlashInfer keeps in a tensor: the room of a workspace, and the dispatch under way (none: empty)."""

    room: Room
    under_way: list[Dispatched]


def moe_a2a_active_rank_mask(active_ranks: Sequence[int] | torch.Tensor, ep_size: int) -> torch.Tensor:
    """uint64 `[1]` on the CPU with bit r set for each active rank r. Raises ValueError for ranks that do not exist."""
    check.positive("ep_size", ep_size)
    mask = 0
    for rank in map(int, active_ranks):
        if not 0 <= rank < min(ep_size, MASK_BITS):
            expected = f"ranks below {min(ep_size, MASK_BITS)}"
            raise ValueError(check.problem("active_ranks", rank, expected, "Pass ranks of the group."))
        mask |= 1 << rank
    return torch.tensor([mask], dtype=torch.uint64)


def _mask(room: Room, enabled: bool, mask: torch.Tensor | None) -> int | None:
    if mask is None:
        return None
    if not enabled:
        raise ValueError(check.problem("active_rank_mask", "a mask", "None", "Pass enable_rank_mask=True as well."))
    check.tensor("active_rank_mask", mask, dtypes=(torch.uint64,), shape=(1,))
    if not mask.is_cpu:
        got = f"a tensor on {mask.device}"
        raise ValueError(check.problem("active_rank_mask", got, "on the CPU", "Use moe_a2a_active_rank_mask."))
    return int(mask.item()) & room.everyone


def moe_a2a_get_workspace_size_per_rank(
    ep_size: int,
    max_num_tokens: int,
    total_dispatch_payload_size_per_token: int,
    combine_payload_size_per_token: int,
    eplb_stats_num_experts: int = 0,
    *,
    backend: str = "trtllm",
) -> int:
    """Bytes of a workspace for tokens of so many bytes in all payloads, and in the result."""
    check.choice("backend", backend, BACKENDS)
    for name, value in (("ep_size", ep_size), ("max_num_tokens", max_num_tokens)):
        check.positive(name, value)
    sizes = (total_dispatch_payload_size_per_token, combine_payload_size_per_token)
    return ops.room_bytes(ep_size, max_num_tokens, *sizes)


def moe_a2a_initialize(
    workspace: torch.Tensor,
    ep_rank: int,
    ep_size: int,
    max_num_tokens: int,
    eplb_stats_num_experts: int = 0,
    *,
    backend: str = "trtllm",
) -> Metainfo:
    """What the other functions want to know of a workspace.

    workspace: made by `MoeAlltoAll.get_workspace`, for these numbers; nothing of it is changed. Raises ValueError for
    another tensor.
    """
    check.choice("backend", backend, BACKENDS)
    room = _rooms.get(workspace.data_ptr()) if isinstance(workspace, torch.Tensor) else None
    if room is None:
        fix = "Take the workspace of MoeAlltoAll.get_workspace(...)."
        raise ValueError(check.problem("workspace", type(workspace).__name__, "memory that all ranks see", fix))
    given, kept = (ep_rank, ep_size, max_num_tokens), (room.peers.rank, room.peers.world_size, room.max_tokens)
    if given != kept:
        got = f"rank, size, tokens {given}"
        raise ValueError(check.problem("workspace", got, f"{kept}", "Pass those it was made for."))
    return Metainfo(room, [])


def moe_a2a_wrap_payload_tensor_in_workspace(
    workspace: torch.Tensor, leading_shape: list[int], slice_start: int, slice_end: int, dtype: torch.dtype
) -> torch.Tensor:
    """Bytes slice_start to slice_end of this rank's memory as a tensor `[*leading_shape, rest]`; shares memory.

    workspace: uint8 `[size]` or `[ep_size, size]`, every row of which is this rank's memory.
    """
    check.tensor("workspace", workspace, dtypes=(torch.uint8,), inner_contiguous=True)
    own = workspace if workspace.dim() == 1 else workspace[0]
    if not 0 <= slice_start <= slice_end <= own.numel():
        expected = f"a slice of the {own.numel()} bytes of one rank"
        raise ValueError(check.problem("slice_end", f"{slice_start} to {slice_end}", expected, "Check the offsets."))
    return own[slice_start:slice_end].view(dtype).view(*leading_shape, -1)


def moe_a2a_dispatch(
    token_selected_experts: torch.Tensor,
    input_payloads: list[torch.Tensor],
    workspace: torch.Tensor,
    metainfo: Metainfo,
    runtime_max_tokens_per_rank: int,
    ep_rank: int,
    ep_size: int,
    top_k: int,
    num_experts: int,
    enable_pdl: bool | None = None,
    eplb_local_stats: torch.Tensor | None = None,
    enable_rank_mask: bool = False,
    active_rank_mask: torch.Tensor | None = None,
    *,
    backend: str = "trtllm",
    recv_view_cache: dict[Any, Any] | None = None,
) -> tuple[list[torch.Tensor], int, torch.Tensor | None]:
    """`dispatch`: (received rows of each payload, where in the workspace results may lie, gathered statistics).

    Rows `[ep_size, runtime_max_tokens_per_rank, ...]`, those that no token fills holding anything. The offset in bytes
    is for `moe_a2a_wrap_payload_tensor_in_workspace`. eplb_local_stats: int32 of one length on all ranks, which gives
    `[ep_size, length]`. Masks: `moe_a2a_active_rank_mask`.
    """
    room = metainfo.room
    check.choice("backend", backend, BACKENDS)
    check.tensor("token_selected_experts", token_selected_experts, shape=(None, top_k))
    active = _mask(room, enable_rank_mask, active_rank_mask)
    sent = dispatch(
        room, token_selected_experts, input_payloads, num_experts, runtime_max_tokens_per_rank, active=active
    )
    metainfo.under_way[:] = [sent]
    stats = None if eplb_local_stats is None else _gathered(room, eplb_local_stats)
    return list(sent.received), _results_begin(room, sent), stats


def _results_begin(room: Room, sent: Dispatched) -> int:
    """Bytes before the half of the memory that nobody writes to until the dispatch after this one."""
    return room.half_begin(1 - sent.call.half)


def _gathered(room: Room, stats: torch.Tensor) -> torch.Tensor:
    check.tensor("eplb_local_stats", stats, dtypes=(torch.int32,), shape=(None,))
    gathered = stats.new_empty(room.peers.world_size, len(stats))
    dist.all_gather(list(gathered), stats.contiguous(), group=room.peers.group)
    return gathered


def moe_a2a_combine(
    payload: torch.Tensor,
    local_num_tokens: int,
    workspace: torch.Tensor,
    metainfo: Metainfo,
    runtime_max_tokens_per_rank: int,
    ep_rank: int,
    ep_size: int,
    top_k: int,
    combine_payload_offset: int,
    payload_in_workspace: bool = False,
    output_dtype: torch.dtype | None = None,
    output_scales: torch.Tensor | None = None,
    output_scalar_scale: float = 1.0,
    sf_layout: SfLayout = SfLayout.layout_linear,
    output: torch.Tensor | None = None,
    *,
    use_low_precision: bool = False,
    enable_pdl: bool | None = None,
    enable_rank_mask: bool = False,
    active_rank_mask: torch.Tensor | None = None,
    backend: str = "trtllm",
) -> torch.Tensor:
    """`combine` of the last dispatch: `[local_num_tokens, hidden_size]`, added up over the ranks a token went to.

    payload: `[ep_size, runtime_max_tokens_per_rank, hidden_size]`, in the workspace or not. output_dtype: fp32, fp16 or
    bf16, default: payload's. Quantised results and rows (output_scales, use_low_precision) are refused.
    """
    check.choice("backend", backend, BACKENDS)
    room = metainfo.room
    refused = [
        name
        for name, given in (("output_scales", output_scales is not None), ("use_low_precision", use_low_precision))
        if given
    ]
    if refused:
        raise BackendSupportedError(f"moe_a2a_combine: {', '.join(refused)} is not supported. Leave it out.")
    if not metainfo.under_way:
        raise RuntimeError(check.problem("metainfo", "no dispatch", "one not combined yet", "Dispatch first."))
    sent = metainfo.under_way[0]
    given = (local_num_tokens, runtime_max_tokens_per_rank, _mask(room, enable_rank_mask, active_rank_mask))
    kept = (len(sent.slots), sent.call.tokens_per_rank, sent.call.active if enable_rank_mask else None)
    if given[:2] != kept[:2] or (given[2] is not None and given[2] != kept[2]):
        got = f"{given[:2]} tokens here and a rank, mask {given[2]}"
        expected = f"{kept[:2]}, mask {kept[2]}, as in dispatch"
        raise ValueError(check.problem("local_num_tokens", got, expected, "Pass the same to both."))
    out = combine(room, sent, payload, out=output, out_dtype=output_dtype)
    metainfo.under_way.clear()
    return out


def moe_a2a_sanitize_expert_ids(
    expert_ids: torch.Tensor,
    workspace: torch.Tensor,
    metainfo: Metainfo,
    ep_rank: int,
    invalid_expert_id: int,
    enable_pdl: bool | None = None,
    *,
    backend: str = "trtllm",
) -> None:
    """Write invalid_expert_id, in place, to rows of int32 `[ep_size, tokens_per_rank, top_k]` that no token fills."""
    check.choice("backend", backend, BACKENDS)
    if not metainfo.under_way:
        raise RuntimeError(check.problem("metainfo", "no dispatch", "one not combined yet", "Dispatch first."))
    sent = metainfo.under_way[0]
    shape = (len(sent.counts), sent.call.tokens_per_rank, None)
    check.tensor("expert_ids", expert_ids, dtypes=(torch.int32,), shape=shape, like=("workspace", workspace))
    rows = torch.arange(expert_ids.shape[1], device=expert_ids.device)
    expert_ids.masked_fill_((rows >= sent.counts[:, None])[:, :, None], invalid_expert_id)


class MoeAlltoAll:
    """Dispatch and combine of one expert-parallel group, with FlashInfer's phases: each dispatch has its combine.

    mapping: tells moe_ep_group, moe_ep_rank and moe_ep_size; the group's ranks must all make the object. Objects made
    for the same numbers share one workspace, as long as one of them lives. workspace_size_per_rank: in bytes, default:
    enough for 16-bit rows of hidden_size, experts and weights. mnnvl_config is not used: memory is shared through
    torch's symmetric memory.
    """

    _WORKSPACE_CACHE: ClassVar[WeakValueDictionary[tuple[Any, ...], Room]] = WeakValueDictionary()

    def __init__(
        self,
        mapping: Any,
        max_num_tokens: int,
        top_k: int,
        num_experts: int,
        workspace_size_per_rank: int | None = None,
        hidden_size: int | None = None,
        mnnvl_config: Any = None,
        eplb_stats_num_experts: int = 0,
        enable_rank_mask: bool = False,
        *,
        backend: str = "trtllm",
    ) -> None:
        for name, value in (("top_k", top_k), ("num_experts", num_experts), ("max_num_tokens", max_num_tokens)):
            check.positive(name, value)
        self.ep_size, self.ep_rank = mapping.moe_ep_size, mapping.moe_ep_rank
        if workspace_size_per_rank is None:
            if hidden_size is None:
                got, expected = "None, and no workspace_size_per_rank", "one of the two"
                raise ValueError(check.problem("hidden_size", got, expected, "Pass hidden_size."))
            workspace_size_per_rank = self.get_moe_workspace_size_per_rank(
                self.ep_size, top_k, max_num_tokens, hidden_size, eplb_stats_num_experts=eplb_stats_num_experts
            )
        self.max_num_tokens, self.top_k, self.num_experts = max_num_tokens, top_k, num_experts
        self.workspace_size_per_rank = workspace_size_per_rank
        self.eplb_stats_num_experts, self.enable_rank_mask = eplb_stats_num_experts, enable_rank_mask
        self.eplb_gathered_stats: torch.Tensor | None = None
        numbers = (workspace_size_per_rank, self.ep_rank, self.ep_size, max_num_tokens)
        made = self.get_workspace(*numbers, mapping, eplb_stats_num_experts, backend=backend)
        self.workspace, self.metainfo = made["workspace"], made["metainfo"]

    @classmethod
    def get_workspace(
        cls,
        workspace_size_per_rank: int,
        ep_rank: int,
        ep_size: int,
        max_num_tokens: int,
        mapping: Any,
        eplb_stats_num_experts: int = 0,
        *,
        backend: str = "trtllm",
    ) -> dict[str, Any]:
        """The workspace for these numbers, its "metainfo", and the numbers; all ranks of the group call it.

        "workspace": uint8 `[ep_size, workspace_size_per_rank]`, every row of which is this rank's memory: how that of
        the others is reached is the metainfo's affair. Memory goes with the last dict or object that holds metainfo.
        """
        check.choice("backend", backend, BACKENDS)
        ranks = tuple(mapping.moe_ep_group)
        key = (workspace_size_per_rank, ep_rank, ep_size, max_num_tokens, eplb_stats_num_experts, ranks)
        room = cls._WORKSPACE_CACHE.get(key)
        if room is None or room.closed:
            group = _group_of(ranks)
            room = Room(Peers(group, device_of(group)), max_num_tokens, workspace_size_per_rank)
            cls._WORKSPACE_CACHE[key] = _rooms[room.own.data_ptr()] = room
        workspace = room.own.expand(ep_size, -1)
        return {
            "workspace_size_per_rank": workspace_size_per_rank,
            "max_num_tokens": max_num_tokens,
            "ep_rank": ep_rank,
            "ep_size": ep_size,
            "eplb_stats_num_experts": eplb_stats_num_experts,
            "workspace": workspace,
            "metainfo": moe_a2a_initialize(workspace, ep_rank, ep_size, max_num_tokens, eplb_stats_num_experts),
        }

    @staticmethod
    def get_moe_workspace_size_per_rank(
        ep_size: int,
        top_k: int,
        max_num_tokens: int,
        hidden_size: int,
        extra_payload_bytes_per_token: int = 0,
        eplb_stats_num_experts: int = 0,
        *,
        backend: str = "trtllm",
    ) -> int:
        """Bytes of a workspace for 16-bit rows, int32 experts, fp32 weights, and what extra payloads take."""
        row_bytes = 2 * hidden_size
        of_token = row_bytes + 8 * top_k + extra_payload_bytes_per_token
        numbers = (ep_size, max_num_tokens, of_token, row_bytes, eplb_stats_num_experts)
        return moe_a2a_get_workspace_size_per_rank(*numbers, backend=backend)

    def dispatch(
        self,
        token_selected_experts: torch.Tensor,
        input_payloads: list[torch.Tensor],
        runtime_max_tokens_per_rank: int,
        invalid_token_expert_id: int | None = None,
        expert_id_payload_index: int | None = None,
        eplb_local_stats: torch.Tensor | None = None,
        active_rank_mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """The module's `dispatch`: received rows `[ep_size, runtime_max_tokens_per_rank, ...]`, in the workspace.

        They hold until `combine`. eplb_local_stats: int32 `[eplb_stats_num_experts]`, gathered into
        `eplb_gathered_stats` until then. Raises RuntimeError for a second dispatch without a combine.
        """
        room = self.metainfo.room
        if self.metainfo.under_way:
            raise RuntimeError(check.problem("dispatch", "a second one", "a combine first", "Call combine()."))
        check.tensor("token_selected_experts", token_selected_experts, shape=(None, self.top_k))
        if eplb_local_stats is not None:
            check.tensor("eplb_local_stats", eplb_local_stats, shape=(self.eplb_stats_num_experts,))
        sent = dispatch(
            room,
            token_selected_experts,
            input_payloads,
            self.num_experts,
            runtime_max_tokens_per_rank,
            invalid_token_expert_id=invalid_token_expert_id,
            expert_id_payload_index=expert_id_payload_index,
            active=_mask(room, self.enable_rank_mask, active_rank_mask),
        )
        self.metainfo.under_way[:] = [sent]
        if eplb_local_stats is not None:
            self.eplb_gathered_stats = _gathered(room, eplb_local_stats)
        return list(sent.received)

    def combine(
        self,
        payload: torch.Tensor,
        runtime_max_tokens_per_rank: int,
        payload_in_workspace: bool = False,
        output_dtype: torch.dtype | None = None,
        output_scales: torch.Tensor | None = None,
        output_scalar_scale: float = 1.0,
        sf_layout: SfLayout = SfLayout.layout_linear,
        output: torch.Tensor | None = None,
        *,
        use_low_precision: bool = False,
        active_rank_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`moe_a2a_combine` of the dispatch under way. Raises RuntimeError where there is none."""
        out = moe_a2a_combine(
            payload,
            len(self.metainfo.under_way[0].slots) if self.metainfo.under_way else 0,
            self.workspace,
            self.metainfo,
            runtime_max_tokens_per_rank,
            self.ep_rank,
            self.ep_size,
            self.top_k,
            0,
            payload_in_workspace,
            output_dtype,
            output_scales,
            output_scalar_scale,
            sf_layout,
            output,
            use_low_precision=use_low_precision,
            enable_rank_mask=self.enable_rank_mask,
            active_rank_mask=active_rank_mask,
        )
        self.eplb_gathered_stats = None
        return out

    def get_combine_payload_tensor_in_workspace(
        self, runtime_max_tokens_per_rank: int, hidden_size: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Memory for combine's payload after a dispatch, `[ep_size, runtime_max_tokens_per_rank, hidden_size]`."""
        if not self.metainfo.under_way:
            raise RuntimeError(check.problem("dispatch", "none", "one not combined yet", "Dispatch first."))
        room: Room = self.metainfo.room
        shape = (self.ep_size, runtime_max_tokens_per_rank, hidden_size)
        num_bytes = self.ep_size * runtime_max_tokens_per_rank * hidden_size * dtype.itemsize
        if num_bytes > room.half_bytes:
            expected = f"at most {room.half_bytes}"
            raise ValueError(check.problem("hidden_size", f"{num_bytes} bytes", expected, "Make a larger workspace."))
        return room.view(1 - self.metainfo.under_way[0].call.half, 0, shape, dtype)

    def checkpoint_prepare(self) -> None:
        """Refused: memory that torch shares between ranks cannot be unmapped and mapped again in place."""
        raise BackendSupportedError("checkpoint_prepare: not supported. Close the object before, make it anew after.")

    def checkpoint_restore(self, comm_backend: Any) -> None:
        """Refused, as `checkpoint_prepare`."""
        raise BackendSupportedError("checkpoint_restore: not supported. Make the object anew.")

    def close(self) -> None:
        """Free the workspace, which no object shares any more; every rank calls it."""
        self.metainfo.room.close()


def _group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The process group of these ranks, made by them alone; None for all ranks."""
    if len(ranks) == dist.get_world_size():
        return None
    group: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=True)
    return group
