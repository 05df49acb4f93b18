"""Many low-rank adapters on the experts of a mixture, with FlashInfer's names and signatures.

A pair is a token with one of its experts. Index tensors are int32 or int64, contiguous, all on one device. Sums are
fp32 and in a fixed order. Functions raise TypeError and ValueError for wrong arguments and wait for nothing on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.core import check
from flashinfer.ops import lora as ops

__all__ = [
    "bgmv_moe",
    "bgmv_moe_expand",
    "bgmv_moe_gemm1_lora_delta",
    "bgmv_moe_gemm2_lora_delta",
    "bgmv_moe_shrink",
    "fill_w_ptr",
    "has_bgmv_moe",
]


def has_bgmv_moe() -> bool:
    """Whether these functions run: they do."""
    return True


def fill_w_ptr(w_ptr: torch.Tensor, weights: torch.Tensor, num_experts: int, slice_id: int) -> None:
    """Write where the matrices of a slice lie into row `slice_id` of `w_ptr`.

    w_ptr: int64 `[num_slices, num_experts]`, on the device of the weights. weights: `[max_loras, num_experts, rows,
    columns]`, each matrix contiguous; it must live as long as the table is used. The `lora_stride` that goes with the
    table is `weights.stride(0)`.
    """
    check.positive("num_experts", num_experts)
    check.tensor("weights", weights, dtypes=check.FLOAT_DTYPES, shape=(None, num_experts, None, None))
    if weights.numel() and not weights[0, 0].is_contiguous():
        got = f"strides {weights.stride()}"
        raise ValueError(check.problem("weights", got, "contiguous matrices", "Call weights.contiguous()."))
    check.tensor("w_ptr", w_ptr, dtypes=(torch.int64,), shape=(None, num_experts), like=("weights", weights))
    check.choice("slice_id", slice_id, range(w_ptr.shape[0]))
    ops.addresses(w_ptr, weights, num_experts, slice_id)


def bgmv_moe_shrink(
    y: torch.Tensor,
    x: torch.Tensor,
    w_ptr: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    lora_indices: torch.Tensor,
    lora_stride: int,
    *,
    per_pair_input: bool = False,
) -> None:
    """`y[s, p] += x[token of p] @ A[s, expert of p, adapter of the token].T`, in place.

    y: `[num_slices, num_pairs, rank]`. x: `[num_tokens, hidden]`, with per_pair_input `[num_pairs, hidden]`. w_ptr,
    lora_stride: see `fill_w_ptr`; matrices `[rank, hidden]` of x's dtype. sorted_token_ids, expert_ids: `[num_pairs]`.
    lora_indices: `[num_tokens]`, negative: no adapter, y stays.
    """
    pairs = _pairs(sorted_token_ids, expert_ids, lora_indices, y)
    num_pairs = sorted_token_ids.shape[0]
    rows = num_pairs if per_pair_input else lora_indices.shape[0]
    like = ("y", y)
    check.tensor("y", y, dtypes=check.FLOAT_DTYPES, shape=(None, num_pairs, None), inner_contiguous=True)
    check.tensor("x", x, dtypes=check.FLOAT_DTYPES, shape=(rows, None), like=like, inner_contiguous=True)
    check.tensor("w_ptr", w_ptr, dtypes=(torch.int64,), shape=(y.shape[0], None), like=like, inner_contiguous=True)
    ops.shrink(y, x, [w_ptr], int(lora_stride), x.dtype, pairs, per_pair_input)


def bgmv_moe_expand(
    y: torch.Tensor,
    x: torch.Tensor,
    w_ptr: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    lora_indices: torch.Tensor,
    slice_start_loc: torch.Tensor,
    output_slices: list[int],
    lora_stride: int,
    *,
    finalize: bool = True,
) -> None:
    """`y[token of p, columns of s] += topk_weights[p] * x[s, p] @ B[s, expert of p, adapter of the token].T`, in place.

    y: `[num_tokens, columns]`; without finalize `[num_pairs, columns]`, each pair in its own row and unweighted. x:
    `[num_slices, num_pairs, rank]`. w_ptr, lora_stride: see `fill_w_ptr`; matrices `[output_slices[s], rank]` of x's
    dtype. topk_weights: fp32 `[num_pairs]`. slice_start_loc: int64 `[num_slices]`, the first column of each slice.
    """
    weights = topk_weights if finalize else None
    pairs = _pairs(sorted_token_ids, expert_ids, lora_indices, y)
    _expand(y, x, (w_ptr, int(lora_stride), x.dtype), pairs, weights, (slice_start_loc, list(output_slices)))


def bgmv_moe(
    x: torch.Tensor,
    lora_a_weights: list[torch.Tensor],
    lora_b_weights: list[torch.Tensor],
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    lora_indices: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    output_dim: int | None = None,
) -> torch.Tensor:
    """What the adapters add: `sum over pairs of topk_weight * (x[token] @ A.T) @ B.T`, `[num_tokens, output_dim]`.

    x: `[num_tokens, hidden]`. lora_a_weights, lora_b_weights: for each slice `[max_loras, num_experts, rank, hidden]`
    and `[max_loras, num_experts, width, rank]`, of x's dtype; slices lie side by side in the result. output_dim:
    default the sum of the widths. The product with A is kept in fp32. Returns x's dtype.
    """
    check.tensor("x", x, dtypes=check.FLOAT_DTYPES, shape=(None, None), inner_contiguous=True)
    if not lora_a_weights or len(lora_a_weights) != len(lora_b_weights):
        got = f"{len(lora_a_weights)} and {len(lora_b_weights)} tensors"
        raise ValueError(check.problem("lora_a_weights", got, "as many as lora_b_weights", "Pass one for each slice."))
    first_a, first_b = lora_a_weights[0], lora_b_weights[0]
    widths = [b.shape[2] for b in lora_b_weights]
    for s, (a, b) in enumerate(zip(lora_a_weights, lora_b_weights, strict=True)):
        shape = (first_a.shape[0], num_experts, first_a.shape[2], x.shape[1])
        check.tensor(f"lora_a_weights[{s}]", a, dtypes=(x.dtype,), shape=shape, like=("x", x))
        shape = (first_a.shape[0], num_experts, widths[s], first_a.shape[2])
        check.tensor(f"lora_b_weights[{s}]", b, dtypes=(x.dtype,), shape=shape, like=("x", x))
    pairs = _pairs(sorted_token_ids, expert_ids, lora_indices, x)
    out = torch.zeros(x.shape[0], output_dim or sum(widths), dtype=torch.float32, device=x.device)
    for a, b, begin in zip(lora_a_weights, lora_b_weights, _begins(widths), strict=True):
        tables = torch.empty(2, 1, num_experts, dtype=torch.int64, device=x.device)
        fill_w_ptr(tables[0], a, num_experts, 0)
        fill_w_ptr(tables[1], b, num_experts, 0)
        low = torch.zeros(1, sorted_token_ids.shape[0], first_b.shape[3], dtype=torch.float32, device=x.device)
        ops.shrink(low, x, [tables[0]], a.stride(0), x.dtype, pairs, False)
        columns = out[:, begin : begin + b.shape[2]]
        zero = torch.zeros(1, dtype=torch.int64, device=x.device)
        _expand(columns, low, (tables[1], b.stride(0), x.dtype), pairs, topk_weights, (zero, [b.shape[2]]))
    return out.to(x.dtype)


def bgmv_moe_gemm1_lora_delta(
    hidden_states: torch.Tensor,
    w_ptr_a: torch.Tensor,
    lora_stride_a: int,
    w_ptr_b: torch.Tensor,
    lora_stride_b: int,
    topk_ids: torch.Tensor,
    lora_ids: torch.Tensor,
    rank: int,
    intermediate_size: int,
    *,
    lora_dtype: torch.dtype = torch.bfloat16,
    scale: float = 1.0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """What the adapter of a token adds to the sums of each of its experts before their activation.

    Returns `[num_tokens, top_k, 2 * intermediate_size]`, columns of gates first, then those of up: each half
    `scale * (x @ A.T) @ B.T` with x a row of hidden_states `[num_tokens, hidden]`, in lora_dtype, and matrices of the
    half, of the expert in topk_ids `[num_tokens, top_k]` and of the adapter in lora_ids `[num_tokens]` (negative: none,
    zeros). w_ptr_a, w_ptr_b: row 0 for gates, row 1 for up; A is `[rank, hidden]`, B `[intermediate_size, rank]`; of
    one dimension: the halves share A, and B has the rows of both. lora_stride_a, lora_stride_b: see `fill_w_ptr`.
    """
    check.tensor("hidden_states", hidden_states, dtypes=check.FLOAT_DTYPES, shape=(None, None))
    halves = [intermediate_size, intermediate_size]
    if w_ptr_a.dim() == w_ptr_b.dim() == 1:
        w_ptr_a, w_ptr_b, halves = w_ptr_a[None], w_ptr_b[None], [sum(halves)]
    pairs = _chosen(topk_ids, lora_ids, hidden_states.shape[0], hidden_states)
    adapters = _Adapters((w_ptr_a, w_ptr_b), (int(lora_stride_a), int(lora_stride_b)), rank, halves)
    added = _added(adapters, hidden_states.to(lora_dtype), pairs, None, topk_ids.numel())
    return added.mul_(scale).to(out_dtype).view(*topk_ids.shape, -1)


def bgmv_moe_gemm2_lora_delta(
    gemm1_activation_output: torch.Tensor,
    expanded_idx_to_permuted_idx: torch.Tensor,
    w_ptr_a: torch.Tensor,
    lora_stride_a: int,
    w_ptr_b: torch.Tensor,
    lora_stride_b: int,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    lora_ids: torch.Tensor,
    rank: int,
    hidden_size: int,
    *,
    lora_dtype: torch.dtype = torch.bfloat16,
    scale: float = 1.0,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """What the adapters of tokens add to the result of a mixture of experts, `[num_tokens, hidden_size]`.

    `scale * (x @ A.T) @ B.T`, weighted by topk_weights (fp32 `[num_tokens, top_k]`) and added up over a token's slots.
    x: the row of gemm1_activation_output `[rows, intermediate_size]` that expanded_idx_to_permuted_idx
    `[num_tokens * top_k]` names for the slot, in lora_dtype; a slot whose row is negative adds nothing, whatever its
    expert and weight are. topk_ids, lora_ids, strides: as in `bgmv_moe_gemm1_lora_delta`. w_ptr_a, w_ptr_b:
    `[1, num_experts]`, of matrices `[rank, intermediate_size]` and `[hidden_size, rank]`.
    """
    like = ("gemm1_activation_output", gemm1_activation_output)
    check.tensor(*like, dtypes=check.FLOAT_DTYPES, shape=(None, None))
    pairs = _chosen(topk_ids, lora_ids, lora_ids.shape[0], gemm1_activation_output)
    sources, name = expanded_idx_to_permuted_idx, "expanded_idx_to_permuted_idx"
    check.tensor(name, sources, dtypes=check.POSITION_DTYPES, shape=(topk_ids.numel(),), like=like)
    weights_shape = tuple(topk_ids.shape)
    check.tensor("topk_weights", topk_weights, dtypes=(torch.float32,), shape=weights_shape, like=like)
    if gemm1_activation_output.shape[0] == 0:  # every pair is nowhere
        return torch.zeros(lora_ids.shape[0], hidden_size, dtype=out_dtype, device=topk_ids.device)
    # What is nowhere: zeros, of expert 0 and weight 0, since no host may wait to count the others.
    nowhere = sources < 0
    x = gemm1_activation_output[sources.clamp(min=0).long()].to(lora_dtype).masked_fill_(nowhere[:, None], 0)
    pairs[1] = pairs[1].masked_fill(nowhere, 0)
    weights = topk_weights.reshape(-1).masked_fill(nowhere, 0)
    adapters = _Adapters((w_ptr_a, w_ptr_b), (int(lora_stride_a), int(lora_stride_b)), rank, [hidden_size])
    return _added(adapters, x, pairs, weights, lora_ids.shape[0]).mul_(scale).to(out_dtype)


class _Adapters(NamedTuple):
    """tables, strides: of A and of B, see `fill_w_ptr`. widths: rows of B in each of the tables' rows."""

    tables: tuple[torch.Tensor, torch.Tensor]
    strides: tuple[int, int]
    rank: int
    widths: list[int]


