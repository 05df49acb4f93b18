"""Normalisation over the last dimension, as torch ops that write their results to tensors they are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from flashinfer.core import library
from flashinfer.core.arch import arch_of
from flashinfer.core.select import Impl, select
from flashinfer.ops.norm.spec import Norm, NormSpec
from flashinfer.ops.norm.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.norm.triton", triton_supports),
    Impl("torch", "flashinfer.ops.norm.reference", torch_supports),
)


@lru_cache(maxsize=4096)
def _bound(
    hidden_size: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    centred: bool,
    adds: bool,
    weight_bias: float,
    device: torch.device,
    backend: str,
) -> Callable[[Norm, float], None]:
    """The chosen implementation's call for one kind of norm; kept, because choosing takes longer than launching."""
    spec = NormSpec(hidden_size, *dtypes, centred, adds, weight_bias)
    arch = arch_of(device)
    call: Callable[[Norm, float], None] = select(IMPLS, spec, arch, backend).load().bind(spec, arch)
    return call


def normalise(tensors: Norm, eps: float, weight_bias: float = 0.0, backend: str = "auto") -> None:
    """Run one norm; LayerNorm where there is a shift. "auto" is Triton on a GPU and torch on CPU tensors."""
    out, input, weight = tensors[:3]
    if input.numel() == 0:
        return
    dtypes = (input.dtype, weight.dtype, out.dtype)
    adds = tensors.residual is not None
    bound = _bound(input.shape[-1], dtypes, tensors.shift is not None, adds, weight_bias, input.device, backend)
    bound(tensors, eps)


@library.register("rmsnorm(Tensor(a!) out, Tensor input, Tensor weight, Tensor? scale, float eps, float bias) -> ()")
def rmsnorm(
    out: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, eps: float, bias: float
) -> None:
    """`out = input / sqrt(mean(input^2) + eps) * (weight + bias) / scale`."""
    normalise(Norm(out, input, weight, scale=scale), eps, bias)


@library.register(
    "fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps, float bias) -> ()"
)
def fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, bias: float
) -> None:
    """In place: `residual += input`, then `input = rmsnorm(residual)`."""
    normalise(Norm(input, input, weight, residual), eps, bias)


@library.register(
    "fused_add_rmsnorm_quant(Tensor(a!) out, Tensor input, Tensor(b!) residual, Tensor weight, Tensor scale, float eps)"
    " -> ()"
)
def fused_add_rmsnorm_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    eps: float,
) -> None:
    """`residual += input`, then `out = rmsnorm(residual) / scale`."""
    normalise(Norm(out, input, weight, residual, scale=scale), eps)


@library.register(
    "layernorm(Tensor(a!) out, Tensor input, Tensor weight, Tensor shift, Tensor? scale, float eps) -> ()"
)
def layernorm(
    out: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor | None,
    eps: float,
) -> None:
    """`out = ((input - mean) / sqrt(variance + eps) * weight + shift) / scale`."""
    normalise(Norm(out, input, weight, shift=shift, scale=scale), eps)


__all__ = [
    "IMPLS",
    "Norm",
    "NormSpec",
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_quant",
    "layernorm",
    "normalise",
    "rmsnorm",
]
