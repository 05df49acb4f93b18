"""Which implementation runs which mixture of experts: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.select import triton_missing
from flashinfer.ops.moe.spec import MoESpec

MAX_EXPERTS = 1024


def torch_supports(spec: MoESpec, arch: Arch) -> str | None:
    """The torch implementation runs everything."""
    return None


def triton_supports(spec: MoESpec, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter; a program counts the pairs of all experts at once."""
    missing = triton_missing(arch)
    if missing is not None:
        return missing
    if spec.num_experts > MAX_EXPERTS:
        return f"pairs are sorted by at most {MAX_EXPERTS} experts"
    if spec.kind in ("fp8_tensor", "fp8_block") and not arch.has_fp8:
        return f"{arch.name} has no fp8 numbers"
    if arch.is_cpu and torch.bfloat16 in (spec.dtype, spec.out_dtype):
        return "the Triton interpreter multiplies bf16 wrongly"
    return None
