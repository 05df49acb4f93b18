"""Prefill and append attention: many queries per request over ragged or paged KV."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from flashinfer.core import check, indices
from flashinfer.core.kv_cache import PagedKVCache, paged_views, token_views
from flashinfer.core.kv_cache import kv_layout as checked_layout
from flashinfer.ops.attention import single
from flashinfer.ops.attention.options import Options, Scale
from flashinfer.ops.attention.spec import Batch
from flashinfer.ops.attention.wrapper import (
    BatchWrapper,
    attention_spec,
    data_types,
    head_scales,
    mask_bits,
    paged_batch,
    refuse,
    returning_lse,
    with_lse,
)

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
Dtype = str | torch.dtype
OptionalTensor = torch.Tensor | None


def single_prefill(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    kv_layout: str,
    options: Options,
    factors: tuple[Scale, Scale, Scale],
    masks: tuple[OptionalTensor, OptionalTensor] = (None, None),
    backend: str = "auto",
    o_dtype: torch.dtype | None = None,
    return_lse: bool = False,
) -> Result:
    """One request's attention; the shared body of the `single_*` functions. masks: (custom, packed)."""
    q = check.tensor("q", qkv[0], shape=(None, None, None))
    k, v = token_views(qkv[1], qkv[2], checked_layout(kv_layout))
    return single.run((q, k, v), options, factors, masks, backend, o_dtype, return_lse)


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: OptionalTensor = None,
    scale_k: OptionalTensor = None,
    scale_v: OptionalTensor = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: OptionalTensor = None,
    packed_custom_mask: OptionalTensor = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: Any = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> Result:
    """Attention of one request's queries over its KV.

    q `[qo_len, num_qo_heads, head_dim_qk]`; k `[kv_len, num_kv_heads, head_dim_qk]`, v likewise with head_dim_vo (heads
    first in HND); one device, fp32/fp16/bf16, k and v also fp8; innermost stride 1. custom_mask bool `[qo_len, kv_len]`
    (True = keep) takes the place of causal (bottom-right aligned); packed_custom_mask: the same as little-endian bits,
    uint8. scale_q, scale_k, scale_v: fp32 per head or one value; k_scale, v_scale: floats or tensors. Options as in
    `BatchPrefillWithPagedKVCacheWrapper.plan`. use_fp16_qk_reduction is accepted; sums stay fp32.
    Returns out `[qo_len, num_qo_heads, head_dim_vo]` (o_dtype, else q's), with return_lse also fp32 `[qo_len,
    num_qo_heads]`, base 2; rows that see nothing give 0 and -inf. Raises TypeError, ValueError, KeyError.
    """
    refuse(("kv_cache_sf", kv_cache_sf, None))
    check.tensor("q", q, shape=(None, None, None))
    options = Options.of(
        q.shape[-1], causal, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, (rope_scale, rope_theta)
    )
    factors = (scale_q, scale_k if k_scale is None else k_scale, scale_v if v_scale is None else v_scale)
    return single_prefill(
        (q, k, v), kv_layout, options, factors, (custom_mask, packed_custom_mask), backend, o_dtype, return_lse
    )


single_prefill_with_kv_cache_return_lse = partial(single_prefill_with_kv_cache, return_lse=True)


