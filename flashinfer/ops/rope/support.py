"""Which implementation runs which rotation: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.select import triton_missing
from flashinfer.ops.rope.spec import RopeSpec


def torch_supports(spec: RopeSpec, arch: Arch) -> str | None:
    """The torch implementation runs everything."""
    return None


def triton_supports(spec: RopeSpec, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter; fp8 is encoded in integers where the GPU has no instruction for it."""
    missing = triton_missing(arch)
    if missing is not None:
        return missing
    if arch.is_cpu and spec.out_dtype == torch.bfloat16:
        return "the Triton interpreter truncates in a conversion to bf16 instead of rounding"
    return None
