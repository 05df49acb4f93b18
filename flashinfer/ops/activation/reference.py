"""Gated activations in plain torch: `activation(first half) * second half`, in fp32, rounded once."""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def silu_and_mul(input: torch.Tensor, out: torch.Tensor) -> None:
    """Write `x * sigmoid(x) * gate` to `out`."""
    x, gate = input.float().chunk(2, dim=-1)
    out.copy_(functional.silu(x) * gate)


def gelu_and_mul(input: torch.Tensor, out: torch.Tensor) -> None:
    """Write `x * Phi(x) * gate` to `out`; Phi(x) = erfc(-x / sqrt(2)) / 2, exact where 1 + erf would cancel."""
    x, gate = input.float().chunk(2, dim=-1)
    out.copy_(0.5 * x * torch.erfc(-math.sqrt(0.5) * x) * gate)


def gelu_tanh_and_mul(input: torch.Tensor, out: torch.Tensor) -> None:
    """Write `x * Phi(x) * gate` to `out`, Phi by its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415).

    (1 + tanh(u)) / 2 is written as sigmoid(2 u), which does not cancel.
    """
    x, gate = input.float().chunk(2, dim=-1)
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    out.copy_(x * torch.sigmoid(2 * u) * gate)
