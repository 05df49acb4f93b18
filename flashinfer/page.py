"""The paged KV cache with FlashInfer's names and signatures. All index tensors are int32."""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.core.kv_cache import PagedKVCache, paged_views
from flashinfer.core.kv_cache import kv_layout as checked_layout
from flashinfer.ops import page as ops


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Tokens of each request: `(pages - 1) * page_size + last_page_len`, 0 for a request without pages.

    kv_indptr: `[batch_size + 1]` in pages. kv_last_page_len: `[batch_size]`; of no meaning where there are no pages.
    page_size: tokens a page. Returns int32 `[batch_size]` on their device, without waiting for it.
    """
    check.tensor("kv_indptr", kv_indptr, dtypes=check.INDEX_DTYPES)
    check.indptr("kv_indptr", kv_indptr)
    _check_last_page_len(kv_last_page_len, kv_indptr)
    return ops.seq_lens(kv_indptr, kv_last_page_len, check.positive("page_size", page_size))


def _check_last_page_len(kv_last_page_len: torch.Tensor, kv_indptr: torch.Tensor) -> None:
    shape = (kv_indptr.numel() - 1,)
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
    check.indptr("append_indptr", append_indptr)
    if isinstance(nnz, bool) or not isinstance(nnz, int) or nnz < 0:
        raise ValueError(check.problem("nnz", repr(nnz), "an int of at least 0", "Pass the number of rows."))
    check.index_range("append_indptr", append_indptr, 0, nnz + 1)
    like = ("append_indptr", append_indptr)
    check.tensor("seq_lens", seq_lens, dtypes=check.INDEX_DTYPES, shape=(append_indptr.numel() - 1,), like=like)
    filled = []
    for name, buffer in (("batch_indices", batch_indices), ("positions", positions)):
        if buffer is None:
            buffer = torch.empty(nnz, dtype=torch.int32, device=append_indptr.device)
        filled.append(check.tensor(name, buffer, dtypes=check.INDEX_DTYPES, shape=(nnz,), like=like))
    ops.batch_indices_positions(append_indptr, seq_lens, *filled)
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
    k_cache, v_cache = paged_views(paged_kv_cache, checked_layout(kv_layout))
    tensors = ops.Append(append_key, append_value, k_cache, v_cache, batch_indices, positions, kv_indices, kv_indptr)
    _check_data(tensors)
    _check_index_tensors(tensors)
    _check_last_page_len(kv_last_page_len, kv_indptr)
    if append_key.is_cpu:
        _check_page_table(tensors)
    ops.append(tensors)


def _check_data(tensors: ops.Append) -> None:
    key, value, k_cache, v_cache = tensors[:4]
    like = ("append_key", key)
    check.tensor("append_key", key, shape=(None, None, None), inner_contiguous=True)
    shape = (*key.shape[:2], None)
    check.tensor("append_value", value, dtypes=(key.dtype,), shape=shape, like=like, inner_contiguous=True)
    stored = check.FLOAT_DTYPES + check.FP8_DTYPES
    pages = (*k_cache.shape[:2], key.shape[1])
    check.tensor("K cache", k_cache, dtypes=stored, shape=(*pages, key.shape[2]), like=like, inner_contiguous=True)
    shape = (*pages, value.shape[2])
    check.tensor("V cache", v_cache, dtypes=(k_cache.dtype,), shape=shape, like=like, inner_contiguous=True)
    check.tensor("append_key", key, dtypes=(*check.FLOAT_DTYPES, k_cache.dtype))
    if k_cache.shape == v_cache.shape and k_cache.stride() != v_cache.stride():
        raise ValueError(
            check.problem(
                "paged_kv_cache",
                f"strides {k_cache.stride()} and {v_cache.stride()}",
                "K and V caches must have identical strides",
                "Allocate both in the same way.",
            )
        )


def _check_index_tensors(tensors: ops.Append) -> None:
    shapes = {
        "batch_indices": (tensors.key.shape[0],),
        "positions": (tensors.key.shape[0],),
        "kv_indices": (None,),
        "kv_indptr": (None,),
    }
    for name, shape in shapes.items():
        x = check.tensor(
            name, getattr(tensors, name), dtypes=check.INDEX_DTYPES, shape=shape, like=("append_key", tensors.key)
        )
        if not x.is_contiguous():
            raise ValueError(
                check.problem(name, f"stride {x.stride(0)}", "a contiguous tensor", f"Call {name}.contiguous().")
            )


def _check_page_table(tensors: ops.Append) -> None:
    """Check on the CPU that every token that is not skipped has a page of its request in the table."""
    check.index_range("kv_indices", tensors.kv_indices, 0, tensors.k_cache.shape[0])
    kept = tensors.batch_indices >= 0
    request, position = tensors.batch_indices[kept], tensors.positions[kept]
    check.index_range("batch_indices", request, 0, tensors.kv_indptr.numel() - 1)
    check.index_range("positions", position, 0, 2**31)
    entry = tensors.kv_indptr[request] + position // tensors.k_cache.shape[1]
    check.index_range("kv_indptr", tensors.kv_indptr, 0, tensors.kv_indices.numel() + 1)
    outside = entry >= tensors.kv_indptr[request + 1]
    if bool(outside.any()):
        first = int(outside.int().argmax())
        raise ValueError(
            check.problem(
                "positions",
                f"position {int(position[first])} of request {int(request[first])}",
                "positions inside of the request's pages",
                "Add pages to kv_indices and kv_indptr before the append.",
            )
        )
