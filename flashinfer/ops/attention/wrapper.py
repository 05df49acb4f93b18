"""What the batch wrappers share: index buffers, masks, options, and the run itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch

from flashinfer.core import check, indices
from flashinfer.core.kv_cache import kv_layout as checked_layout
from flashinfer.core.select import BackendSupportedError
from flashinfer.ops.attention import torch_ops
from flashinfer.ops.attention.options import Options, Scale, scales_of
from flashinfer.ops.attention.session import Session
from flashinfer.ops.attention.spec import AttentionSpec, Batch
from flashinfer.ops.attention.variant import Variant
from flashinfer.ops.quantization import packed_indptr, segment_packbits

# Defaults under which an argument of the original library that has no meaning here is accepted.
Unsupported = tuple[str, Any, Any]


def refuse(*arguments: Unsupported) -> None:
    """Raise for each (name, value, accepted value) that asks for something this package does not have."""
    for name, value, accepted in arguments:
        if value is not None and value is not accepted and value != accepted:
            raise BackendSupportedError(f"{name}: got {value!r}, which no implementation here supports. Leave it out.")


class BatchWrapper:
    """Base of the wrappers: one `Session`, the plan's options, and the index arrays under FlashInfer's names."""

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str,
        use_cuda_graph: bool,
        backend: str,
        extra: object = None,
        buffers: dict[str, torch.Tensor | None] | None = None,
    ) -> None:
        check.tensor("float_workspace_buffer", float_workspace_buffer)
        self._kv_layout = checked_layout(kv_layout)
        self._use_cuda_graph = use_cuda_graph
        self.device = float_workspace_buffer.device
        if extra is not None and not isinstance(extra, Variant):
            raise TypeError(
                check.problem(
                    "jit_args",
                    type(extra).__name__,
                    "a Variant (flashinfer.ops.attention.variants.variant)",
                    "CUDA source cannot be compiled here: write the variant's hooks in Python.",
                )
            )
        self._session = Session(self.device, backend, _aligned(float_workspace_buffer), use_cuda_graph, extra)
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._planned: Options | None = None
        self._number = self._session.number
        self._result_shape: torch_ops.Shape | None = None
        self._forward_returns_lse = False
        self._buffers = buffers or {}
        if use_cuda_graph:
            for name, buffer in self._buffers.items():
                self._check_buffer(name, buffer, check.INDEX_DTYPES)

    def _check_buffer(self, name: str, buffer: torch.Tensor | None, dtypes: tuple[torch.dtype, ...]) -> None:
        like = ("float_workspace_buffer", self._float_workspace_buffer)
        if not check.tensor(name, buffer, dtypes=dtypes, like=like).is_contiguous():
            raise ValueError(check.problem(name, "a strided view", "a contiguous tensor", "Pass the buffer whole."))

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the index buffers are the user's and stay in place."""
        return self._use_cuda_graph

    @property
    def _backend(self) -> str:
        return self._session.backend

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Replace the workspace; plan again afterwards. The int buffer is not needed here and kept for its name."""
        check.tensor("float_workspace_buffer", float_workspace_buffer)
        if float_workspace_buffer.device != self.device:
            got, want = f"a tensor on {float_workspace_buffer.device}", f"one on {self.device}"
            raise ValueError(check.problem("float_workspace_buffer", got, want, "Make a new wrapper."))
        self._session.arena.buffer = _aligned(float_workspace_buffer)
        self._session.invalidate()
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = int_workspace_buffer

    def end_forward(self) -> None:
        """Nothing to do; kept for callers of the old names."""

    def _plan(self, spec: AttentionSpec, batch: Batch, options: Options, mask: Variant | None = None) -> None:
        self._session.plan(spec, batch, options, mask)
        self._planned = options
        self._result_shape = (spec.num_qo_heads, spec.head_dim_vo, spec.o_dtype)
        self._causal, self._window_left = options.causal, options.window_left
        self._logits_soft_cap, self._sm_scale = options.logits_soft_cap, options.sm_scale

    def _check_batch_size(self, name: str, batch_size: int, buffer_name: str, extra_entries: int) -> None:
        """With CUDA graphs the batch size is fixed by the buffers."""
        buffer = self._buffers.get(buffer_name)
        if self._use_cuda_graph and buffer is not None and buffer.numel() - extra_entries != batch_size:
            fixed = buffer.numel() - extra_entries
            raise ValueError(
                check.problem(name, f"batch size {batch_size}", f"{fixed}, fixed by {buffer_name}", "Pad the batch.")
            )

    def _hold(self, arrays: dict[str, torch.Tensor], table: str | None) -> list[torch.Tensor]:
        """The plan's index arrays on the device, safe from later changes; `table` names the page table.

        With CUDA graphs they are copied to the user's buffers (`self._buffers`, in the same order); else what the
        caller has on the device is copied too, but for the page table: `run` reads that one, as the original does.
        """
        on_device = indices.upload(self.device, list(arrays.values()))
        if self._use_cuda_graph:
            buffers = list(self._buffers.values())
            for name, given, buffer in zip(arrays, on_device, buffers, strict=True):
                _check_fits(name, given, buffer)
            return [_copied(given, buffer) for given, buffer in zip(on_device, buffers, strict=True)]
        return [
            held.clone() if held.data_ptr() == given.data_ptr() and name != table else held
            for (name, given), held in zip(arrays.items(), on_device, strict=True)
        ]

    def _check_mask_buffers(self, masked: bool, buffers: tuple[torch.Tensor | None, torch.Tensor | None]) -> None:
        """With CUDA graphs, whether there are mask buffers decides for all plans whether there is a mask."""
        if self._use_cuda_graph and masked != (buffers[0] is not None and buffers[1] is not None):
            got = "a mask without custom_mask_buf and mask_indptr_buf" if masked else "no mask, but mask buffers"
            want = "a mask in every plan of a wrapper with mask buffers, and in no other"
            raise ValueError(check.problem("custom_mask", got, want, "A captured run keeps its mask's address."))

    def _mask_variant(
        self,
        custom: torch.Tensor | None,
        packed: torch.Tensor | None,
        bits: torch.Tensor,
        buffers: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> Variant | None:
        """The custom-mask variant; bits: `[batch + 1]` prefix sum of qo_len * kv_len, on the host or the device.

        buffers: where CUDA graphs expect the packed mask and its byte offsets.
        """
        if custom is None and packed is None:
            return None
        packed, byte_indptr = _packed_mask(custom, packed, bits, self.device)
        if buffers[0] is not None and buffers[1] is not None:
            if bits.device.type != "cpu":
                packed = packed[: buffers[0].numel()]  # longer only because its size is not known on the host
            _check_fits("custom_mask", packed, buffers[0])
            packed, byte_indptr = _copied(packed, buffers[0]), _copied(byte_indptr, buffers[1])
        from flashinfer.ops.attention.variants import custom_mask  # imports Triton where it is installed

        return custom_mask(packed, byte_indptr)

    def _run(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        factors: tuple[Any, ...],
        outputs: tuple[torch.Tensor | None, torch.Tensor | None, bool],
        options: Options | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """factors: (q_scale, k_scale, v_scale, o_scale, sinks); outputs: (out, lse, return_lse)."""
        if torch.compiler.is_dynamo_compiling() and options is None:
            return torch_ops.run(self._number, self._result_shape, qkv, factors, outputs)
        self._session.require_plan()
        chosen = options or self._planned
        assert chosen is not None
        self._session.replan(chosen)
        scales = scales_of(chosen.sm_scale, self._session.spec, qkv[0], *factors)
        return self._session.run(qkv, scales, *outputs)

    def _require_window(self, window_left: int | None) -> None:
        if window_left is not None and self._planned is not None and window_left != self._planned.window_left:
            raise ValueError(
                check.problem(
                    "window_left",
                    window_left,
                    f"{self._planned.window_left}, as planned",
                    "Give it to plan(...) instead.",
                )
            )


def _packed_mask(
    custom: torch.Tensor | None, packed: torch.Tensor | None, bits: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask as bytes and int32 byte offsets `[batch + 1]` on `device`; nothing waits for the device."""
    byte_indptr = packed_indptr(bits)
    on_host = bits.device.type == "cpu"
    if packed is None:
        assert custom is not None
        check.tensor("custom_mask", custom, dtypes=(torch.bool,), shape=(int(bits[-1]) if on_host else None,))
        on_device = (custom.to(device), bits.to(device), byte_indptr.to(device))
        # Bytes that suffice whatever the lengths are, where to ask for their sum would wait.
        size = int(byte_indptr[-1]) if on_host else custom.numel() // 8 + bits.numel()
        packed = segment_packbits(*on_device, size, "little")
    check.tensor("packed_custom_mask", packed, dtypes=(torch.uint8,), shape=(None,))
    least = int(byte_indptr[-1]) if on_host else 0
    if packed.numel() < least:
        fix = "Pad each request to whole bytes."
        raise ValueError(check.problem("packed_custom_mask", f"{packed.numel()} bytes", f"at least {least}", fix))
    return packed.to(device).contiguous(), byte_indptr.to(device, torch.int32)


