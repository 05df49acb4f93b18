"""Which implementation runs which problem: `supports(spec, arch) -> None or the reason why not`.

What only a run can tell (strides, addresses) has predicates of its own: `layout(tensors) -> None or the reason`.
"""

from __future__ import annotations

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.select import triton_missing
from flashinfer.ops.attention.spec import AttentionSpec, Tensors


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
    if torch.float8_e4m3fn in (spec.q_dtype, spec.kv_dtype) and not arch.has_fp8:
        return f"{arch.name} has no instruction that converts from float8_e4m3fn"
    if spec.q_dtype == torch.float32 and max(spec.head_dim_qk, spec.head_dim_vo) > 256:
        return "a float32 tile with head_dim above 256 does not fit in registers and shared memory"
    return None


# Rows of a query tile of the Hopper prefill; a tile is of one head.
HOPPER_QUERY_TILE = 128
HOPPER_HEAD_DIMS = (64, 128, 256)
HOPPER_TRITON = "3.6."


def gluon_sm90_supports(spec: AttentionSpec, arch: Arch) -> str | None:
    """Prefill by TMA and asynchronous wgmma."""
    if not arch.has_wgmma:
        return f"{arch.name} has no asynchronous warpgroup products"
    missing = triton_missing(arch)
    if missing is not None:
        return missing
    return hopper_compiler_problem(arch.triton) or _hopper_problem(spec) or _hopper_workload(spec, arch)


def hopper_compiler_problem(release: str | None) -> str | None:
    """Why this Triton's code for the kernel is not used; the kernel compiles under all of them (compile gate)."""
    if release is None or not release.startswith(HOPPER_TRITON):
        known = f"measured right and fast with {HOPPER_TRITON}x only"
        return f"Triton {release} was not seen to keep the kernel's loop in registers ({known})"
    return None


def _hopper_problem(spec: AttentionSpec) -> str | None:
    dtypes = {spec.q_dtype, spec.kv_dtype, spec.o_dtype}
    if dtypes not in ({torch.float16}, {torch.bfloat16}):
        return "wgmma takes both operands in one 16-bit type, and TMA copies without converting"
    if spec.head_dim_qk != spec.head_dim_vo or spec.head_dim_qk not in HOPPER_HEAD_DIMS:
        return f"tiles are powers of two wide: head_dim must be one of {HOPPER_HEAD_DIMS}, the same for K and V"
    if spec.rotates:
        return "keys go from TMA to wgmma without passing registers, where they would be rotated"
    if spec.uniform_qo_len is not None:
        return f"decode has few queries a request, and a query tile has {HOPPER_QUERY_TILE} rows of one head"
    return None


def _hopper_workload(spec: AttentionSpec, arch: Arch) -> str | None:
    """Whether the batch suits tiles of one head that are never split over programs."""
    if spec.workload is None:
        return None
    if spec.workload.queries < HOPPER_QUERY_TILE:
        return f"fewer than {HOPPER_QUERY_TILE} queries a request fill query tiles better with the heads of a group"
    if spec.workload.rows // HOPPER_QUERY_TILE * spec.num_qo_heads < arch.num_sms:
        return "too few query tiles to fill the GPU without splitting KV"
    return None


def gluon_sm90_layout(tensors: Tensors) -> str | None:
    """TMA wants addresses and strides in multiples of 16 bytes; the kernel counts elements between heads in 32 bits."""
    for name, x in zip(tensors._fields[:4], tensors, strict=False):
        assert x is not None
        strides = [stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1]
        if x.data_ptr() % 16 or any(stride <= 0 or stride * x.itemsize % 16 for stride in strides):
            return f"{name}: strides {tuple(x.stride())} or address are not in multiples of 16 bytes, as TMA needs them"
    if tensors.out.shape[1] * tensors.out.stride(1) >= 2**31:
        return f"out: its heads, {tensors.out.stride(1)} elements apart, lie further away than 32 bits can tell"
    return None
