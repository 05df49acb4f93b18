"""Normalisation in plain torch: sums in fp32, one rounding at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.check import FP8_DTYPES
from flashinfer.ops.norm.spec import Norm, NormSpec


def bind(spec: NormSpec, arch: Arch) -> Callable[[Norm, float], None]:
    """The call `(tensors, eps)` for one kind of norm."""
    return partial(run, spec)


@torch.no_grad()
def run(spec: NormSpec, tensors: Norm, eps: float) -> None:
    """Write `x / sqrt(mean(x^2) + eps) * (weight + weight_bias) + shift`, over scale, to `out`; x = input + residual.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", equation 4; centred: Ba et al., "Layer Normalization".
    The sum is rounded where it is written to residual, not where it is normalised.
    """
    x = tensors.input.float()
    if tensors.residual is not None:
        x = x + tensors.residual.float()
        tensors.residual.copy_(x)
    if spec.centred:
        x = x - x.mean(dim=-1, keepdim=True)
        x = x - x.mean(dim=-1, keepdim=True)  # takes the rounding of the mean back out
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * (tensors.weight.float() + spec.weight_bias)
    if tensors.shift is not None:
        y = y + tensors.shift.float()
    if tensors.scale is not None:
        y = y / tensors.scale
    if spec.out_dtype in FP8_DTYPES:
        limit = torch.finfo(spec.out_dtype).max
        y = y.clamp(-limit, limit)
    tensors.out.copy_(y)
