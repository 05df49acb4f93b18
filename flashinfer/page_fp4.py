"""Appends to an NVFP4 paged KV cache; callers find these functions in `flashinfer.page`.

A number is code (e2m1, two to a byte, the first in the low bits) times block scale (e4m3, one for 16 components) times
the global scale. A block's scale is its largest magnitude over 6 and over the global scale.
"""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.core.kv_cache import PagedKVCache, page_table, paged_views
from flashinfer.core.kv_cache import kv_layout as checked_layout
from flashinfer.core.replay import replayed
from flashinfer.ops import page as ops

Pair = tuple[torch.Tensor, torch.Tensor]
SCALE_DTYPES = (torch.uint8, torch.float8_e4m3fn)


def nvfp4_quantize_append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    kv_cache_sf: PagedKVCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    k_scale: float,
    v_scale: float,
    kv_layout: str = "NHD",
) -> None:
    """Quantise new keys and values to NVFP4 and write them into a paged cache, in place; does not wait for the device.

    append_key, append_value: fp16 or bf16 (or fp32) `[nnz, num_kv_heads, head_dim]`, head_dim a multiple of 16.
    paged_kv_cache: uint8, a tuple of `[pages, page_size, num_kv_heads, head_dim / 2]` (heads before tokens for "HND")
    or one tensor `[pages, 2, ...]`; kv_cache_sf: e4m3 or its bytes in the same form, `head_dim / 16` wide. k_scale,
    v_scale: the global scales, numbers above 0. The page table is that of `append_paged_kv_cache`.
    """
    table = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    _append((append_key, append_value), table, paged_kv_cache, kv_cache_sf, (k_scale, v_scale), kv_layout)


@replayed
def _append(
    rows: Pair,
    table: tuple[torch.Tensor, ...],
    cache: PagedKVCache,
    factors: PagedKVCache,
    scales: tuple[float, float],
    kv_layout: str,
) -> None:
    like = ("append_key", rows[0])
    where = page_table(table[:4], like)
    check.tensor("kv_last_page_len", table[4], dtypes=check.INDEX_DTYPES, like=like)
    ops.append_fp4(_caches(*rows, cache, factors, kv_layout), list(rows), where, _scales(*scales))


def nvfp4_quantize_append_paged_kv_cache_with_slot_mapping(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    slot_mapping: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    kv_cache_sf: PagedKVCache,
    k_scale: float,
    v_scale: float,
    kv_layout: str = "NHD",
) -> None:
    """The same, addressed as vLLM and SGLang do: see `append_paged_kv_cache_with_slot_mapping`."""
    rows, scales = (append_key, append_value), (k_scale, v_scale)
    _append_to_slots(rows, slot_mapping, paged_kv_cache, kv_cache_sf, scales, kv_layout)


@replayed
def _append_to_slots(
    rows: Pair,
    slot_mapping: torch.Tensor,
    cache: PagedKVCache,
    factors: PagedKVCache,
    scales: tuple[float, float],
    kv_layout: str,
) -> None:
    like, dtypes = ("append_key", rows[0]), check.POSITION_DTYPES
    check.tensor("slot_mapping", slot_mapping, dtypes=dtypes, shape=(None,), like=like, inner_contiguous=True)
    num_tokens = slot_mapping.shape[0]
    key, value = (x[:num_tokens] for x in rows)
    if key.shape[0] != num_tokens:
        got = f"{key.shape[0]} rows for {num_tokens} slots"
        raise ValueError(check.problem("append_key", got, "a row for each slot", "Pass the rows of all tokens."))
    ops.append_fp4(_caches(key, value, cache, factors, kv_layout), [key, value], [slot_mapping], _scales(*scales))


def _scales(k_scale: float, v_scale: float) -> list[float]:
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not scale > 0:
            raise ValueError(check.problem(name, scale, "a number above 0", "Pass the scale attention multiplies by."))
    return [float(k_scale), float(v_scale)]


def _caches(
    key: torch.Tensor, value: torch.Tensor, cache: PagedKVCache, factors: PagedKVCache, kv_layout: str
) -> list[torch.Tensor]:
    """Checked NHD views: codes of keys and of values, their scales as bytes."""
    layout, like = checked_layout(kv_layout), ("append_key", key)
    check.tensor("append_key", key, dtypes=check.FLOAT_DTYPES, shape=(None, None, None), inner_contiguous=True)
    check.tensor("append_value", value, dtypes=(key.dtype,), shape=key.shape, like=like, inner_contiguous=True)
    _, num_heads, head_dim = key.shape
    check.multiple("last dimension of append_key", head_dim, "elements a scale", 16)
    codes, scales = paged_views(cache, layout), paged_views(factors, layout)
    for code, scale in zip(codes, scales, strict=True):
        shape = (None, None, num_heads, head_dim // 2)
        check.tensor("paged_kv_cache", code, dtypes=(torch.uint8,), shape=shape, like=like, inner_contiguous=True)
        wanted = (*code.shape[:3], head_dim // 16)
        check.tensor("kv_cache_sf", scale, dtypes=SCALE_DTYPES, shape=wanted, like=like, inner_contiguous=True)
    return [*codes, *(scale.view(torch.uint8) for scale in scales)]
