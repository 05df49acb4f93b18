"""Normalisation with FlashInfer's names and signatures.

`enable_pdl` (programmatic dependent launch) is accepted everywhere and ignored: it changes no result.
"""

from __future__ import annotations

from typing import Any

import torch

from flashinfer.core import check
from flashinfer.core.replay import replayed
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


@replayed
def _rmsnorm(out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float) -> None:
    _rows(input, out=out)
    _weights(input, weight=weight)
    ops.rmsnorm(out, input, weight, None, eps, weight_bias)


@replayed
def _rmsnorm_quant(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, eps: float
) -> None:
    _rows(input)
    _weights(input, weight=weight)
    _quantised(input, out, scale)
    ops.rmsnorm(out, input, weight, scale, eps, 0.0)


@replayed
def _rmsnorm_silu(out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    _rows(input)
    _weights(input, weight=weight)
    dtypes, like = (input.dtype, *check.FP8_DTYPES), ("input", input)
    check.tensor("out", out, dtypes=dtypes, shape=input.shape, like=like, inner_contiguous=True)
    ops.rmsnorm_silu(out, input, weight, eps)


@replayed
def _fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float
) -> None:
    _rows(input, residual=residual)
    _weights(input, weight=weight)
    ops.fused_add_rmsnorm(input, residual, weight, eps, weight_bias)


@replayed
def _fused_add_rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> None:
    _rows(input, residual=residual)
    _weights(input, weight=weight)
    _quantised(input, out, scale)
    ops.fused_add_rmsnorm_quant(out, input, residual, weight, scale, eps)


@replayed
def _layernorm(out: torch.Tensor, input: torch.Tensor, gemma: torch.Tensor, beta: torch.Tensor, eps: float) -> None:
    _rows(input)
    _weights(input, gemma=gemma, beta=beta)
    ops.layernorm(out, input, gemma, beta, None, eps)


@replayed
def _layernorm_quant(
    out: torch.Tensor, input: torch.Tensor, gemma: torch.Tensor, beta: torch.Tensor, scale: torch.Tensor, eps: float
) -> None:
    _rows(input)
    _weights(input, gemma=gemma, beta=beta)
    _quantised(input, out, scale)
    ops.layernorm(out, input, gemma, beta, scale, eps)


def _made(input: torch.Tensor) -> torch.Tensor:
    check.tensor("input", input)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


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
    out = _made(input) if out is None else out
    _rmsnorm(out, input, weight, eps, 0.0)
    return out


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """`rmsnorm` with Gemma's weights, which are stored less 1: the factor is `weight + 1`."""
    out = _made(input) if out is None else out
    _rmsnorm(out, input, weight, eps, 1.0)
    return out


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
    _fused_add_rmsnorm(input, residual, weight, eps, 0.0)


def gemma_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """`fused_add_rmsnorm` with Gemma's weights: the factor is `weight + 1`."""
    _fused_add_rmsnorm(input, residual, weight, eps, 1.0)


def layernorm(input: torch.Tensor, gemma: torch.Tensor, beta: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`(input - mean) / sqrt(variance + eps) * gemma + beta` over the last dimension, accumulated in fp32.

    input: as for `rmsnorm`. gemma (the scale) and beta (the shift): `[hidden_size]` of one dtype, usually fp32. Returns
    a new tensor of input's dtype.
    """
    out = _made(input)
    _layernorm(out, input, gemma, beta, eps)
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
    _rmsnorm_quant(out, input, weight, scale, eps)
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
    _fused_add_rmsnorm_quant(out, input, residual, weight, scale, eps)


def layernorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    gemma: torch.Tensor,
    beta: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`out = layernorm(input, gemma, beta) / scale` in fp8; out and scale as for `rmsnorm_quant`. Returns out."""
    _layernorm_quant(out, input, gemma, beta, scale, eps)
    return out


def fused_rmsnorm_silu(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    block_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`silu(rmsnorm(input, weight))`, rounded once; tensors and errors as for `rmsnorm`. Returns out.

    out: input's dtype, or fp8 (saturating, not scaled). block_scale is for fp4, which no implementation here writes; as
    in FlashInfer it is ignored for other results.
    """
    out = _made(input) if out is None else out
    _rmsnorm_silu(out, input, weight, eps)
    return out
