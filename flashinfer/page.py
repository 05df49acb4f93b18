"""The paged KV cache with FlashInfer's names and signatures. All index tensors are int32."""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.core.kv_cache import PagedKVCache, page_table, paged_views
from flashinfer.core.kv_cache import kv_layout as checked_layout
from flashinfer.core.replay import replayed
from flashinfer.ops import page as ops
from flashinfer.page_fp4 import (
    nvfp4_quantize_append_paged_kv_cache,
    nvfp4_quantize_append_paged_kv_cache_with_slot_mapping,
)

__all__ = [
    "append_paged_kv_cache",
    "append_paged_kv_cache_with_slot_mapping",
    "append_paged_mla_kv_cache",
    "get_batch_indices_positions",
    "get_seq_lens",
    "nvfp4_quantize_append_paged_kv_cache",
    "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping",
    "quantize_append_paged_kv_cache",
]

QUANTIZED_DTYPES = (*check.FP8_DTYPES, torch.int8)
KVScale = float | torch.Tensor


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Tokens of each request: `(pages - 1) * page_size + last_page_len`, 0 for a request without pages.

    kv_indptr: `[batch_size + 1]` in pages. kv_last_page_len: `[batch_size]`; of no meaning where there are no pages.
    page_size: tokens a page. Returns int32 `[batch_size]` on their device, without waiting for it.
    """
    _check_indptr("kv_indptr", check.tensor("kv_indptr", kv_indptr, dtypes=check.INDEX_DTYPES))
    out = torch.empty(kv_indptr.shape[0] - 1, dtype=torch.int32, device=kv_indptr.device)
    _seq_lens(out, kv_indptr, kv_last_page_len, page_size)
    return out


@replayed
def _seq_lens(out: torch.Tensor, kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> None:
    _check_last_page_len(kv_last_page_len, kv_indptr)
    check.positive("page_size", page_size)
    ops.seq_lens(out, kv_indptr, kv_last_page_len, page_size)


def _check_indptr(name: str, x: torch.Tensor) -> None:
    if x.dim() != 1 or x.shape[0] == 0 or not x.is_contiguous():
        got = f"shape {list(x.shape)}, stride {x.stride()}"
        raise ValueError(check.problem(name, got, "a contiguous [batch_size + 1]", "Pass prefix sums."))


def _check_last_page_len(kv_last_page_len: torch.Tensor, kv_indptr: torch.Tensor) -> None:
    shape = (kv_indptr.shape[0] - 1,)
    check.tensor(
        "kv_last_page_len", kv_last_page_len, dtypes=check.INDEX_DTYPES, shape=shape, like=("kv_indptr", kv_indptr)
    )


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The request and the position in it of each token to append; what `append_paged_kv_cache` asks for.

    append_indptr: `[batch_size + 1]`, request i appends rows `append_indptr[i]` to `append_indptr[i + 1]`.
    seq_lens: `[batch_size]`, lengths after the append, so token j of request i stands at
    `seq_lens[i] - append_len[i] + j`. nnz: rows to fill, at least `append_indptr[-1]`; the rest get (-1, 0).
    batch_indices, positions: `[nnz]` buffers to fill, made if not given. Returns both; does not wait for the device.
    """
    check.tensor("append_indptr", append_indptr, dtypes=check.INDEX_DTYPES)
    _check_indptr("append_indptr", append_indptr)
    if isinstance(nnz, bool) or not isinstance(nnz, int) or nnz < 0:
        raise ValueError(check.problem("nnz", repr(nnz), "an int of at least 0", "Pass the number of rows."))
    like = ("append_indptr", append_indptr)
    check.tensor("seq_lens", seq_lens, dtypes=check.INDEX_DTYPES, shape=(append_indptr.shape[0] - 1,), like=like)
    filled = []
    for name, buffer in (("batch_indices", batch_indices), ("positions", positions)):
        if buffer is None:
            buffer = torch.empty(nnz, dtype=torch.int32, device=append_indptr.device)
        filled.append(check.tensor(name, buffer, dtypes=check.INDEX_DTYPES, shape=(nnz,), like=like))
    ops.batch_indices_positions(*filled, append_indptr, seq_lens)
    return filled[0], filled[1]


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write new keys and values into a paged KV cache, in place; does not wait for the device.

    append_key, append_value: `[nnz, num_kv_heads, head_dim]`, fp32, fp16, bf16 or the cache's dtype; converted to the
    cache's dtype (fp8: saturating, NaN kept). batch_indices, positions: `[nnz]`, see `get_batch_indices_positions`; a
    token with a negative batch index is skipped. paged_kv_cache: a tuple (k_cache, v_cache) of
    `[pages, page_size, num_kv_heads, head_dim]` or one tensor `[pages, 2, ...]`, heads before tokens for "HND", any
    strides with the innermost 1; without the token dimension page_size is 1. kv_indices: page numbers of all requests.
    kv_indptr: `[batch_size + 1]` in pages. kv_last_page_len: `[batch_size]`, not read. The page table must already hold
    the pages of the new tokens; two tokens may not go to the same place.

    Raises KeyError for an unknown kv_layout, ValueError for a wrong shape, dtype, stride or device and, with CPU
    tensors, for tokens outside of the page table.
    """
    where = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    _append(append_key, append_value, paged_kv_cache, where, None, kv_layout)


def append_paged_mla_kv_cache(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> None:
    """Write new compressed KV and its rotated keys into the paged caches of multi-head latent attention, in place.

    append_ckv: `[nnz, head_dim_ckv]`, append_kpe: `[nnz, head_dim_kpe]`. ckv_cache `[pages, page_size, head_dim_ckv]`,
    kpe_cache `[pages, page_size, head_dim_kpe]`, any strides with the innermost 1. Everything else as in
    `append_paged_kv_cache`.
    """
    where = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    _append_mla(append_ckv, append_kpe, ckv_cache, kpe_cache, where)


def quantize_append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    k_scale: KVScale,
    v_scale: KVScale,
    kv_layout: str = "NHD",
) -> None:
    """`append_paged_kv_cache` of keys divided by k_scale and values divided by v_scale, to an fp8 or int8 cache.

    k_scale, v_scale: both numbers, or both fp32 tensors `[1]` or `[num_kv_heads]`: what attention multiplies by to get
    the keys and values back. int8 rounds to nearest even and saturates.
    """
    where = (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    _append(append_key, append_value, paged_kv_cache, where, (k_scale, v_scale), kv_layout)


def append_paged_kv_cache_with_slot_mapping(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    slot_mapping: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    k_scale: KVScale = 1.0,
    v_scale: KVScale = 1.0,
    kv_layout: str = "NHD",
) -> None:
    """Write each new key and value into a slot of a paged KV cache, in place: how vLLM and SGLang address a cache.

    slot_mapping: int32 or int64 `[nnz]`, `page * page_size + place in the page`; a negative slot skips the token.
    append_key, append_value: at least nnz rows; what lies behind them is padding. k_scale, v_scale: see
    `quantize_append_paged_kv_cache`; the cache may have any dtype here. Everything else as in `append_paged_kv_cache`.
    """
    _append_to_slots(append_key, append_value, slot_mapping, paged_kv_cache, (k_scale, v_scale), kv_layout)


@replayed
def _append(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    table: tuple[torch.Tensor, ...],
    scales: tuple[KVScale, KVScale] | None,
    kv_layout: str,
) -> None:
    """table: batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len. scales: where rows are quantised."""
    k_cache, v_cache = paged_views(paged_kv_cache, checked_layout(kv_layout))
    stored = check.FLOAT_DTYPES + check.FP8_DTYPES if scales is None else QUANTIZED_DTYPES
    _check_data(append_key, append_value, k_cache, v_cache, stored)
    where = _page_table(table, append_key)
    divisors: tuple[list[float], list[torch.Tensor]] = ([], []) if scales is None else _scales(*scales, append_key)
    ops.append_paged_kv_cache(k_cache, v_cache, append_key, append_value, where, *divisors)


@replayed
def _append_mla(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    table: tuple[torch.Tensor, ...],
) -> None:
    for name, x in (("append_ckv", append_ckv), ("append_kpe", append_kpe)):
        check.tensor(name, x, shape=(append_ckv.shape[0], None), like=("append_ckv", append_ckv))
    for name, x in (("ckv_cache", ckv_cache), ("kpe_cache", kpe_cache)):
        check.tensor(name, x, shape=(*ckv_cache.shape[:2], None), like=("append_ckv", append_ckv))
    key, value, k_cache, v_cache = (x.unsqueeze(-2) for x in (append_ckv, append_kpe, ckv_cache, kpe_cache))
    _check_data(key, value, k_cache, v_cache, check.FLOAT_DTYPES + check.FP8_DTYPES)
    ops.append_paged_kv_cache(k_cache, v_cache, key, value, _page_table(table, append_ckv), [], [])


@replayed
def _append_to_slots(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    slot_mapping: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    scales: tuple[KVScale, KVScale],
    kv_layout: str,
) -> None:
    k_cache, v_cache = paged_views(paged_kv_cache, checked_layout(kv_layout))
    check.tensor("append_key", append_key, shape=(None, None, None))
    check.tensor("append_value", append_value, shape=(None, None, None))
    like = ("append_key", append_key)
    check.tensor(
        "slot_mapping", slot_mapping, dtypes=check.POSITION_DTYPES, shape=(None,), like=like, inner_contiguous=True
    )
    num_tokens = slot_mapping.shape[0]
    key, value = append_key[:num_tokens], append_value[:num_tokens]
    if key.shape[0] != num_tokens:
        got = f"{append_key.shape[0]} rows for {num_tokens} slots"
        raise ValueError(check.problem("append_key", got, "a row for each slot", "Pass the rows of all tokens."))
    _check_data(key, value, k_cache, v_cache, check.FLOAT_DTYPES + QUANTIZED_DTYPES)
    ops.append_paged_kv_cache(k_cache, v_cache, key, value, [slot_mapping], *_scales(*scales, key))


def _check_data(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    stored: tuple[torch.dtype, ...],
) -> None:
    like = ("append_key", key)
    check.tensor("K cache", k_cache, dtypes=stored, inner_contiguous=True)
    dtypes = (*check.FLOAT_DTYPES, k_cache.dtype)
    check.tensor("append_key", key, dtypes=dtypes, shape=(None, None, None), inner_contiguous=True)
    shape = (*key.shape[:2], None)
    check.tensor("append_value", value, dtypes=(key.dtype,), shape=shape, like=like, inner_contiguous=True)
    pages = (*k_cache.shape[:2], key.shape[1])
    check.tensor("K cache", k_cache, shape=(*pages, key.shape[2]), like=like)
    shape = (*pages, value.shape[2])
    check.tensor("V cache", v_cache, dtypes=(k_cache.dtype,), shape=shape, like=like, inner_contiguous=True)
    if k_cache.shape == v_cache.shape and k_cache.stride() != v_cache.stride():
        raise ValueError(
            check.problem(
                "paged_kv_cache",
                f"strides {k_cache.stride()} and {v_cache.stride()}",
                "K and V caches must have identical strides",
                "Allocate both in the same way.",
            )
        )


def _page_table(table: tuple[torch.Tensor, ...], key: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of a page table, checked; the last of `table`, kv_last_page_len, is not needed."""
    *where, kv_last_page_len = table
    checked = page_table(where, ("append_key", key))
    _check_last_page_len(kv_last_page_len, where[3])
    return checked


def _scales(k_scale: KVScale, v_scale: KVScale, key: torch.Tensor) -> tuple[list[float], list[torch.Tensor]]:
    """Both as numbers or both as tensors."""
    numbers, tensors = [], []
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if isinstance(scale, torch.Tensor):
            scale = scale.reshape(-1) if scale.dim() == 0 else scale
            shape = (1,) if scale.shape == (1,) else (key.shape[1],)
            check.tensor(name, scale, dtypes=(torch.float32,), shape=shape, like=("append_key", key))
            tensors.append(scale.contiguous())
        else:
            numbers.append(float(scale))
    if numbers and tensors:
        raise TypeError(
            check.problem("v_scale", type(v_scale).__name__, "the type of k_scale", "Pass two numbers or two tensors.")
        )
    return ([] if numbers == [1.0, 1.0] else numbers), tensors