class _PrefillWrapper(BatchWrapper):
    """What the paged and the ragged prefill wrapper share."""

    _custom_mask_buf: OptionalTensor
    _mask_indptr_buf: OptionalTensor

    def _with_queries(self, kv_name: str, qo_indptr: torch.Tensor, batch: Batch) -> Batch:
        """`batch` with its checked query prefix sum, and the total of rows where the host can see it."""
        indices.indptr("qo_indptr", qo_indptr, self.device)
        if qo_indptr.numel() != batch.batch_size + 1:
            want = f"batch + 1 = {batch.batch_size + 1}, as {kv_name}"
            raise ValueError(check.problem("qo_indptr", f"{qo_indptr.numel()} entries", want, "Describe one batch."))
        self._check_batch_size("qo_indptr", batch.batch_size, "qo_indptr_buf", 1)
        covers = qo_indptr.device.type == "cpu" and int(qo_indptr[0]) == 0
        return batch._replace(qo_indptr=qo_indptr, total_rows=indices.last_of(qo_indptr), covers_rows=covers)

    def _make_mask(self, custom: OptionalTensor, packed: OptionalTensor, batch: Batch, page_size: int) -> Any:
        masked = custom is not None or packed is not None
        buffers = (self._custom_mask_buf, self._mask_indptr_buf)
        self._check_mask_buffers(masked, buffers)
        return self._mask_variant(custom, packed, mask_bits(batch, page_size), buffers) if masked else None

    def _keep_mask_buffers(self, custom_mask_buf: OptionalTensor, mask_indptr_buf: OptionalTensor) -> None:
        self._custom_mask_buf, self._mask_indptr_buf = custom_mask_buf, mask_indptr_buf
        if self._use_cuda_graph and custom_mask_buf is not None:
            self._check_buffer("custom_mask_buf", custom_mask_buf, (torch.uint8,))
            self._check_buffer("mask_indptr_buf", mask_indptr_buf, check.INDEX_DTYPES)

    def _override(
        self, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scales: tuple[Scale, Scale], given: tuple[Any, ...]
    ) -> Result:
        """`run` with options of this call; given: the arguments of `Options.of` after head_dim_qk."""
        self._session.require_plan()
        options = Options.of(self._session.spec.head_dim_qk, *given)
        return self._run(qkv, (None, *scales, None, None), (None, None, self._forward_returns_lse), options)


