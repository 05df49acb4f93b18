"""The forms in which callers hand over KV, brought to one: NHD views `[pages, page_size, num_kv_heads, head_dim]`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashinfer.core import check

KV_LAYOUTS = ("NHD", "HND")
PagedKVCache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def kv_layout(value: str) -> str:
    """Check a layout name; an unknown one is a KeyError, as in the original library."""
    return str(check.choice("kv_layout", value, KV_LAYOUTS, KeyError))


def paged_views(paged_kv_cache: PagedKVCache, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a paged cache as 4-D NHD views; no copy.

    paged_kv_cache: one tensor `[pages, 2, page_size, num_kv_heads, head_dim]` (K is index 0 of dim 1), or a tuple
    (k_cache, v_cache) of `[pages, page_size, num_kv_heads, head_dim]`, with heads before tokens for HND; the same
    without the token dimension means page_size 1. Raises TypeError, ValueError.
    """
    name = "paged_kv_cache"
    if isinstance(paged_kv_cache, torch.Tensor):
        joined = paged_kv_cache
        if joined.dim() == 4:
            joined = joined.unsqueeze(2 if layout == "NHD" else 3)
        if joined.dim() != 5 or joined.shape[1] != 2:
            raise ValueError(
                check.problem(
                    name,
                    f"shape {list(paged_kv_cache.shape)}",
                    "[pages, 2, page_size, num_kv_heads, head_dim], or heads before tokens in HND",
                    "Stack K and V in dim 1, or pass the tuple (k_cache, v_cache).",
                )
            )
        k, v = joined.unbind(1)
    elif isinstance(paged_kv_cache, Sequence) and len(paged_kv_cache) == 2:
        k, v = (_with_page_dim(t, layout, f"{name}[{i}]") for i, t in enumerate(paged_kv_cache))
    else:
        got = type(paged_kv_cache).__name__
        raise TypeError(check.problem(name, got, "a tensor or a tuple (k_cache, v_cache)", "Pass one of these."))
    if layout == "HND":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    return k, v


def _with_page_dim(cache: torch.Tensor, layout: str, name: str) -> torch.Tensor:
    if not isinstance(cache, torch.Tensor) or cache.dim() not in (3, 4):
        got = list(cache.shape) if isinstance(cache, torch.Tensor) else type(cache).__name__
        raise ValueError(
            check.problem(name, got, "a tensor of 3 (page size 1) or 4 dimensions", "Pass k_cache and v_cache as such.")
        )
    return cache if cache.dim() == 4 else cache.unsqueeze(1 if layout == "NHD" else 2)


def token_views(k: torch.Tensor, v: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V `[tokens, num_kv_heads, head_dim]` (heads first for HND) as pages of one token, NHD; no copy."""
    views = []
    for name, x in (("k", k), ("v", v)):
        check.tensor(name, x, shape=(None, None, None))
        views.append((x if layout == "NHD" else x.transpose(0, 1)).unsqueeze(1))
    return views[0], views[1]


def page_table(table: Sequence[torch.Tensor], like: tuple[str, torch.Tensor]) -> list[torch.Tensor]:
    """Check batch_indices and positions, one a row of `like`, and kv_indices and kv_indptr: int32, contiguous.

    Returns the four. Raises TypeError, ValueError.
    """
    for name, x in zip(("batch_indices", "positions", "kv_indices", "kv_indptr"), table, strict=True):
        shape = (None if name.startswith("kv") else like[1].shape[0],)
        check.tensor(name, x, dtypes=check.INDEX_DTYPES, shape=shape, like=like)
        if not x.is_contiguous():
            got, fix = f"stride {x.stride(0)}", f"Call {name}.contiguous()."
            raise ValueError(check.problem(name, got, "a contiguous tensor", fix))
    return list(table)
