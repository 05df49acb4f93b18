"""The records of adapters' products. All index tensors are int32 or int64 and contiguous."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Adapters(NamedTuple):
    """Matrices of every slice, expert and adapter, contiguous in memory.

    table: int64 `[num_slices, num_experts]`, addresses of adapter 0's. stride: elements from one adapter to the next.
    dtype: of the numbers.
    """

    table: torch.Tensor
    stride: int
    dtype: torch.dtype


class Pairs(NamedTuple):
    """tokens, experts: `[num_pairs]`. adapters: `[num_tokens]`, negative for a token that has none."""

    tokens: torch.Tensor
    experts: torch.Tensor
    adapters: torch.Tensor


class Shrink(NamedTuple):
    """`y[s, p] += x[token of p] @ A.T`: A `[rank, depth]` of slice s, of the expert of p, of its token's adapter.

    y: `[num_slices, num_pairs, rank]`. x: `[num_tokens, depth]`, or by_pair `[num_pairs, depth]`. Innermost strides 1.
    """

    y: torch.Tensor
    x: torch.Tensor
    adapters: Adapters
    pairs: Pairs
    by_pair: bool


class Expand(NamedTuple):
    """`y[row, begins[s] : begins[s] + widths[s]] += weight * x[s, p] @ B.T`, B `[widths[s], rank]`.

    With weights (fp32 `[num_pairs]`) row is the token of p, y `[num_tokens, columns]`, and pairs are summed in their
    order. Without, row is p and weight 1. x: `[num_slices, num_pairs, rank]`. begins: int64 `[num_slices]`.
    """

    y: torch.Tensor
    x: torch.Tensor
    adapters: Adapters
    pairs: Pairs
    weights: torch.Tensor | None
    begins: torch.Tensor
    widths: tuple[int, ...]
