"""Merging attention states: the ⊕ algebra behind split KV, cascades and rings."""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.core.replay import replayed
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
    v, s = (_made(name, x) for name, x in (("v_a", v_a), ("s_a", s_a)))
    _merge(v, s, v_a, s_a, v_b, s_b)
    return v, s


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """`merge_state` of (v, s) with (v_other, s_other), written to v and s.

    Shapes as in `merge_state`. mask: bool or uint8 `[n]`; where it is 0 the state stays as it is. s must be fp32.
    """
    _merge_in_place(v, s, v_other, s_other, mask)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of attention over the union of `num_states` disjoint sets of keys, merged in index order.

    v `[n, num_states, num_heads, head_dim]`, s fp32 `[n, num_states, num_heads]` -> `[n, num_heads, head_dim]` and
    `[n, num_heads]`; no states at all give 0 and -inf.
    """
    n, _, num_heads, head_dim = check.tensor("v", v, shape=(None,) * 4).shape
    merged = torch.empty((n, num_heads, head_dim), dtype=v.dtype, device=v.device)
    total = torch.empty((n, num_heads), dtype=torch.float32, device=v.device)
    _merge_many(merged, total, v, s)
    return merged, total


def _made(name: str, x: torch.Tensor) -> torch.Tensor:
    check.tensor(name, x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@replayed
def _merge(
    v: torch.Tensor, s: torch.Tensor, v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> None:
    _check_state(v_a, s_a, ("v_a", "s_a"))
    _check_state(v_b, s_b, ("v_b", "s_b"), like=("v_a", v_a))
    merge.merge_pair(v, s, v_a, s_a, v_b, s_b, None)


@replayed
def _merge_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None
) -> None:
    _check_state(v, s, ("v", "s"))
    _check_state(v_other, s_other, ("v_other", "s_other"), like=("v", v))
    if mask is not None:
        check.tensor("mask", mask, dtypes=(torch.bool, torch.uint8), shape=(v.shape[0],), like=("v", v))
    merge.merge_pair(v, s, None, None, v_other, s_other, mask)


@replayed
def _merge_many(merged: torch.Tensor, total: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> None:
    check.tensor("v", v, dtypes=check.FLOAT_DTYPES, inner_contiguous=True)
    check.tensor("s", s, dtypes=(torch.float32,), shape=v.shape[:3], like=("v", v))
    merge.merge_many(merged, total, v, s)


def _check_state(
    v: torch.Tensor, s: torch.Tensor, names: tuple[str, str], like: tuple[str, torch.Tensor] | None = None
) -> None:
    dtypes = check.FLOAT_DTYPES if like is None else (like[1].dtype,)
    shape = (None, None, None) if like is None else like[1].shape
    check.tensor(names[0], v, dtypes=dtypes, shape=shape, like=like, inner_contiguous=True)
    check.tensor(names[1], s, dtypes=(torch.float32,), shape=v.shape[:2], like=(names[0], v))
