"""Decode context parallelism: each rank attends over its share of the KV, then the partial states are merged."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from flashinfer.core import check
from flashinfer.ops import context_parallel
from flashinfer.ops.context_parallel import merge_over_ranks

__all__ = [
    "decode_cp_a2a_alltoall",
    "decode_cp_a2a_init_workspace",
    "decode_cp_a2a_lse_reduce",
    "decode_cp_a2a_lse_reduce_create_workspace",
    "decode_cp_a2a_lse_reduce_workspace_size",
    "decode_cp_a2a_workspace_size",
    "merge_over_ranks",
]

Outputs = tuple[torch.Tensor, torch.Tensor]
_LSE_MODES = ("base2", "basee")
# The process group that each workspace stands for: FlashInfer's calls are given no group.
_groups: Any = WeakIdKeyDictionary()


def decode_cp_a2a_workspace_size(cp_size: int) -> int:
    """Bytes that a rank's row of the workspace of `decode_cp_a2a_alltoall` needs.

    The exchange goes through the process group and needs no memory of the caller's: one int64, for a tensor to pass.
    """
    check.positive("cp_size", cp_size)
    return torch.int64.itemsize


def decode_cp_a2a_init_workspace(workspace: torch.Tensor, cp_rank: int, cp_size: int) -> None:
    """Make an int64 `[cp_size, any]` workspace stand for the default process group, of cp_size ranks.

    Zeroes row cp_rank. A workspace for another group comes from `decode_cp_a2a_lse_reduce_create_workspace`. Raises
    TypeError, ValueError.
    """
    check.tensor("workspace", workspace, shape=(cp_size, None))
    _check_place(None, cp_rank, cp_size)
    workspace[cp_rank].zero_()
    _groups[workspace] = dist.group.WORLD


def decode_cp_a2a_alltoall(
    partial_o: torch.Tensor,
    softmax_stats: torch.Tensor,
    workspace: torch.Tensor,
    cp_rank: int,
    cp_size: int,
    enable_pdl: bool | None = None,
    out: Outputs | None = None,
) -> Outputs:
    """Send `[..., r, :]` of both tensors to rank r; `[..., r, :]` of the results is what rank r sent here.

    partial_o `[..., cp_size, head_dim]` fp32/fp16/bf16, softmax_stats fp32 `[..., cp_size, num_stats]`, leading
    dimensions alike, any strides. out: the two results to write; new ones without. workspace: from
    `decode_cp_a2a_lse_reduce_create_workspace`, or initialised by `decode_cp_a2a_init_workspace`. enable_pdl has no
    effect. One collective, same calls on all ranks. Raises TypeError, ValueError, PeerError.
    """
    parts = (partial_o, softmax_stats)
    group = _group_of(workspace, cp_rank, cp_size)

    def describe() -> context_parallel.Facts:
        _check_parts("softmax_stats", partial_o, softmax_stats, cp_size)
        for name, x, like in zip(("out[0]", "out[1]"), out or (), parts, strict=False):
            check.tensor(name, x, dtypes=(like.dtype,), shape=like.shape, like=("partial_o", partial_o))
        return _same(partial_o, "softmax_stats.shape", softmax_stats), {}

    context_parallel.ranks_of(group, _device(partial_o)).agree("decode_cp_a2a_alltoall", describe)
    received = context_parallel.all_to_all([x.movedim(-2, 0) for x in parts], group)
    first, second = out or (torch.empty_like(x, memory_format=torch.contiguous_format) for x in parts)
    for result, blocks in zip((first, second), received, strict=True):
        result.copy_(blocks.movedim(0, -2))
    return first, second


def decode_cp_a2a_lse_reduce_workspace_size(
    max_tokens: int, local_heads: int, cp_size: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of the workspace of `decode_cp_a2a_lse_reduce`: what is sent and what is received, of every rank."""
    for name, value in (("max_tokens", max_tokens), ("local_heads", local_heads), ("cp_size", cp_size)):
        check.positive(name, value)
    check.positive("head_dim", head_dim)
    rows = max_tokens * local_heads
    return 2 * cp_size * context_parallel.message_bytes([((rows, head_dim), dtype), ((rows,), torch.float32)])


def decode_cp_a2a_lse_reduce_create_workspace(
    max_tokens: int, local_heads: int, cp_size: int, head_dim: int, dtype: torch.dtype, group: Any
) -> torch.Tensor:
    """The workspace of `decode_cp_a2a_lse_reduce` for one group: uint8 on the current device of the group's backend.

    max_tokens, local_heads: their product bounds the rows of later calls. group: a process group of cp_size ranks, None
    for the default one. One workspace is for one stream. Raises ValueError.
    """
    size = decode_cp_a2a_lse_reduce_workspace_size(max_tokens, local_heads, cp_size, head_dim, dtype)
    _check_place(group, None, cp_size)
    on_gpu = "nccl" in dist.get_backend(group)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    _groups[workspace] = dist.group.WORLD if group is None else group
    return workspace


