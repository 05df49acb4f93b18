"""Tokens from the rows of their experts: weighted sums in a fixed order, so that results repeat bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.early import wait_for_launch_before


@dataclass(frozen=True)
class CombineConfig:
    """splits: parts whose sum a row is. block: columns of a program. together: pairs whose rows it reads at once.

    early: see `device/early`.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    splits: int
    block: int
    together: int
    early: bool


class Parts(NamedTuple):
    """y: `[splits, n, hidden_size]`, contiguous, split_stride elements a part. rows: int32 `[pairs]`, the row of a pair
    or -1; None: row p is pair p. bias: `[num_experts, hidden_size]` of row stride bias_stride, or None."""

    y: torch.Tensor
    split_stride: int
    rows: torch.Tensor | None
    bias: torch.Tensor | None
    bias_stride: int


@triton.jit(do_not_specialize=["stride_out", "first"])
def combine_kernel(out, stride_out, parts, ids, weights, first, cfg: tl.constexpr):
    """Grid: (tokens, blocks of columns)."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * cfg.block + tl.arange(0, cfg.block)
    total = tl.full([cfg.block], 0.0, tl.float32)
    TOGETHER: tl.constexpr = cfg.together
    SPLITS: tl.constexpr = cfg.splits
    wait_for_launch_before(cfg.early)
    # A loop over all, not unrolled: 64 rows read at once would take more registers than there are.
    for begin in tl.range(0, cfg.top_k, TOGETHER, loop_unroll_factor=1):
        for i in tl.static_range(TOGETHER):
            inside = begin + i < cfg.top_k
            pair = token * cfg.top_k + begin + i
            expert = tl.load(ids + pair, mask=inside, other=-1) - first
            held = inside & (expert >= 0) & (expert < cfg.num_experts)
            row = pair
            if parts.rows is not None:
                row = tl.load(parts.rows + pair, mask=held, other=0).to(tl.int64)
            exists = offs < tl.where(held, cfg.hidden_size, 0)
            at = parts.y + row * cfg.hidden_size + offs
            y = tl.full([cfg.block], 0.0, tl.float32)
            for s in tl.static_range(SPLITS):
                y += tl.load(at + s * parts.split_stride, mask=exists, other=0.0).to(tl.float32)
            if parts.bias is not None:
                at_bias = parts.bias + expert.to(tl.int64) * parts.bias_stride + offs
                y += tl.load(at_bias, mask=exists, other=0.0).to(tl.float32)
            # What is not held adds nothing, whatever its weight is.
            total += tl.where(held, tl.load(weights + pair, mask=inside, other=0.0) * y, 0.0)
    tl.store(out + token * stride_out + offs, total.to(out.dtype.element_ty), mask=offs < cfg.hidden_size)
