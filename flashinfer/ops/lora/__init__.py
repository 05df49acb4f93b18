"""Low-rank adapters of experts: each pair of a token and an expert is multiplied with matrices of its adapter's.

The matrices are found through tables of addresses, `[num_slices, num_experts]`, adapter 0 of each.
"""

from __future__ import annotations

from typing import Any

import torch

from flashinfer.core import check, library
from flashinfer.core.select import Choice, Impl
from flashinfer.ops.lora.spec import Adapters, Expand, Pairs, Shrink
from flashinfer.ops.lora.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.lora.triton", triton_supports),
    Impl("torch", "flashinfer.ops.lora.reference", torch_supports),
)
CHOICE = Choice(IMPLS)


@library.register("lora_addresses(Tensor(a!) table, Tensor weights, int num_experts, int slice_id) -> ()")
def addresses(table: torch.Tensor, weights: torch.Tensor, num_experts: int, slice_id: int) -> None:
    """Row `slice_id` of an int64 table: the addresses of adapter 0 in `weights [adapters, num_experts, ...]`."""
    step = weights.stride(1) * weights.element_size()
    offsets = torch.arange(num_experts, dtype=torch.int64, device=table.device) * step
    table[slice_id].copy_(offsets + weights.data_ptr())


@library.register(
    "lora_shrink(Tensor(a!) y, Tensor x, Tensor[] adapters, int stride, ScalarType dtype, Tensor[] pairs, "
    "bool by_pair) -> ()"
)
def shrink(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: list[torch.Tensor],
    stride: int,
    dtype: torch.dtype,
    pairs: list[torch.Tensor],
    by_pair: bool,
) -> None:
    """`Shrink` of tensors. adapters: the table; stride: between adapters; pairs: the fields of `Pairs`."""
    tensors = Shrink(y, x, Adapters(adapters[0], stride, dtype), Pairs(*pairs), by_pair)
    if y.numel() == 0:
        return
    if y.is_cpu:
        check_pairs(tensors.pairs, adapters[0].shape[1])
    CHOICE.module(None, y.device).shrink(tensors)


@library.register(
    "lora_expand(Tensor(a!) y, Tensor x, Tensor[] adapters, int stride, ScalarType dtype, Tensor?[] pairs, "
    "Tensor begins, int[] widths) -> ()"
)
def expand(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: list[torch.Tensor],
    stride: int,
    dtype: torch.dtype,
    pairs: list[Any],
    begins: torch.Tensor,
    widths: list[int],
) -> None:
    """`Expand` of tensors; see `shrink`. pairs: the fields of `Pairs`, then the weights or None."""
    *named, weights = pairs
    tensors = Expand(y, x, Adapters(adapters[0], stride, dtype), Pairs(*named), weights, begins, tuple(widths))
    if y.numel() == 0 or x.numel() == 0:
        return
    if y.is_cpu:
        check_pairs(tensors.pairs, adapters[0].shape[1])
    CHOICE.module(None, y.device).expand(tensors)


def check_pairs(pairs: Pairs, num_experts: int) -> None:
    """Check on the CPU what would read foreign memory on a GPU; raises ValueError."""
    check.index_range("sorted_token_ids", pairs.tokens, 0, pairs.adapters.shape[0])
    check.index_range("expert_ids", pairs.experts, 0, num_experts)


__all__ = ["CHOICE", "IMPLS", "Adapters", "Expand", "Pairs", "Shrink", "addresses", "check_pairs", "expand", "shrink"]