def _check_fits(name: str, given: torch.Tensor, buffer: torch.Tensor | None) -> None:
    if buffer is not None and given.numel() > buffer.numel():
        want = f"at most {buffer.numel()}, the size of its buffer"
        raise ValueError(check.problem(name, f"{given.numel()} entries", want, "Give a larger buffer."))


def _copied(given: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """`given` in the front of `buffer`, whose address a graph holds."""
    assert buffer is not None
    held = buffer[: given.numel()]
    held.copy_(given, non_blocking=True)
    return held


def returning_lse(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The method `forward` under a name that returns (out, lse)."""

    @wraps(forward)
    def method(self: BatchWrapper, *args: Any, **kwargs: Any) -> Any:
        self._forward_returns_lse = True
        try:
            return forward(self, *args, **kwargs)
        finally:
            self._forward_returns_lse = False

    return method


def with_lse(run: Callable[..., Any]) -> Callable[..., Any]:
    """The method `run` with return_lse=True by default; not a partialmethod, which the compiler cannot trace."""

    @wraps(run)
    def method(self: BatchWrapper, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **{"return_lse": True, **kwargs})

    plain = signature(run)
    changed = [p.replace(default=True) if p.name == "return_lse" else p for p in plain.parameters.values()]
    method.__dict__["__signature__"] = plain.replace(parameters=changed)
    return method


def head_scales(args: tuple[Any, ...], q: Scale, k: Scale, v: Scale) -> tuple[Scale, Scale, Scale]:
    """q, k and v scales of a run: positional per-head tensors (scale_q, scale_k, scale_v) where given."""
    if len(args) > 3:
        refuse(("positional arguments of a jit variant", args[3:], ()))
    first, second, third = (*args, None, None, None)[:3]
    return (q if first is None else first, k if second is None else second, v if third is None else third)


def mask_bits(batch: Batch, page_size: int) -> torch.Tensor:
    """Prefix sum `[batch + 1]` of the mask bits, qo_len * kv_len per request, int64."""
    assert batch.qo_indptr is not None
    qo_len = batch.qo_indptr[1:].long() - batch.qo_indptr[:-1].long()
    pages = batch.kv_indptr[1:].long() - batch.kv_indptr[:-1].long()
    last = page_size if batch.last_page_len is None else batch.last_page_len.to(pages.device).long()
    kv_len = torch.where(pages > 0, (pages - 1) * page_size + last, 0)
    bits = torch.zeros(batch.batch_size + 1, dtype=torch.int64, device=pages.device)
    bits[1:] = (qo_len.to(pages.device) * kv_len).cumsum(0)
    return bits


def data_types(
    q: torch.dtype | str | None,
    kv: torch.dtype | str | None,
    o: torch.dtype | str | None,
    names: tuple[str, str, str] = ("q_data_type", "kv_data_type", "o_data_type"),
) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """FlashInfer's defaults: float16 queries, KV and outputs as the queries (bfloat16 for fp8 queries).

    names: what the caller calls the three, for errors.
    """
    q_dtype = check.dtype(names[0], "float16" if q is None else q)
    kv_dtype = check.dtype(names[1], q_dtype if kv is None else kv)
    fallback = torch.bfloat16 if q_dtype in check.FP8_DTYPES else q_dtype
    o_dtype = check.dtype(names[2], fallback if o is None else o)
    known = check.FLOAT_DTYPES + check.FP8_DTYPES
    check.choice(names[0], q_dtype, known)
    check.choice(names[1], kv_dtype, known)
    check.choice(names[2], o_dtype, check.FLOAT_DTYPES)
    if kv_dtype not in (q_dtype, *check.FP8_DTYPES):
        raise ValueError(
            check.problem(names[1], kv_dtype, f"{q_dtype}, as {names[0]}, or an fp8 type", "Convert one of the two.")
        )
    return q_dtype, kv_dtype, o_dtype


def attention_spec(
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    page_size: int | None,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    uniform_qo_len: int | None = None,
    split_kv: bool = True,
) -> AttentionSpec:
    """A checked spec; heads: (num_qo_heads, num_kv_heads); head_dims: (qk, vo); page_size None = ragged."""
    check.positive("num_qo_heads", heads[0])
    check.positive("num_kv_heads", heads[1])
    check.multiple("num_qo_heads", heads[0], "num_kv_heads", heads[1])
    check.head_dim("head_dim_qk", head_dims[0])
    check.head_dim("head_dim_vo", head_dims[1])
    size = 1 if page_size is None else check.positive("page_size", page_size)
    return AttentionSpec(*heads, *head_dims, size, page_size is not None, *dtypes, uniform_qo_len, split_kv)


def paged_batch(device: torch.device, arrays: dict[str, torch.Tensor], page_size: int) -> Batch:
    """A checked paged batch without queries, where the caller has it; arrays: kv_indptr, kv_indices, last_page_len."""
    (indptr_name, indptr), (indices_name, table), (last_name, last) = arrays.items()
    indices.indptr(indptr_name, indptr, device)
    min_pages = indices.page_indices(indices_name, table, device, indptr)
    indices.last_page_len(last_name, last, device, indptr, page_size)
    return Batch(None, indptr, table, last, indptr.numel() - 1, None, min_pages)


def _aligned(buffer: torch.Tensor) -> torch.Tensor:
    if buffer.data_ptr() % 16 or not buffer.is_contiguous():
        raise ValueError(
            "float_workspace_buffer must be 16-byte aligned and contiguous. Pass a fresh torch.empty(...)."
        )
    return buffer