def decode_cp_a2a_lse_reduce(
    partial_o: torch.Tensor,
    partial_lse: torch.Tensor,
    workspace: torch.Tensor,
    cp_rank: int,
    cp_size: int,
    lse_mode: str = "base2",
) -> torch.Tensor:
    """Send each rank its slice of the partial states and merge the slices that come: `[..., head_dim]`.

    partial_o `[..., cp_size, head_dim]` fp32/fp16/bf16: `[..., r, :]` is for rank r. partial_lse fp32 `[..., cp_size]`,
    in base 2, or natural with lse_mode "basee"; -inf where this rank has no KV. Merged in rank order in fp32, in the
    dtype of partial_o. workspace: from `decode_cp_a2a_lse_reduce_create_workspace`, large enough for these rows. One
    collective, same calls on all ranks. Raises TypeError, ValueError, PeerError.
    """
    group = _group_of(workspace, cp_rank, cp_size)
    check.choice("lse_mode", lse_mode, _LSE_MODES)

    def describe() -> context_parallel.Facts:
        lse = check.tensor("partial_lse", partial_lse).unsqueeze(-1)
        _check_parts("partial_lse", partial_o, lse, cp_size)
        rows = partial_lse.numel() // cp_size
        need = decode_cp_a2a_lse_reduce_workspace_size(max(rows, 1), 1, cp_size, partial_o.shape[-1], partial_o.dtype)
        if workspace.numel() * workspace.element_size() < need:
            got = f"{workspace.numel() * workspace.element_size()} bytes"
            fix = f"Create it for max_tokens * local_heads of at least {rows}."
            raise ValueError(check.problem("workspace", got, f"at least {need} bytes for {rows} rows", fix))
        return {**_same(partial_o, "partial_lse.shape", partial_lse), "lse_mode": lse_mode}, {}

    context_parallel.ranks_of(group, _device(partial_o)).agree("decode_cp_a2a_lse_reduce", describe)
    parts = [partial_o.movedim(-2, 0).flatten(1, -2), partial_lse.movedim(-1, 0).flatten(1)]
    o, lse = context_parallel.all_to_all(parts, group, workspace.view(torch.uint8).flatten())
    merged, _ = context_parallel.merge_ranks(o.unsqueeze(2), lse.unsqueeze(2), lse_mode == "basee")
    return merged.view(*partial_o.shape[:-2], partial_o.shape[-1])


def _device(x: Any) -> torch.device:
    return x.device if isinstance(x, torch.Tensor) else torch.device("cpu")


def _same(partial_o: torch.Tensor, name: str, other: torch.Tensor) -> dict[str, Any]:
    """What must be the same on all ranks."""
    return {"partial_o.shape": list(partial_o.shape), "partial_o.dtype": str(partial_o.dtype), name: list(other.shape)}


def _check_parts(name: str, partial_o: torch.Tensor, other: torch.Tensor, cp_size: int) -> None:
    check.tensor("partial_o", partial_o, dtypes=check.FLOAT_DTYPES)
    if partial_o.dim() < 2 or partial_o.shape[-2] != cp_size:
        got = f"shape {list(partial_o.shape)}"
        raise ValueError(check.problem("partial_o", got, f"[..., cp_size = {cp_size}, head_dim]", "Reshape it."))
    want = (*partial_o.shape[:-1], None)
    check.tensor(name, other, dtypes=(torch.float32,), shape=want, like=("partial_o", partial_o))


def _group_of(workspace: torch.Tensor, cp_rank: int, cp_size: int) -> Any:
    check.tensor("workspace", workspace)
    group = _groups.get(workspace)
    if group is None:
        expected = "one of decode_cp_a2a_lse_reduce_create_workspace or given to decode_cp_a2a_init_workspace"
        raise ValueError(check.problem("workspace", "a tensor of no known group", expected, "Pass that very tensor."))
    _check_place(group, cp_rank, cp_size)
    return group


def _check_place(group: Any, cp_rank: int | None, cp_size: int) -> None:
    """See that the process group has cp_size ranks and this is the one of them called cp_rank."""
    if not dist.is_initialized():
        expected = "torch.distributed initialised"
        raise RuntimeError(check.problem("group", "no process group", expected, "Call init_process_group first."))
    for name, got, want in (
        ("cp_size", cp_size, dist.get_world_size(group)),
        ("cp_rank", cp_rank, dist.get_rank(group)),
    ):
        if got is not None and got != want:
            raise ValueError(check.problem(name, got, f"{want}, as the process group has it", "Pass the group's own."))
