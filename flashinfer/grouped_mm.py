"""Grouped products `a[rows of g] @ b[g].T` with FlashInfer's names and signatures."""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.core.replay import replayed
from flashinfer.ops import gemm as ops
from flashinfer.ops.gemm import Rows, Weights

__all__ = ["grouped_mm_bf16", "grouped_mm_fp8"]

BACKENDS = ("auto", "cudnn", "torch", "triton")
HALF_DTYPES = (torch.bfloat16, torch.float16)
OUT_DTYPES = (*HALF_DTYPES, torch.float32)


def grouped_mm_bf16(
    a: torch.Tensor,
    b: torch.Tensor,
    m_indptr: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str = "cudnn",
    tactic: int = -1,
) -> torch.Tensor:
    """`a[m_indptr[g] : m_indptr[g + 1]] @ b[g].T` for every group g, summed in fp32.

    a: bf16 (or fp16) `[nnz, k]`. b: the same dtype, `[groups, n, k]`, innermost stride 1 or the transpose of
    `[groups, k, n]`. m_indptr: int32 or int64 `[groups + 1]`. out: `[nnz, n]`; rows of no group are left as they are.
    out_dtype: bf16, fp16 or fp32. backend: "cudnn" means "auto". tactic: no effect.
    """
    out = _result(out, a, b, out_dtype)
    _multiply_half(out, a, b, m_indptr, out_dtype, backend)
    return out


@replayed
def _multiply_half(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m_indptr: torch.Tensor, out_dtype: torch.dtype, backend: str
) -> None:
    check.tensor("a", a, dtypes=HALF_DTYPES, shape=(None, None), inner_contiguous=True)
    check.tensor("b", b, dtypes=(a.dtype,), shape=(None, None, a.shape[1]), like=("a", a))
    if b.numel() and 1 not in b.stride()[1:]:
        raise ValueError(check.problem("b", f"strides {b.stride()}", "one of 1 in n or k", "Call b.contiguous()."))
    _multiply(a, Weights(b), m_indptr, out, out_dtype, backend)


def grouped_mm_fp8(
    a: torch.Tensor,
    b: torch.Tensor,
    m_indptr: torch.Tensor,
    alpha: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str = "cudnn",
    tactic: int = -1,
) -> torch.Tensor:
    """`grouped_mm_bf16` of fp8 times `alpha`.

    a: e4m3 or e5m2 `[nnz, k]`. b: e4m3 or e5m2 `[groups, n, k]`, innermost stride 1. alpha: fp32, one element for all
    groups or `[groups]`; None is 1.
    """
    out = _result(out, a, b, out_dtype)
    _multiply_fp8(out, a, b, m_indptr, alpha, out_dtype, backend)
    return out


@replayed
def _multiply_fp8(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    m_indptr: torch.Tensor,
    alpha: torch.Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> None:
    check.tensor("a", a, dtypes=check.FP8_DTYPES, shape=(None, None), inner_contiguous=True)
    shape = (None, None, a.shape[1])
    check.tensor("b", b, dtypes=check.FP8_DTYPES, shape=shape, like=("a", a), inner_contiguous=True)
    if alpha is not None:
        alpha = alpha.reshape(-1) if alpha.numel() == 1 else alpha
        expected = (1,) if alpha.numel() == 1 else (b.shape[0],)
        check.tensor("alpha", alpha, dtypes=(torch.float32,), shape=expected, like=("a", a), inner_contiguous=True)
    weights = Weights(b, kind="fp8_tensor", global_scale=alpha)
    _multiply(a, weights, m_indptr, out, out_dtype, backend)


def _result(out: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    if out is not None:
        return out
    check.tensor("a", a, shape=(None, None))
    check.tensor("b", b, shape=(None, None, None))
    check.choice("out_dtype", out_dtype, OUT_DTYPES)
    return torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)


def _multiply(
    a: torch.Tensor, weights: Weights, m_indptr: torch.Tensor, out: torch.Tensor, out_dtype: torch.dtype, backend: str
) -> None:
    check.choice("backend", backend, BACKENDS)
    check.choice("out_dtype", out_dtype, OUT_DTYPES)
    groups, n = weights.values.shape[:2]
    check.tensor("m_indptr", m_indptr, dtypes=check.POSITION_DTYPES, like=("a", a), inner_contiguous=True)
    check.tensor("m_indptr", m_indptr.reshape(-1), shape=(groups + 1,))
    check.tensor("out", out, dtypes=(out_dtype,), shape=(a.shape[0], n), like=("a", a), inner_contiguous=True)
    request = "auto" if backend == "cudnn" else backend
    ops.grouped_gemm(Rows(a, m_indptr.reshape(-1)), weights, out=out, backend=request)