class BatchPrefillWithPagedKVCacheWrapper(_PrefillWrapper):
    """Prefill and append of a batch over a paged KV cache: `plan` once a step, `run` once a layer.

    float_workspace_buffer, kv_layout, backend, jit_args: as in `BatchDecodeWithPagedKVCacheWrapper`. use_cuda_graph:
    plans copy their arrays into the buffers given; the first plan's total rows bound later ones. custom_mask_buf,
    mask_indptr_buf: buffers of the packed mask, needed where a mask is planned under CUDA graphs.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: OptionalTensor = None,
        paged_kv_indptr_buf: OptionalTensor = None,
        paged_kv_indices_buf: OptionalTensor = None,
        paged_kv_last_page_len_buf: OptionalTensor = None,
        custom_mask_buf: OptionalTensor = None,
        mask_indptr_buf: OptionalTensor = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        variant_owns_mask: bool = False,
    ) -> None:
        refuse(("jit_kwargs", jit_kwargs, None), ("variant_owns_mask", variant_owns_mask, False))
        buffers = {
            "qo_indptr_buf": qo_indptr_buf,
            "paged_kv_indptr_buf": paged_kv_indptr_buf,
            "paged_kv_indices_buf": paged_kv_indices_buf,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf,
        }
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args, buffers)
        self._qo_indptr_buf, self._paged_kv_indptr_buf = qo_indptr_buf, paged_kv_indptr_buf
        self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf = paged_kv_indices_buf, paged_kv_last_page_len_buf
        self._keep_mask_buffers(custom_mask_buf, mask_indptr_buf)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: OptionalTensor = None,
        packed_custom_mask: OptionalTensor = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype | None = None,
        o_data_type: Dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: OptionalTensor = None,
        token_pos_in_items_ptr: OptionalTensor = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: OptionalTensor = None,
        seq_lens: OptionalTensor = None,
        seq_lens_q: OptionalTensor = None,
        block_tables: OptionalTensor = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
    ) -> None:
        """Schedule a batch; on device tensors nothing is copied to the host and nothing is waited for.

        qo_indptr int32 `[batch + 1]`, in queries; paged_kv_indptr int32 `[batch + 1]`, in pages, absolute into
        paged_kv_indices int32 `[pages]`; paged_kv_last_page_len int32 `[batch]`, 1..page_size tokens; each on the
        device or the host. custom_mask: bool, `qo_len * kv_len` values per request in a row (True = keep), takes the
        place of causal; packed_custom_mask: little-endian bits, each request starting on a byte. causal: bottom-right
        aligned. pos_encoding_mode "NONE" | "ROPE_LLAMA" | "ALIBI"; sm_scale (1/sqrt(head_dim_qk)); window_left tokens
        to the left, -1 = off; logits_soft_cap, 0 or None = off; rope_scale (1), rope_theta (1e4); q_data_type,
        kv_data_type and o_data_type (as q). fixed_split_size > 0 or disable_split_kv: the same request gives the same
        bits in any batch. The rest is accepted and not needed, but for multi-item scoring (prefix_len_ptr and its kin),
        which raises. A custom mask with index arrays on the device waits for them once, to learn its size.
        """
        _refuse_multi_item(prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr)
        dtypes = data_types(q_data_type, kv_data_type, o_data_type)
        head_dims = (head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo)
        whole = disable_split_kv or (fixed_split_size or -1) > 0
        spec = attention_spec((num_qo_heads, num_kv_heads), head_dims, page_size, dtypes, split_kv=not whole)
        options = Options.of(
            head_dim_qk, causal, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, (rope_scale, rope_theta)
        )
        arrays = {
            "paged_kv_indptr": paged_kv_indptr,
            "paged_kv_indices": paged_kv_indices,
            "paged_kv_last_page_len": paged_kv_last_page_len,
        }
        batch = self._with_queries("paged_kv_indptr", qo_indptr, paged_batch(self.device, arrays, page_size))
        mask = self._make_mask(custom_mask, packed_custom_mask, batch, page_size)
        qo, kv, table, last = self._hold({"qo_indptr": qo_indptr, **arrays}, "paged_kv_indices")
        if not self._use_cuda_graph:
            self._qo_indptr_buf, self._paged_kv_indptr_buf = qo, kv
            self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf = table, last
        batch = batch._replace(qo_indptr=qo, kv_indptr=kv, kv_indices=table, last_page_len=last)
        self._plan(spec, batch, options, mask)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: OptionalTensor = None,
        lse: OptionalTensor = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: OptionalTensor = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Result:
        """Attend as planned.

        q `[nnz_qo, num_qo_heads, head_dim_qk]`; paged_kv_cache as in `BatchDecodeWithPagedKVCacheWrapper.run`;
        positional args: per-head fp32 scale_q, scale_k, scale_v. q_scale, k_scale multiply the logits, v_scale the
        output. sinks: fp32 `[num_qo_heads]`. out, lse: where to write. Returns out `[nnz_qo, num_qo_heads,
        head_dim_vo]`, with return_lse also lse fp32 `[nnz_qo, num_qo_heads]`, base 2. enable_pdl is ignored.
        Raises ValueError where a tensor or window_left differs from the plan.
        """
        refuse(
            ("kv_cache_sf", kv_cache_sf, None),
            ("skip_softmax_threshold_scale_factor", skip_softmax_threshold_scale_factor, None),
            ("uses_spcompress", uses_spcompress, False),
            ("lse_base", lse_base, "log2"),
            ("lse_layout", lse_layout, "NH"),
        )
        self._require_window(window_left)
        k, v = paged_views(paged_kv_cache, self._kv_layout)
        return self._run(
            (q, k, v), (*head_scales(args, q_scale, k_scale, v_scale), None, sinks), (out, lse, return_lse)
        )

    run_return_lse = with_lse(run)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Result:
        """`run` with options that override the plan's for this call; kept for callers of the old name."""
        given = (causal, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, (rope_scale, rope_theta))
        qkv = (q, *paged_views(paged_kv_cache, self._kv_layout))
        return self._override(qkv, (k_scale, v_scale), given)

    forward_return_lse = returning_lse(forward)


