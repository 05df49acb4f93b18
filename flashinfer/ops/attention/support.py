"""Which implementation runs which problem: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.config import config
from flashinfer.ops.attention.spec import AttentionSpec


def torch_supports(spec: AttentionSpec, arch: Arch) -> str | None:
    """The torch implementation runs everything."""
    return None


def triton_supports(spec: AttentionSpec, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter, and tiles that fit the GPU's shared memory."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if arch.is_cpu and not config().triton_interpret:
        return "CPU tensors run on Triton only through its interpreter (set TRITON_INTERPRET=1 before the first import)"
    if arch.is_cpu and torch.bfloat16 in (spec.q_dtype, spec.kv_dtype, spec.o_dtype):
        return "the Triton interpreter computes bf16 products wrongly"
    if torch.float8_e4m3fn in (spec.q_dtype, spec.kv_dtype) and arch.name in ("sm80", "sm86"):
        return f"{arch.name} has no instruction that converts from float8_e4m3fn"
    if spec.q_dtype == torch.float32 and max(spec.head_dim_qk, spec.head_dim_vo) > 256:
        return "a float32 tile with head_dim above 256 does not fit in registers and shared memory"
    return None
