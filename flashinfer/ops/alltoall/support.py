"""Which implementation runs which all-to-all: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.check import FLOAT_DTYPES
from flashinfer.core.select import triton_missing
from flashinfer.ops.alltoall.spec import CombineSpec, DispatchSpec

MAX_RANKS, MAX_TOP_K = 16, 64
MAX_WORDS, MAX_HIDDEN_SIZE = 32768, 16384


def torch_supports(spec: DispatchSpec | CombineSpec, arch: Arch) -> str | None:
    """torch.distributed runs everything, on any backend and any number of hosts."""
    return None


def triton_supports(spec: DispatchSpec | CombineSpec, arch: Arch) -> str | None:
    """Kernels write to the other ranks' memory; a program holds a token in registers."""
    missing = triton_missing(arch) or spec.unreachable
    if missing is not None:
        return missing
    if spec.world_size > MAX_RANKS:
        return f"each of more than {MAX_RANKS} ranks would write to all others"
    return _dispatch(spec) if isinstance(spec, DispatchSpec) else _combine(spec, arch)


def _dispatch(spec: DispatchSpec) -> str | None:
    if spec.top_k > MAX_TOP_K:
        return f"the experts of several hundred tokens, more than {MAX_TOP_K} each, do not fit in registers"
    if sum(row.words for row in spec.rows) > MAX_WORDS:
        return f"a token of more than {MAX_WORDS} words in all payloads does not fit in registers"
    return None


def _combine(spec: CombineSpec, arch: Arch) -> str | None:
    if spec.dtype not in FLOAT_DTYPES or spec.out_dtype not in FLOAT_DTYPES:
        return f"sums of {spec.dtype} in {spec.out_dtype} are not written"
    if spec.hidden_size > MAX_HIDDEN_SIZE:
        return f"a row of more than {MAX_HIDDEN_SIZE} elements does not fit in the registers of one program"
    if arch.is_cpu and spec.out_dtype == torch.bfloat16:
        return "the Triton interpreter truncates in a conversion to bf16 instead of rounding"
    return None