class BatchPrefillWithRaggedKVCacheWrapper(_PrefillWrapper):
    """Prefill of a batch whose keys and values lie one request after the other, without pages.

    Arguments as in `BatchPrefillWithPagedKVCacheWrapper`, with kv_indptr in tokens.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: OptionalTensor = None,
        kv_indptr_buf: OptionalTensor = None,
        custom_mask_buf: OptionalTensor = None,
        mask_indptr_buf: OptionalTensor = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        variant_owns_mask: bool = False,
    ) -> None:
        refuse(("jit_kwargs", jit_kwargs, None), ("variant_owns_mask", variant_owns_mask, False))
        buffers = {"qo_indptr_buf": qo_indptr_buf, "kv_indptr_buf": kv_indptr_buf}
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args, buffers)
        self._qo_indptr_buf, self._kv_indptr_buf = qo_indptr_buf, kv_indptr_buf
        self._keep_mask_buffers(custom_mask_buf, mask_indptr_buf)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: OptionalTensor = None,
        packed_custom_mask: OptionalTensor = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype | None = None,
        o_data_type: Dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: OptionalTensor = None,
        token_pos_in_items_ptr: OptionalTensor = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: OptionalTensor = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: OptionalTensor = None,
        seq_lens_q: OptionalTensor = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: OptionalTensor = None,
        o_indptr: OptionalTensor = None,
        uniform_q_len: int | None = None,
    ) -> None:
        """As `BatchPrefillWithPagedKVCacheWrapper.plan`, with kv_indptr int32 `[batch + 1]` in tokens."""
        _refuse_multi_item(prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr)
        refuse(("v_indptr", v_indptr, None), ("o_indptr", o_indptr, None))
        dtypes = data_types(q_data_type, kv_data_type, o_data_type)
        head_dims = (head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo)
        whole = disable_split_kv or (fixed_split_size or -1) > 0
        spec = attention_spec((num_qo_heads, num_kv_heads), head_dims, None, dtypes, split_kv=not whole)
        options = Options.of(
            head_dim_qk, causal, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, (rope_scale, rope_theta)
        )
        indices.indptr("kv_indptr", kv_indptr, self.device)
        batch = Batch(None, kv_indptr, None, None, kv_indptr.numel() - 1, None, indices.last_of(kv_indptr))
        batch = self._with_queries("kv_indptr", qo_indptr, batch)
        mask = self._make_mask(custom_mask, packed_custom_mask, batch, 1)
        qo, kv = self._hold({"qo_indptr": qo_indptr, "kv_indptr": kv_indptr}, None)
        if not self._use_cuda_graph:
            self._qo_indptr_buf, self._kv_indptr_buf = qo, kv
        self._plan(spec, batch._replace(qo_indptr=qo, kv_indptr=kv), options, mask)

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        o_scale: Scale = None,
        out: OptionalTensor = None,
        lse: OptionalTensor = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
    ) -> Result:
        """Attend as planned.

        q `[nnz_qo, num_qo_heads, head_dim_qk]`; k `[nnz_kv, num_kv_heads, head_dim_qk]`, v likewise with head_dim_vo
        (heads first in HND); positional args: per-head fp32 scale_q, scale_k, scale_v. q_scale and k_scale multiply the
        logits, v_scale and o_scale the output. Outputs as in `BatchPrefillWithPagedKVCacheWrapper.run`.
        """
        refuse(("kv_cache_sf", kv_cache_sf, None), ("lse_base", lse_base, "log2"), ("lse_layout", lse_layout, "NH"))
        qkv = (q, *token_views(k, v, self._kv_layout))
        factors = (*head_scales(args, q_scale, k_scale, v_scale), o_scale, None)
        return self._run(qkv, factors, (out, lse, return_lse))

    run_return_lse = with_lse(run)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Result:
        """`run` with options that override the plan's for this call; kept for callers of the old name."""
        given = (causal, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, (rope_scale, rope_theta))
        return self._override((q, *token_views(k, v, self._kv_layout)), (None, None), given)

    forward_return_lse = returning_lse(forward)


def _refuse_multi_item(prefix_len: Any, token_pos: Any, token_pos_len: int, max_item_len: Any) -> None:
    refuse(
        ("prefix_len_ptr", prefix_len, None),
        ("token_pos_in_items_ptr", token_pos, None),
        ("token_pos_in_items_len", token_pos_len, 0),
        ("max_item_len_ptr", max_item_len, None),
    )
