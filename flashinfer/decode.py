"""Decode attention: one query (or a few) per request over its whole paged KV."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from flashinfer.core import check
from flashinfer.core.kv_cache import PagedKVCache, paged_views
from flashinfer.ops.attention.options import Options, Scale
from flashinfer.ops.attention.wrapper import (
    BatchWrapper,
    attention_spec,
    data_types,
    paged_batch,
    refuse,
    returning_lse,
    with_lse,
)
from flashinfer.prefill import single_prefill

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "single_decode_with_kv_cache",
]

# The order in which old callers pass by position what are keyword arguments now.
_LEGACY_ORDER = (
    "pos_encoding_mode", "window_left", "logits_soft_cap", "q_data_type", "kv_data_type", "o_data_type", "data_type",
    "sm_scale", "rope_scale", "rope_theta", "non_blocking", "block_tables", "seq_lens", "fixed_split_size",
    "disable_split_kv", "q_len_per_req",
)  # fmt: skip


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: Scale = None,
    k_scale: Scale = None,
    v_scale: Scale = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query over one request's KV.

    q `[num_qo_heads, head_dim]`; k, v `[kv_len, num_kv_heads, head_dim]` (NHD) or `[num_kv_heads, kv_len, head_dim]`
    (HND), same device, fp32/fp16/bf16, k and v also fp8. Strides are free but for the innermost, which is 1.
    Returns out `[num_qo_heads, head_dim]` in q's dtype, with return_lse also fp32 `[num_qo_heads]`, base 2.
    See `BatchDecodeWithPagedKVCacheWrapper.plan` for the options; use_tensor_cores is accepted and changes nothing.
    Raises TypeError, ValueError, KeyError for an unknown layout or mode.
    """
    check.tensor("q", q, shape=(None, None))
    result = single_prefill(
        (q.unsqueeze(0), k, v),
        kv_layout,
        Options.of(
            q.shape[-1], False, window_left, logits_soft_cap, pos_encoding_mode, sm_scale, (rope_scale, rope_theta)
        ),
        (q_scale, k_scale, v_scale),
        return_lse=return_lse,
    )
    if isinstance(result, tuple):
        return result[0].squeeze(0), result[1].squeeze(0)
    return result.squeeze(0)


