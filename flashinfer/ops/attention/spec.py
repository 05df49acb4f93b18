"""The frozen records of attention: what to compute (host ints and dtypes), and the tensors it is computed from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Workload:
    """How much a batch asks for, in classes: queries of a request (mean) and of all requests, as powers of two."""

    queries: int
    rows: int

    @classmethod
    def of(cls, rows: int, batch_size: int) -> Workload:
        """Both rounded down."""
        return cls(*(1 << max(0, count.bit_length() - 1) for count in (rows // max(1, batch_size), rows)))


@dataclass(frozen=True)
class AttentionSpec:
    """One kind of attention problem: hashable, the key of every cache.

    num_qo_heads is a multiple of num_kv_heads. head_dim_qk, head_dim_vo: multiples of 8. page_size: tokens a page;
    1 for ragged KV, which has no page table (paged=False). uniform_qo_len: queries of every request when all have the
    same number (decode), else None and a `qo_indptr` says. split_kv=False keeps each query tile whole on one program
    and fixes the tile sizes: the same request gives the same bits in any batch. variant: names of its parts; rotates:
    whether one of them changes queries or keys. workload: None where the choice of an implementation must not, or
    cannot yet, depend on the batch.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int
    paged: bool
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    o_dtype: torch.dtype
    uniform_qo_len: int | None = None
    split_kv: bool = True
    variant: tuple[str, ...] = field(default=())
    rotates: bool = False
    workload: Workload | None = None

    @property
    def group_size(self) -> int:
        """Query heads a KV head."""
        return self.num_qo_heads // self.num_kv_heads


class Batch(NamedTuple):
    """Where each request's queries and KV lie; int32 tensors on the device of the queries.

    qo_indptr `[batch + 1]` in queries, None when uniform. kv_indptr `[batch + 1]` in pages (tokens if ragged), absolute
    into kv_indices. kv_indices `[pages]`: page numbers, None if ragged. last_page_len `[batch]`: tokens of the last
    page, None when every page is full (ragged). total_rows: all queries; min_pages: pages (tokens if ragged) that k and
    v must have; each None when only the device knows. covers_rows: the host knows that every row of q
    belongs to a request.
    """

    qo_indptr: torch.Tensor | None
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor | None
    last_page_len: torch.Tensor | None
    batch_size: int
    total_rows: int | None
    min_pages: int | None = None
    covers_rows: bool = False


class Scales(NamedTuple):
    """Factors of one run. Natural-unit logits are q . k * sm_scale * logits[head]; outputs are multiplied by
    output[head].

    sm_scale, output_scale: floats. logits, output: fp32 tensors of one value or one a query head, on the device of the
    queries, or None. sinks: fp32 `[num_qo_heads]` extra logits in the softmax denominator, or None.
    """

    sm_scale: float
    output_scale: float = 1.0
    logits: torch.Tensor | None = None
    output: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


class Tensors(NamedTuple):
    """The data of one run, as strided views with innermost stride 1; `out` and `lse` are written.

    q `[rows, num_qo_heads, head_dim_qk]`; k `[pages, page_size, num_kv_heads, head_dim_qk]` and v likewise
    (`head_dim_vo`), a token being a page of 1 if ragged; out `[rows, num_qo_heads, head_dim_vo]`; lse fp32 `[rows,
    num_qo_heads]`, base 2.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
