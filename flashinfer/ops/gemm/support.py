"""Which implementation runs which product: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.check import FP8_DTYPES
from flashinfer.core.select import triton_missing
from flashinfer.ops.gemm.spec import GemmSpec

OLD_ARCHS = ("sm80", "sm86")


def torch_supports(spec: GemmSpec, arch: Arch) -> str | None:
    """The torch implementation runs everything."""
    return None


def triton_supports(spec: GemmSpec, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter, and instructions for fp8."""
    missing = triton_missing(arch)
    if missing is not None:
        return missing
    if spec.weight_dtype in FP8_DTYPES and arch.name in OLD_ARCHS:
        return f"{arch.name} has no fp8 numbers"
    if arch.is_cpu and torch.bfloat16 in (spec.row_dtype, spec.out_dtype):
        return "the Triton interpreter multiplies bf16 wrongly"
    return None
