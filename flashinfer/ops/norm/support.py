"""Which implementation runs which norm: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.select import triton_missing
from flashinfer.ops.norm.spec import NormSpec

MAX_HIDDEN_SIZE = 16384


def torch_supports(spec: NormSpec, arch: Arch) -> str | None:
    """The torch implementation runs everything."""
    return None


def triton_supports(spec: NormSpec, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter, and a program must hold a row in registers."""
    missing = triton_missing(arch)
    if missing is not None:
        return missing
    if spec.hidden_size > MAX_HIDDEN_SIZE:
        return f"a row of more than {MAX_HIDDEN_SIZE} elements does not fit in the registers of one program"
    if arch.is_cpu and (spec.out_dtype == torch.bfloat16 or (spec.adds and spec.dtype == torch.bfloat16)):
        return "the Triton interpreter truncates in a conversion to bf16 instead of rounding"
    return None
