"""Gated activations in plain torch: `activation(first half) * second half`, in fp32, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from flashinfer.core.arch import Arch
from flashinfer.core.check import FP8_DTYPES
from flashinfer.ops.activation.spec import Gated, GatedSpec


def gelu(x: torch.Tensor) -> torch.Tensor:
    """`x * Phi(x)`; Phi(x) = erfc(-x / sqrt(2)) / 2, exact where 1 + erf would cancel."""
    return 0.5 * x * torch.erfc(-math.sqrt(0.5) * x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """`x * Phi(x)`, Phi by its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415).

    (1 + tanh(u)) / 2 is written as sigmoid(2 u), which does not cancel.
    """
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * torch.sigmoid(2 * u)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}


def bind(spec: GatedSpec, arch: Arch) -> Callable[[Gated], None]:
    """The call `(tensors)` for one kind."""
    return partial(run, spec)


@torch.no_grad()
def run(spec: GatedSpec, tensors: Gated) -> None:
    """Write `activation(x) * gate / scale` to `out`."""
    x, gate = tensors.input.float().chunk(2, dim=-1)
    y = ACTIVATIONS[spec.name](x) * gate
    if tensors.scale is not None:
        y = y / tensors.scale
    if spec.out_dtype in FP8_DTYPES:
        limit = torch.finfo(spec.out_dtype).max
        y = y.clamp(-limit, limit)
    tensors.out.copy_(y)
