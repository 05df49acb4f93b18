"""Matrix products with FlashInfer's names and signatures: dense ones by torch, grouped and block-scaled ones our own.

A backend's name may be any that FlashInfer knows for the function; all mean the implementation there is here. Functions
raise TypeError and ValueError for wrong arguments, and wait for nothing on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashinfer.core import check
from flashinfer.core.replay import replayed
from flashinfer.gemm_fp8 import (
    batch_deepgemm_fp8_nt_groupwise,
    fp8_blockscale_gemm_sm90,
    gemm_fp8_nt_blockscaled,
    gemm_fp8_nt_groupwise,
    group_deepgemm_fp8_nt_groupwise,
    group_gemm_fp8_nt_groupwise,
)
from flashinfer.ops import gemm as ops
from flashinfer.ops.gemm import Rows, Weights
from flashinfer.ops.quantization import SfLayout, linear_scales

__all__ = [
    "SegmentGEMMWrapper",
    "batch_deepgemm_fp8_nt_groupwise",
    "bmm_bf16",
    "bmm_fp8",
    "fp8_blockscale_gemm_sm90",
    "gemm_fp8_nt_blockscaled",
    "gemm_fp8_nt_groupwise",
    "group_deepgemm_fp8_nt_groupwise",
    "group_gemm_fp8_nt_groupwise",
    "mm_bf16",
    "mm_bf16_fp4",
    "prepare_bf16_fp4_weights",
    "tinygemm_bf16",
]

BF16_BACKENDS = ("auto", "cudnn", "cublaslt", "cutlass", "tgv", "tinygemm", "cutile", "cute-dsl", "torch")
FP8_BACKENDS = ("auto", "cublas", "cudnn", "cutlass", "torch", "triton")
FP4_BACKENDS = ("auto", "cudnn", "cute-dsl", "triton")
SEGMENT_BACKENDS = ("auto", "sm80", "sm90", "torch", "triton")
HALF_DTYPES = (torch.bfloat16, torch.float16)


def _tells_backends(backends: tuple[str, ...]) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Give a function FlashInfer's `is_backend_supported(backend, cc)` and `is_compute_capability_supported(cc)`."""

    def decorate(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def is_backend_supported(backend: str, cc: int | None = None) -> bool:
            """Whether the name is one of this function's; on which GPU makes no difference."""
            return backend in backends

        def is_compute_capability_supported(cc: int) -> bool:
            """Every GPU from sm_80 on."""
            return cc >= 80

        function.is_backend_supported = is_backend_supported  # type: ignore[attr-defined]
        function.is_compute_capability_supported = is_compute_capability_supported  # type: ignore[attr-defined]
        return function

    return decorate


def result(
    out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: tuple[str, torch.Tensor]
) -> torch.Tensor:
    """`out`, checked, or a new tensor."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=like[1].device)
    return check.tensor("out", out, dtypes=(dtype,), shape=shape, like=like, inner_contiguous=True)


# ---- dense, by torch


@_tells_backends(BF16_BACKENDS)
def mm_bf16(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    pdl: bool = False,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "cudnn",
) -> torch.Tensor:
    """`a @ b + bias`, summed in fp32.

    a: bf16 `[m, k]`. b: bf16 `[k, n]`, any strides, fastest as the transpose of a contiguous `[n, k]`. bias: bf16
    `[n]`. out: `[m, n]` to write to. out_dtype: bf16, fp16 or fp32. pdl: no effect. Returns out.
    """
    check.choice("backend", backend, BF16_BACKENDS)
    like = ("a", a)
    check.tensor("a", a, dtypes=(torch.bfloat16,), shape=(None, None))
    check.tensor("b", b, dtypes=(torch.bfloat16,), shape=(a.shape[1], None), like=like)
    if bias is not None:
        check.tensor("bias", bias, dtypes=(torch.bfloat16,), shape=(b.shape[1],), like=like)
    check.choice("out_dtype", out_dtype, (*HALF_DTYPES, torch.float32))
    out = result(out, (a.shape[0], b.shape[1]), out_dtype, like)
    ops.dense(out, a, b, bias)
    return out


@_tells_backends(BF16_BACKENDS)
def bmm_bf16(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "cudnn",
) -> torch.Tensor:
    """`A @ B` of each matrix of a batch, summed in fp32.

    A: bf16 `[b, m, k]`. B: bf16 `[b, k, n]`, any strides. out: `[b, m, n]`. out_dtype: bf16, fp16 or fp32.
    """
    check.choice("backend", backend, BF16_BACKENDS)
    check.tensor("A", A, dtypes=(torch.bfloat16,), shape=(None, None, None))
    check.tensor("B", B, dtypes=(torch.bfloat16,), shape=(A.shape[0], A.shape[2], None), like=("A", A))
    check.choice("out_dtype", out_dtype, (*HALF_DTYPES, torch.float32))
    out = result(out, (*A.shape[:2], B.shape[2]), out_dtype, ("A", A))
    ops.dense(out, A, B)
    return out


def tinygemm_bf16(
    input: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    use_pdl: bool = False,
) -> None:
    """`out = input @ weight.T + bias` of few rows, a router's for instance.

    input: bf16 `[m, k]`. weight: bf16 `[n, k]`. out: bf16 `[m, n]`. bias: bf16 `[n]`. use_pdl: no effect.
    """
    bf16 = (torch.bfloat16,)
    like = ("input", input)
    check.tensor("input", input, dtypes=bf16, shape=(None, None))
    check.tensor("weight", weight, dtypes=bf16, shape=(None, input.shape[1]), like=like)
    check.tensor("out", out, dtypes=bf16, shape=(input.shape[0], weight.shape[0]), like=like)
    if bias is not None:
        check.tensor("bias", bias, dtypes=bf16, shape=(weight.shape[0],), like=like)
    ops.dense(out, input, weight.t(), bias)


@_tells_backends(FP8_BACKENDS)
def bmm_fp8(
    A: torch.Tensor,
    B: torch.Tensor,
    A_scale: torch.Tensor,
    B_scale: torch.Tensor,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    backend: str = "cublas",
) -> torch.Tensor:
    """`A @ B * A_scale * B_scale` of each matrix of a batch of fp8.

    A: e4m3 or e5m2 `[b, m, k]`. B: e4m3 or e5m2 `[b, k, n]`, the transpose of a `[b, n, k]` with innermost stride 1.
    A_scale, B_scale: fp32, one element. dtype: of the result, bf16 or fp16. out: `[b, m, n]`.
    """
    check.choice("backend", backend, FP8_BACKENDS)
    check.tensor("A", A, dtypes=check.FP8_DTYPES, shape=(None, None, None), inner_contiguous=True)
    check.tensor("B", B, dtypes=check.FP8_DTYPES, shape=(A.shape[0], A.shape[2], None), like=("A", A))
    check.tensor("B.transpose(1, 2)", B.transpose(1, 2), inner_contiguous=True)
    check.choice("dtype", dtype, HALF_DTYPES)
    row_scale, scale = check.scalar("A_scale", A_scale, ("A", A)), check.scalar("B_scale", B_scale, ("A", A))
    out = result(out, (*A.shape[:2], B.shape[2]), dtype, ("A", A))
    ops.batched_fp8(out, A, B, row_scale.reshape(1), scale.reshape(1))
    return out


# ---- fp4 weights


def prepare_bf16_fp4_weights(
    b: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    *,
    backend: str,
    block_size: int = 16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """NVFP4 weights as `mm_bf16_fp4` takes them: scales row by row instead of swizzled.

    b: uint8 `[n, k / 2]`, the even column in the low four bits. b_descale: e4m3 or its bytes, the scale of each 16
    columns in the 128x4 layout of `nvfp4_quantize`. alpha: fp32, one element, or None. Returns all three.
    """
    check.choice("backend", backend, FP4_BACKENDS)
    check.choice("block_size", block_size, (16,))
    check.tensor("b", b, dtypes=(torch.uint8,), shape=(None, None), inner_contiguous=True)
    check.multiple("columns of b", 2 * b.shape[1], "block_size", block_size)
    n, blocks = b.shape[0], 2 * b.shape[1] // block_size
    size = -(-n // 128) * 128 * -(-blocks // 4) * 4
    check.tensor("b_descale", b_descale, dtypes=(torch.uint8, torch.float8_e4m3fn), like=("b", b))
    if b_descale.numel() < size:
        got = f"{b_descale.numel()} scales"
        raise ValueError(check.problem("b_descale", got, f"{size}, padded to 128x4", "Quantise in layout_128x4."))
    return b, linear_scales(b_descale, n, blocks, SfLayout.layout_128x4), alpha


@_tells_backends(FP4_BACKENDS)
def mm_bf16_fp4(
    a: torch.Tensor,
    b: torch.Tensor,
    b_descale: torch.Tensor,
    alpha: torch.Tensor | None = None,
    *,
    backend: str,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    block_size: int = 16,
    enable_pdl: bool = True,
) -> torch.Tensor:
    """`a @ dequantised(b).T * alpha`: 16-bit activations times NVFP4 weights.

    a: bf16 or fp16 `[m, k]`. b, b_descale, alpha: what `prepare_bf16_fp4_weights` returned: uint8 `[n, k / 2]`, e4m3
    (or its bytes) `[n, k / 16]`, fp32 of one element or None. out: `[m, n]`. out_dtype: default that of a.
    """
    check.choice("backend", backend, FP4_BACKENDS)
    check.choice("block_size", block_size, (16,))
    like = ("a", a)
    check.tensor("a", a, dtypes=HALF_DTYPES, shape=(None, None), inner_contiguous=True)
    check.multiple("columns of a", a.shape[1], "block_size", block_size)
    check.tensor("b", b, dtypes=(torch.uint8,), shape=(None, a.shape[1] // 2), like=like, inner_contiguous=True)
    shape = (b.shape[0], a.shape[1] // block_size)
    check.tensor("b_descale", b_descale, dtypes=(torch.uint8, torch.float8_e4m3fn), shape=shape, like=like)
    factor = None if alpha is None else check.scalar("alpha", alpha, like).reshape(1)
    out = result(out, (a.shape[0], b.shape[0]), out_dtype or a.dtype, like)
    weights = Weights(b[None], scale=b_descale[None], kind="nvfp4", global_scale=factor)
    ops.grouped_gemm(Rows(a), weights, out=out)
    return out


# ---- segments


class SegmentGEMMWrapper:
    """Products of segments of rows with a weight matrix each: `y[s] = x[s] @ W[s]`."""

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        """float_workspace_buffer: not needed, accepted. backend: "auto", "sm80", "sm90", "triton" or "torch"."""
        check.choice("backend", backend, SEGMENT_BACKENDS)
        self._backend = "auto" if backend in ("sm80", "sm90") else backend
        self._float_workspace_buffer = float_workspace_buffer

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Take other buffers; they are not needed."""
        self._float_workspace_buffer = float_workspace_buffer

    def run(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        batch_size: int,
        weight_column_major: bool,
        out: torch.Tensor | None = None,
        seg_lens: torch.Tensor | None = None,
        seg_indptr: torch.Tensor | None = None,
        weight_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rows of all segments, `[nnz, d_out]`.

        x: fp16, bf16 or fp32 `[nnz, d_in]`, rows sorted by segment. weights: `[num_weights, d_out, d_in]` if
        weight_column_major, else `[num_weights, d_in, d_out]`; num_weights = batch_size without weight_indices.
        seg_indptr: `[batch_size + 1]`, or seg_lens: `[batch_size]`, int32 or int64; seg_indptr goes first.
        weight_indices: int32 or int64 `[batch_size]`, the weight of each segment; negative: its rows become 0.
        out: `[nnz, d_out]` to write to. Rows behind the last segment are left as they are.
        """
        if seg_indptr is None:
            seg_indptr = _bounds(batch_size, seg_lens, x)
        if out is None:
            check.tensor("x", x, shape=(None, None))
            check.tensor("weights", weights, shape=(None, None, None))
            out = torch.empty(
                x.shape[0], weights.shape[1 if weight_column_major else 2], dtype=x.dtype, device=x.device
            )
        form = (batch_size, bool(weight_column_major), self._backend)
        _multiply_segments(out, x, weights, seg_indptr, weight_indices, form)
        return out

    forward = run


@replayed
def _multiply_segments(
    out: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    indptr: torch.Tensor,
    weight_indices: torch.Tensor | None,
    form: tuple[int, bool, str],
) -> None:
    """Check and multiply: `SegmentGEMMWrapper.run`. form: (batch_size, weight_column_major, backend)."""
    batch_size, column_major, backend = form
    like, dtypes = ("x", x), check.POSITION_DTYPES
    check.tensor("x", x, dtypes=check.FLOAT_DTYPES, shape=(None, None), inner_contiguous=True)
    check.tensor("weights", weights, dtypes=(x.dtype,), shape=(None, None, None), like=like, inner_contiguous=True)
    matrices = weights if column_major else weights.transpose(1, 2)
    check.tensor("weights", matrices, shape=(None, None, x.shape[1]))
    check.tensor("seg_indptr", indptr, dtypes=dtypes, shape=(batch_size + 1,), like=like)
    if weight_indices is None:
        check.tensor("weights", weights, shape=(batch_size, None, None))
    else:
        check.tensor("weight_indices", weight_indices, dtypes=dtypes, shape=(batch_size,), like=like)
    result(out, (x.shape[0], matrices.shape[1]), x.dtype, like)
    ops.grouped_gemm(Rows(x, indptr), Weights(matrices, weight_indices), out=out, backend=backend)


def _bounds(batch_size: int, seg_lens: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Of the segments, by their lengths."""
    if seg_lens is None:
        raise ValueError(check.problem("seg_lens", None, "seg_lens or seg_indptr", "Pass the segments' lengths."))
    check.tensor("seg_lens", seg_lens, dtypes=check.POSITION_DTYPES, shape=(batch_size,), like=("x", x))
    return ops.indptr_of(seg_lens)
