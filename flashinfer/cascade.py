"""Merging attention states: the ⊕ algebra behind split KV, cascades and rings."""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.ops import merge

__all__ = ["merge_state", "merge_state_in_place", "merge_states"]


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of attention over the union of two disjoint sets of keys.

    v_a, v_b `[n, num_heads, head_dim]`, fp32/fp16/bf16, any strides with the innermost 1; s_a, s_b fp32 `[n,
    num_heads]`, base-2 log-sum-exp. Returns (v, s) of the same shapes: v = (2^s_a v_a + 2^s_b v_b) / (2^s_a + 2^s_b); a
    side with lse -inf counts for nothing (FlashInfer, arXiv 2501.01005, section 2.2). Raises TypeError, ValueError.
    """
    _check_state(v_a, s_a, ("v_a", "s_a"))
    _check_state(v_b, s_b, ("v_b", "s_b"), like=("v_a", v_a))
    v, s = torch.empty_like(v_a, memory_format=torch.contiguous_format), torch.empty_like(s_a)
    merge.merge_pair((v_a, s_a), (v_b, s_b), (v, s))
    return v, s


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """`merge_state` of (v, s) with (v_other, s_other), written to v and s.

    Shapes as in `merge_state`. mask: bool or uint8 `[n]`; where it is 0 the state stays as it is. s must be fp32.
    """
    _check_state(v, s, ("v", "s"))
    _check_state(v_other, s_other, ("v_other", "s_other"), like=("v", v))
    if mask is not None:
        check.tensor("mask", mask, dtypes=(torch.bool, torch.uint8), shape=(v.shape[0],), like=("v", v))
    merge.merge_pair((v, s), (v_other, s_other), (v, s), mask)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of attention over the union of `num_states` disjoint sets of keys, merged in index order.

    v `[n, num_states, num_heads, head_dim]`, s fp32 `[n, num_states, num_heads]` -> `[n, num_heads, head_dim]` and
    `[n, num_heads]`; no states at all give 0 and -inf.
    """
    check.tensor("v", v, dtypes=check.FLOAT_DTYPES, shape=(None,) * 4, inner_contiguous=True)
    check.tensor("s", s, dtypes=(torch.float32,), shape=v.shape[:3], like=("v", v))
    n, _, num_heads, head_dim = v.shape
    merged = torch.empty((n, num_heads, head_dim), dtype=v.dtype, device=v.device)
    total = torch.empty((n, num_heads), dtype=torch.float32, device=v.device)
    merge.merge_many(v, s, (merged, total))
    return merged, total


def _check_state(
    v: torch.Tensor, s: torch.Tensor, names: tuple[str, str], like: tuple[str, torch.Tensor] | None = None
) -> None:
    dtypes = check.FLOAT_DTYPES if like is None else (like[1].dtype,)
    shape = (None, None, None) if like is None else like[1].shape
    check.tensor(names[0], v, dtypes=dtypes, shape=shape, like=like, inner_contiguous=True)
    check.tensor(names[1], s, dtypes=(torch.float32,), shape=v.shape[:2], like=(names[0], v))
