"""Which implementation runs which append: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.config import config
from flashinfer.ops.page.spec import AppendSpec


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def torch_supports(spec: AppendSpec, arch: Arch) -> str | None:
    """The torch implementation runs everything."""
    return None


def triton_supports(spec: AppendSpec, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter; fp8 is encoded in integers, so every architecture can write it."""
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    if arch.is_cpu and not config().triton_interpret:
        return "CPU tensors run on Triton only through its interpreter (set TRITON_INTERPRET=1 before the first import)"
    if arch.is_cpu and spec.cache_dtype == torch.bfloat16 != spec.row_dtype:
        return "the Triton interpreter truncates in a conversion to bf16 instead of rounding"
    return None
