"""Attention over one paged KV cache for a batch that mixes decoding and prefilling requests.

This file is most of what an engine has to know about FlashInfer: describe the page tables once per step (`plan`),
then, in every layer, write the new keys and values into the cache (`append_paged_kv_cache`) and attend (`run`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

import flashinfer

if TYPE_CHECKING:
    from model import LlamaConfig

WORKSPACE_BYTES = 128 << 20


@dataclass(frozen=True)
class PackedStep:
    """Who computes what in one step; requests that decode (one new token each) come first.

    num_new_tokens: per request, tokens computed in this step. kv_lens: per request, tokens in the cache after it.
    page_tables: per request, its pages in order. num_decodes: how many of the requests decode.
    """

    num_new_tokens: list[int]
    kv_lens: list[int]
    page_tables: list[list[int]]
    num_decodes: int


class PagedAttention:
    """The KV cache of every layer, `[num_layers, num_pages, 2, page_size, num_kv_heads, head_dim]`, and its wrappers.

    After `plan`: positions `[nnz]` int32, the place of each packed token in its own sequence.
    """

    def __init__(
        self, config: LlamaConfig, num_pages: int, page_size: int, like: torch.Tensor, backend: str = "auto"
    ) -> None:
        self.config = config
        self.page_size = page_size
        self.cache = like.new_zeros(config.num_layers, num_pages, 2, page_size, config.num_kv_heads, config.head_dim)
        # One workspace serves both wrappers, because they run one after the other on one stream.
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=like.device)
        self.decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        self.prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)

    def _ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.cache.device, non_blocking=True)

    def plan(self, step: PackedStep) -> None:
        """Send the page tables to the device and plan both wrappers; every layer of the step uses this plan."""
        pages = [len(table) for table in step.page_tables]
        self.num_decodes = step.num_decodes
        self.num_prefills = len(pages) - step.num_decodes
        # The page tables in CSR form: request i owns kv_indices[kv_indptr[i]:kv_indptr[i + 1]].
        self.kv_indptr = self._ints([0, *accumulate(pages)])
        self.kv_indices = self._ints([page for table in step.page_tables for page in table])
        self.last_page_len = self._ints([(n - 1) % self.page_size + 1 for n in step.kv_lens])

        # Where each new token goes: its request, and its position there (the last ones of the sequence).
        qo_indptr = self._ints([0, *accumulate(step.num_new_tokens)])
        seq_lens = flashinfer.get_seq_lens(self.kv_indptr, self.last_page_len, self.page_size)
        self.batch_indices, self.positions = flashinfer.get_batch_indices_positions(
            qo_indptr, seq_lens, sum(step.num_new_tokens)
        )

        c, dtype = self.config, self.cache.dtype
        shape = (c.num_qo_heads, c.num_kv_heads, c.head_dim, self.page_size)
        d, decode_pages = step.num_decodes, sum(pages[: step.num_decodes])
        if self.num_decodes:
            table = (self.kv_indptr[: d + 1], self.kv_indices[:decode_pages], self.last_page_len[:d])
            self.decode.plan(*table, *shape, q_data_type=dtype, kv_data_type=dtype)
        if self.num_prefills:
            # An indptr starts at 0, so the prefill part's are shifted by what the decode part took.
            table = (self.kv_indptr[d:] - decode_pages, self.kv_indices[decode_pages:], self.last_page_len[d:])
            self.prefill.plan(qo_indptr[d:] - d, *table, *shape, causal=True, q_data_type=dtype, kv_data_type=dtype)

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Cache the new keys and values of `layer`, then attend; returns `[nnz, num_qo_heads, head_dim]`.

        q: `[nnz, num_qo_heads, head_dim]`. k, v: `[nnz, num_kv_heads, head_dim]`. All already rotated.
        """
        cache = self.cache[layer]
        flashinfer.append_paged_kv_cache(
            k, v, self.batch_indices, self.positions, cache, self.kv_indices, self.kv_indptr, self.last_page_len
        )
        out, d = q.new_empty(q.shape), self.num_decodes
        if self.num_decodes:
            self.decode.run(q[:d], cache, out=out[:d])
        if self.num_prefills:
            self.prefill.run(q[d:], cache, out=out[d:])
        return out

    def implementations(self) -> str:
        """Which implementation each wrapper chose."""
        return f"decode {self.decode._backend}, prefill {self.prefill._backend}"
