"""Gated activations, as torch ops that write their results to tensors they are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from flashinfer.core import library
from flashinfer.core.arch import arch_of
from flashinfer.core.select import Impl, select
from flashinfer.ops.activation.spec import Gated, GatedSpec
from flashinfer.ops.activation.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.activation.triton", triton_supports),
    Impl("torch", "flashinfer.ops.activation.reference", torch_supports),
)


@lru_cache(maxsize=4096)
def _bound(
    name: str, width: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, backend: str
) -> Callable[[Gated], None]:
    """The chosen implementation's call for one kind; kept, because choosing takes longer than launching."""
    spec = GatedSpec(name, width, *dtypes)
    arch = arch_of(device)
    call: Callable[[Gated], None] = select(IMPLS, spec, arch, backend).load().bind(spec, arch)
    return call


def gate(name: str, tensors: Gated, backend: str = "auto") -> None:
    """Run one gated activation. "auto" is Triton on a GPU and torch on CPU tensors."""
    out, input, scale = tensors
    if out.numel() == 0:
        return
    if input.dim() > 3 and not (input.is_contiguous() and out.is_contiguous()):
        for part in zip(out, input, strict=True):
            gate(name, Gated(*part, scale), backend=backend)
        return
    _bound(name, out.shape[-1], (input.dtype, out.dtype), input.device, backend)(tensors)


def _register(name: str) -> library.Op:
    @library.register(f"{name}_and_mul(Tensor(a!) out, Tensor input, Tensor? scale) -> ()")
    def op(out: torch.Tensor, input: torch.Tensor, scale: torch.Tensor | None) -> None:
        gate(name, Gated(out, input, scale))

    return op


silu_and_mul = _register("silu")
gelu_and_mul = _register("gelu")
gelu_tanh_and_mul = _register("gelu_tanh")

__all__ = ["IMPLS", "Gated", "GatedSpec", "gate", "gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"]