class BatchDecodeWithPagedKVCacheWrapper(BatchWrapper):
    """Decode of a batch over a paged KV cache: `plan` once a step, `run` once a layer.

    float_workspace_buffer: any tensor on the device to run on, 16-byte aligned; it need not be large enough (128 MiB is
    custom), and wrappers that do not run at the same time may share it. kv_layout "NHD" or "HND". use_cuda_graph: plans
    copy the index arrays into the three buffers given (int32; their sizes bound batch and pages), and a captured `run`
    replays after any later plan. use_tensor_cores: accepted; kernels here always do. backend: "auto", "triton" (= "fa2"
    on a GPU) or "torch". jit_args: a `Variant` composed with the options. Raises KeyError for an unknown layout.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
    ) -> None:
        buffers = {
            "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
            "paged_kv_indices_buffer": paged_kv_indices_buffer,
            "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
        }
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args, buffers)
        self._use_tensor_cores = use_tensor_cores
        self._paged_kv_indptr_buf = paged_kv_indptr_buffer
        self._paged_kv_indices_buf = paged_kv_indices_buffer
        self._paged_kv_last_page_len_buf = paged_kv_last_page_len_buffer
        self._q_len_per_req: int | None = None

    @property
    def use_tensor_cores(self) -> bool:
        """As given at construction."""
        return self._use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *deprecated_positional_args: Any,
        **kwargs: Any,
    ) -> None:
        """Schedule a batch; on device tensors nothing is copied to the host and nothing is waited for.

        indptr int32 `[batch + 1]`, in pages; indices int32 `[pages]`, page numbers; last_page_len int32 `[batch]`,
        1..page_size tokens (anything for a request without pages); each on the device or the host.
        Keywords: pos_encoding_mode "NONE" | "ROPE_LLAMA" | "ALIBI"; window_left tokens to the left, -1 = off;
        logits_soft_cap, 0 or None = off; q_data_type (float16), kv_data_type, o_data_type (both as q), data_type (fills
        those unset); sm_scale (1/sqrt(head_dim)); rope_scale (1), rope_theta (1e4); q_len_per_req (1): queries of each
        request, causal among themselves; fixed_split_size > 0 or disable_split_kv: the same request gives the same bits
        in any batch. non_blocking, block_tables, seq_lens: accepted, not needed.
        """
        if deprecated_positional_args:
            warnings.warn(
                "options of plan() by position are deprecated: pass keywords", DeprecationWarning, stacklevel=2
            )
            if len(deprecated_positional_args) > len(_LEGACY_ORDER):
                raise TypeError(f"plan() takes at most {7 + len(_LEGACY_ORDER)} positional arguments")
            kwargs = dict(zip(_LEGACY_ORDER, deprecated_positional_args, strict=False)) | kwargs
        check.unknown_keywords("plan", kwargs, _LEGACY_ORDER)
        arrays = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
        self._plan_decode(arrays, (num_qo_heads, num_kv_heads), head_dim, page_size, kwargs)

    begin_forward = plan

    def _plan_decode(
        self,
        arrays: dict[str, torch.Tensor],
        heads: tuple[int, int],
        head_dim: int,
        page_size: int,
        given: dict[str, Any],
    ) -> None:
        data_type = given.get("data_type")
        q_type = given.get("q_data_type") or data_type
        dtypes = data_types(q_type, given.get("kv_data_type") or data_type, given.get("o_data_type"))
        q_len = check.positive("q_len_per_req", given.get("q_len_per_req") or 1)
        whole = bool(given.get("disable_split_kv")) or (given.get("fixed_split_size") or -1) > 0
        spec = attention_spec(heads, (head_dim, head_dim), page_size, dtypes, q_len, not whole)
        options = Options.of(
            head_dim,
            q_len > 1,
            given.get("window_left"),
            given.get("logits_soft_cap"),
            given.get("pos_encoding_mode") or "NONE",
            given.get("sm_scale"),
            (given.get("rope_scale"), given.get("rope_theta")),
        )
        batch = paged_batch(self.device, arrays, page_size)
        self._check_batch_size("indptr", batch.batch_size, "paged_kv_last_page_len_buffer", 0)
        if self._use_cuda_graph and self._q_len_per_req not in (None, q_len):
            raise ValueError(
                check.problem("q_len_per_req", q_len, f"{self._q_len_per_req}: it is frozen", "Use another wrapper.")
            )
        self._q_len_per_req = q_len
        kv, table, last = self._hold(arrays, "indices")
        if not self._use_cuda_graph:
            self._paged_kv_indptr_buf, self._paged_kv_indices_buf, self._paged_kv_last_page_len_buf = kv, table, last
        rows = batch.batch_size * q_len
        batch = batch._replace(kv_indptr=kv, kv_indices=table, last_page_len=last, total_rows=rows, covers_rows=True)
        self._plan(spec, batch, options)

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        *args: Any,
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend as planned.

        q `[batch * q_len_per_req, num_qo_heads, head_dim]`; paged_kv_cache `[pages, 2, page_size, num_kv_heads,
        head_dim]` (NHD; heads before tokens in HND) or the tuple (k_cache, v_cache); any strides with the innermost 1.
        q_scale and k_scale multiply the logits, v_scale the output (floats or tensors). sinks: fp32 `[num_qo_heads]`.
        out, lse: where to write. Returns out, with return_lse also lse fp32 `[rows, num_qo_heads]`, base 2. enable_pdl
        is ignored. Raises ValueError where a tensor or window_left differs from the plan.
        """
        refuse(
            ("positional arguments of a jit variant", args, ()),
            ("skip_softmax_threshold_scale_factor", skip_softmax_threshold_scale_factor, None),
            ("kv_cache_sf", kv_cache_sf, None),
        )
        self._require_window(window_left)
        if q_len_per_req is not None and self._q_len_per_req not in (None, q_len_per_req):
            want = f"{self._q_len_per_req}, as planned"
            raise ValueError(check.problem("q_len_per_req", q_len_per_req, want, "Give it to plan(...) instead."))
        k, v = paged_views(paged_kv_cache, self._kv_layout)
        return self._run((q, k, v), (q_scale, k_scale, v_scale, None, sinks), (out, lse, return_lse))

    run_return_lse = with_lse(run)

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        pos_encoding_mode: str = "NONE",
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`run` with options that override the plan's for this call; kept for callers of the old name."""
        self._session.require_plan()
        causal = self._planned is not None and self._planned.causal
        given = (window_left, logits_soft_cap, pos_encoding_mode, sm_scale, (rope_scale, rope_theta))
        options = Options.of(self._session.spec.head_dim_qk, causal, *given)
        qkv = (q, *paged_views(paged_kv_cache, self._kv_layout))
        factors = (q_scale, k_scale, v_scale, None, None)
        return self._run(qkv, factors, (None, None, self._forward_returns_lse), options)

    forward_return_lse = returning_lse(forward)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` with `use_cuda_graph=True` and its three buffers required."""

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer, last_page_len_buffer
        )


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: str | torch.dtype | None = None,
    kv_data_type: str | torch.dtype | None = None,
    data_type: str | torch.dtype | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: torch.Tensor | None = None,
) -> None:
    """`plan` under the name SGLang and vLLM bind to a wrapper.

    The original saves a device-to-host copy here when given global_override_indptr_cpu; `plan` makes none anyway.
    """
    BatchDecodeWithPagedKVCacheWrapper.plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        pos_encoding_mode=pos_encoding_mode, window_left=window_left, logits_soft_cap=logits_soft_cap,
        q_data_type=q_data_type, kv_data_type=kv_data_type, data_type=data_type, sm_scale=sm_scale,
        rope_scale=rope_scale, rope_theta=rope_theta, fixed_split_size=fixed_split_size,
        disable_split_kv=disable_split_kv, q_len_per_req=q_len_per_req,
    )  # fmt: skip
