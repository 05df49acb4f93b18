"""The records of an append: what kind it is (host values), and the tensors it moves."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.core.check import FP8_DTYPES


class AppendSpec(NamedTuple):
    """One kind of append. page_size in tokens; row_dtype of the new keys and values, cache_dtype of the cache.

    slots: tokens go to given slots, else through a page table. scaled: rows are divided by scales first.
    """

    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    page_size: int
    row_dtype: torch.dtype
    cache_dtype: torch.dtype
    slots: bool = False
    scaled: bool = False

    @property
    def code_dtype(self) -> torch.dtype | None:
        """The 8-bit dtype to encode to, fp8 or int8; None where rows are cast or just copied."""
        encoded = self.cache_dtype in FP8_DTYPES or self.cache_dtype == torch.int8
        return self.cache_dtype if encoded and self.row_dtype != self.cache_dtype else None


class PageTable(NamedTuple):
    """Where tokens lie in a paged cache; int32.

    batch_indices, positions `[nnz]`: a negative batch index skips the token; kv_indices `[pages in use]`, kv_indptr
    `[batch_size + 1]`.
    """

    batch_indices: torch.Tensor
    positions: torch.Tensor
    kv_indices: torch.Tensor
    kv_indptr: torch.Tensor


class Scale(NamedTuple):
    """What rows are divided by before they are stored: `tensor`, fp32 `[1]` or one a head, or the number."""

    value: float = 1.0
    tensor: torch.Tensor | None = None


class Append(NamedTuple):
    """The tensors of an append, on one device, innermost stride 1.

    key `[nnz, num_kv_heads, head_dim_k]`, value `[nnz, num_kv_heads, head_dim_v]`; k_cache, v_cache
    `[pages, page_size, num_kv_heads, head_dim]` views (NHD), written in place; where: the page table, or slots int32 or
    int64 `[nnz]`, slot = page * page_size + place in the page, negative to skip the token.
    """

    key: torch.Tensor
    value: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    where: PageTable | torch.Tensor
    k_scale: Scale = Scale()
    v_scale: Scale = Scale()

    @property
    def spec(self) -> AppendSpec:
        num_kv_heads, head_dim_k = self.key.shape[1:]
        return AppendSpec(
            num_kv_heads,
            head_dim_k,
            self.value.shape[2],
            self.k_cache.shape[1],
            self.key.dtype,
            self.k_cache.dtype,
            not isinstance(self.where, PageTable),
            any(scale.tensor is not None or scale.value != 1.0 for scale in (self.k_scale, self.v_scale)),
        )


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """fp8 seen as uint8: what its bytes mean is the encoder's business, not the copy's."""
    return x.view(torch.uint8) if x.dtype in FP8_DTYPES else x
