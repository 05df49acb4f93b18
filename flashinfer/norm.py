"""Normalisation with FlashInfer's names and signatures.

`enable_pdl` (programmatic dependent launch) is accepted everywhere and ignored: it changes no result.
"""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.ops import norm as ops


def _operands(input: torch.Tensor, **weights: torch.Tensor) -> None:
    """Check `input` `[..., hidden_size]` of 2 or 3 dimensions and its per-channel `weights` `[hidden_size]`."""
    check.tensor("input", input, dtypes=check.FLOAT_DTYPES, inner_contiguous=True)
    if input.dim() not in (2, 3):
        raise ValueError(
            check.problem(
                "input", f"{input.dim()} dimensions", "2 or 3 dimensions", "Reshape it to [rows, hidden_size]."
            )
        )
    for name, weight in weights.items():
        check.tensor(name, weight, dtypes=check.FLOAT_DTYPES, shape=(input.shape[-1],), like=("input", input))


def _rmsnorm(
    input: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None, weight_bias: float
) -> torch.Tensor:
    _operands(input, weight=weight)
    if out is None:
        out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    else:
        check.tensor("out", out, dtypes=(input.dtype,), shape=input.shape, like=("input", input))
    ops.rmsnorm(input, weight, eps, weight_bias, out)
    return out


def _fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float
) -> None:
    _operands(input, weight=weight)
    check.tensor("residual", residual, dtypes=(input.dtype,), shape=input.shape, like=("input", input))
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
    Raises ValueError for a wrong shape, dtype or device.
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

    input: as for `rmsnorm`. gemma (the scale) and beta (the shift): `[hidden_size]`, usually fp32. Returns a new tensor
    of input's dtype.
    """
    _operands(input, gemma=gemma, beta=beta)
    return ops.layernorm(input, gemma, beta, eps)