def _chosen(topk_ids: torch.Tensor, lora_ids: torch.Tensor, num_tokens: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Token, expert and, by token, adapter of the pairs of all tokens with all their experts; checked."""
    others = ("the other tensors", like)
    check.tensor("topk_ids", topk_ids, dtypes=check.POSITION_DTYPES, shape=(num_tokens, None), like=others)
    check.tensor("lora_ids", lora_ids, dtypes=check.POSITION_DTYPES, shape=(num_tokens,), like=others)
    slots = torch.arange(topk_ids.numel(), device=like.device)
    return [slots // max(topk_ids.shape[1], 1), topk_ids.reshape(-1), lora_ids.contiguous()]


def _added(
    adapters: _Adapters, x: torch.Tensor, pairs: list[torch.Tensor], weights: torch.Tensor | None, num_rows: int
) -> torch.Tensor:
    """fp32 `[num_rows, columns]`. weights: x has a row for each pair, and a token's are added up; None: neither."""
    tables, strides, rank, widths = adapters
    check.choice("lora_dtype", x.dtype, check.FLOAT_DTYPES)
    check.positive("rank", rank)
    for name, table in zip(("w_ptr_a", "w_ptr_b"), tables, strict=True):
        like = ("the other tensors", x)
        check.tensor(name, table, dtypes=(torch.int64,), shape=(len(widths), None), like=like, inner_contiguous=True)
    low = torch.zeros(len(widths), pairs[0].shape[0], rank, dtype=torch.float32, device=x.device)
    ops.shrink(low, x.contiguous(), [tables[0]], strides[0], x.dtype, pairs, weights is not None)
    out = torch.zeros(num_rows, sum(widths), dtype=torch.float32, device=x.device)
    begins = torch.arange(len(widths), device=x.device) * widths[0]
    ops.expand(out, low, [tables[1]], strides[1], x.dtype, [*pairs, weights], begins, widths)
    return out


def _begins(widths: list[int]) -> list[int]:
    return [sum(widths[:s]) for s in range(len(widths))]


def _pairs(
    tokens: torch.Tensor, experts: torch.Tensor, adapters: torch.Tensor, like: torch.Tensor
) -> list[torch.Tensor]:
    """Checked fields of `ops.Pairs`."""
    dtypes = check.POSITION_DTYPES
    named = (("sorted_token_ids", tokens), ("expert_ids", experts), ("lora_indices", adapters))
    for name, x in named:
        shape = (tokens.shape[0],) if name == "expert_ids" else (None,)
        check.tensor(name, x, dtypes=dtypes, shape=shape, like=("the other tensors", like), inner_contiguous=True)
    return [tokens, experts, adapters]


def _expand(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: tuple[torch.Tensor, int, torch.dtype],
    pairs: list[torch.Tensor],
    weights: torch.Tensor | None,
    slices: tuple[torch.Tensor, list[int]],
) -> None:
    """adapters: table, stride, dtype. slices: first columns, widths."""
    num_pairs, like = pairs[0].shape[0], ("y", y)
    rows = num_pairs if weights is None else pairs[2].shape[0]
    check.tensor("y", y, dtypes=check.FLOAT_DTYPES, shape=(rows, None), inner_contiguous=True)
    shape: tuple[int | None, ...] = (len(slices[1]), num_pairs, None)
    check.tensor("x", x, dtypes=check.FLOAT_DTYPES, shape=shape, like=like, inner_contiguous=True)
    shape = (len(slices[1]), None)
    check.tensor("w_ptr", adapters[0], dtypes=(torch.int64,), shape=shape, like=like, inner_contiguous=True)
    check.tensor("slice_start_loc", slices[0], dtypes=(torch.int64,), shape=(len(slices[1]),), like=like)
    if weights is not None:
        dtypes = (torch.float32,)
        check.tensor("topk_weights", weights, dtypes=dtypes, shape=(num_pairs,), like=like, inner_contiguous=True)
    ops.expand(y, x, [adapters[0]], adapters[1], adapters[2], [*pairs, weights], *slices)
