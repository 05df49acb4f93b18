"""Which implementation runs which problem: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.select import triton_missing
from flashinfer.ops.attention.spec import AttentionSpec


def torch_supports(spec: AttentionSpec, arch: Arch) -> str | None:
    """The torch implementation runs everything."""
    return None


def triton_supports(spec: AttentionSpec, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter, and tiles that fit the GPU's shared memory."""
    missing = triton_missing(arch)
    if missing is not None:
        return missing
    if arch.is_cpu and torch.bfloat16 in (spec.q_dtype, spec.kv_dtype, spec.o_dtype):
        return "the Triton interpreter computes bf16 products wrongly"
    if torch.float8_e4m3fn in (spec.q_dtype, spec.kv_dtype) and arch.name in ("sm80", "sm86"):
        return f"{arch.name} has no instruction that converts from float8_e4m3fn"
    if spec.q_dtype == torch.float32 and max(spec.head_dim_qk, spec.head_dim_vo) > 256:
        return "a float32 tile with head_dim above 256 does not fit in registers and shared memory"
    return None
