"""The records of an append: what kind it is (host values), and the tensors it moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flashinfer.core.check import FP8_DTYPES


@dataclass(frozen=True)
class AppendSpec:
    """One kind of append. page_size in tokens; row_dtype of the new keys and values, cache_dtype of the cache."""

    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    page_size: int
    row_dtype: torch.dtype
    cache_dtype: torch.dtype

    @property
    def fp8_dtype(self) -> torch.dtype | None:
        """The fp8 dtype to encode to; None where rows are cast or just copied."""
        return self.cache_dtype if self.cache_dtype in FP8_DTYPES and self.row_dtype != self.cache_dtype else None


class Append(NamedTuple):
    """The tensors of an append, on one device, innermost stride 1.

    key `[nnz, num_kv_heads, head_dim_k]`, value `[nnz, num_kv_heads, head_dim_v]`; k_cache, v_cache
    `[pages, page_size, num_kv_heads, head_dim]` views (NHD), written in place; batch_indices, positions int32 `[nnz]`:
    a negative batch index skips the token; kv_indices int32 `[pages in use]`; kv_indptr int32 `[batch_size + 1]`.
    """

    key: torch.Tensor
    value: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    batch_indices: torch.Tensor
    positions: torch.Tensor
    kv_indices: torch.Tensor
    kv_indptr: torch.Tensor


def fp8_as_bytes(tensors: Append) -> Append:
    """The same append with fp8 tensors seen as uint8: what fp8 bytes mean is the encoder's business, not the copy's."""
    return Append(*(t.view(torch.uint8) if t.dtype in FP8_DTYPES else t for t in tensors))
