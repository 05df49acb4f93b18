"""Which implementation runs which append: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.select import triton_missing
from flashinfer.ops.page.spec import AppendSpec


def torch_supports(spec: AppendSpec | None, arch: Arch) -> str | None:
    """The torch implementation runs everything. A spec of None asks for the index functions."""
    return None


def triton_supports(spec: AppendSpec | None, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter; fp8 is encoded in integers where the GPU has no instruction for it."""
    missing = triton_missing(arch)
    if missing is not None:
        return missing
    if spec is not None and arch.is_cpu and spec.cache_dtype == torch.bfloat16 != spec.row_dtype:
        return "the Triton interpreter truncates in a conversion to bf16 instead of rounding"
    return None
