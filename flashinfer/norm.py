"""Normalisation with FlashInfer's names and signatures.

`enable_pdl` (programmatic dependent launch) is accepted everywhere and ignored: it changes no result.
"""

from __future__ import annotations

from typing import Any

import torch

from flashinfer.core import check
from flashinfer.ops import norm as ops


def _rows(input: torch.Tensor, **alike: torch.Tensor) -> None:
    """Check `input` `[..., hidden_size]` of 2 or 3 dimensions, and tensors of its shape and dtype."""
    check.tensor("input", input, dtypes=check.FLOAT_DTYPES, inner_contiguous=True)
    if input.dim() not in (2, 3):
        raise ValueError(
            check.problem(
                "input", f"{input.dim()} dimensions", "2 or 3 dimensions", "Reshape it to [rows, hidden_size]."
            )
        )
    for name, x in alike.items():
        like = ("input", input)
        check.tensor(name, x, dtypes=(input.dtype,), shape=input.shape, like=like, inner_contiguous=True)


def _weights(input: torch.Tensor, **weights: torch.Tensor) -> None:
    """Check per-channel `weights` `[hidden_size]`."""
    for name, weight in weights.items():
        like, shape = ("input", input), (input.shape[-1],)
        check.tensor(name, weight, dtypes=check.FLOAT_DTYPES, shape=shape, like=like, inner_contiguous=True)


def _quantised(input: torch.Tensor, out: torch.Tensor, scale: Any) -> None:
    """Check an fp8 `out` of input's shape and a scale of one element on the device."""
    like = ("input", input)
    check.tensor("out", out, dtypes=check.FP8_DTYPES, shape=input.shape, like=like, inner_contiguous=True)
    check.scalar("scale", scale, like)


def _is_plain(input: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all is as it mostly is, so that the checks can be skipped; other: a tensor that is to be like input.

    The checks, made to tell what is wrong, take longer than the launch of a kernel.
    """
    return (
        isinstance(input, torch.Tensor)
        and isinstance(weight, torch.Tensor)
        and isinstance(other, torch.Tensor)
        and input.dim() in (2, 3)
        and weight.dim() == 1
        and input.dtype == weight.dtype == other.dtype
        and input.dtype in check.FLOAT_DTYPES
        and input.shape == other.shape
        and input.shape[-1] == weight.shape[0]
        and input.device == weight.device == other.device
        and input.stride(-1) == weight.stride(0) == other.stride(-1) == 1
    )


def _is_plain_fp8(input: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> bool:
    """The same of what quantised norms have besides."""
    return (
        isinstance(out, torch.Tensor)
        and isinstance(scale, torch.Tensor)
        and out.dtype in check.FP8_DTYPES
        and out.shape == input.shape
        and out.stride(-1) == 1
        and scale.dtype == torch.float32
        and scale.numel() == 1
        and input.device == out.device == scale.device
    )


def _rmsnorm(
    input: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None, weight_bias: float
) -> torch.Tensor:
    made = out is None
    if out is None:
        check.tensor("input", input)
        out = torch.empty_like(input, memory_format=torch.contiguous_format)
    if not _is_plain(input, weight, out):
        _rows(input, **({} if made else {"out": out}))
        _weights(input, weight=weight)
    ops.rmsnorm(out, input, weight, None, eps, weight_bias)
    return out


def _fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float
) -> None:
    if not _is_plain(input, weight, residual):
        _rows(input, residual=residual)
        _weights(input, weight=weight)
    ops.fused_add_rmsnorm(input, residual, weight, eps, weight_bias)


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """`input / sqrt(mean(input^2) + eps) * weight` over the last dimension, accumulated in fp32.

    input: `[rows, hidden_size]` or `[rows, num_heads, head_dim]`, fp32, fp16 or bf16, innermost stride 1.
    weight: `[hidden_size]`, any of these dtypes. out: like input, may be input itself. Returns out.
    Raises ValueError for a wrong shape, dtype, stride or device.
    """
    return _rmsnorm(input, weight, eps, out, weight_bias=0.0)


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """`rmsnorm` with Gemma's weights, which are stored less 1: the factor is `weight + 1`."""
    return _rmsnorm(input, weight, eps, out, weight_bias=1.0)


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """In place: `residual += input`, then `input = rmsnorm(residual, weight)`.

    The norm is taken of the fp32 sum before it is rounded into residual. Shapes, dtypes and errors as for `rmsnorm`;
    residual has input's shape and dtype and may not overlap it.
    """
    _fused_add_rmsnorm(input, residual, weight, eps, weight_bias=0.0)


def gemma_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """`fused_add_rmsnorm` with Gemma's weights: the factor is `weight + 1`."""
    _fused_add_rmsnorm(input, residual, weight, eps, weight_bias=1.0)


def layernorm(input: torch.Tensor, gemma: torch.Tensor, beta: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`(input - mean) / sqrt(variance + eps) * gemma + beta` over the last dimension, accumulated in fp32.

    input: as for `rmsnorm`. gemma (the scale) and beta (the shift): `[hidden_size]` of one dtype, usually fp32. Returns
    a new tensor of input's dtype.
    """
    _rows(input)
    _weights(input, gemma=gemma, beta=beta)
    out = torch.empty_like(input, memory_format=torch.contiguous_format)
    ops.layernorm(out, input, gemma, beta, None, eps)
    return out


def rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """`out = rmsnorm(input, weight) / scale` in fp8: rounded once, saturating, NaN kept.

    out: input's shape, float8_e4m3fn or float8_e5m2, innermost stride 1. scale: fp32, one element, on the device.
    Otherwise as `rmsnorm`; ValueError also for a scale that is no tensor. Returns out.
    """
    if not (_is_plain(input, weight, input) and _is_plain_fp8(input, out, scale)):
        _rows(input)
        _weights(input, weight=weight)
        _quantised(input, out, scale)
    ops.rmsnorm(out, input, weight, scale, eps, 0.0)
    return out


def fused_add_rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """`residual += input` in place, then `out = rmsnorm(residual, weight) / scale` in fp8; input is kept.

    Tensors as for `fused_add_rmsnorm` and `rmsnorm_quant`.
    """
    if not (_is_plain(input, weight, residual) and _is_plain_fp8(input, out, scale)):
        _rows(input, residual=residual)
        _weights(input, weight=weight)
        _quantised(input, out, scale)
    ops.fused_add_rmsnorm_quant(out, input, residual, weight, scale, eps)


def layernorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    gemma: torch.Tensor,
    beta: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`out = layernorm(input, gemma, beta) / scale` in fp8; out and scale as for `rmsnorm_quant`. Returns out."""
    _rows(input)
    _weights(input, gemma=gemma, beta=beta)
    _quantised(input, out, scale)
    ops.layernorm(out, input, gemma, beta, scale, eps)
    return out
