"""Normalisation in plain torch: sums in fp32, one rounding at the end."""

from __future__ import annotations

import torch


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float) -> torch.Tensor:
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return x * scale * (weight.float() + weight_bias)


def rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float, out: torch.Tensor) -> None:
    """Write `input / sqrt(mean(input^2) + eps) * (weight + weight_bias)` to `out`, which may be `input`.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", equation 4. weight_bias: 1 for Gemma, else 0.
    """
    out.copy_(_rms(input.float(), weight, eps, weight_bias))


def fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float
) -> None:
    """In place: `residual += input`, then `input = rmsnorm(residual)`, normalised from the unrounded fp32 sum."""
    total = input.float() + residual.float()
    residual.copy_(total)
    input.copy_(_rms(total, weight, eps, weight_bias))


def layernorm(input: torch.Tensor, gemma: torch.Tensor, beta: torch.Tensor, eps: float) -> torch.Tensor:
    """`(input - mean) / sqrt(variance + eps) * gemma + beta`, in input's dtype (Ba et al., "Layer Normalization")."""
    x = input.float()
    centred = x - x.mean(dim=-1, keepdim=True)
    centred = centred - centred.mean(dim=-1, keepdim=True)  # takes the rounding of the mean back out
    scale = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return (centred * scale * gemma.float() + beta.float()).to(input.dtype)
