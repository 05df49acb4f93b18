"""What the offline compile gate compiles of this folder: every path, in each architecture's configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from flashinfer.core.arch import SMEM_BYTES, Arch
from flashinfer.ops.attention import variants
from flashinfer.ops.attention.device.factors import Factors
from flashinfer.ops.attention.device.hooks import hooks_of, traits_of
from flashinfer.ops.attention.device.planner import PLANNER_BLOCK, Requests, ScheduleTables, planner_kernel
from flashinfer.ops.attention.spec import AttentionSpec
from flashinfer.ops.attention.triton.configs import block_m_for, choose, planner_config
from flashinfer.ops.attention.triton.kernel import Outputs, Partials, Queries, attention_kernel
from flashinfer.ops.attention.triton.tiles import Pages
from flashinfer.ops.attention.variant import Variant
from flashinfer.testing.gate import AMD_ARCHS, NVIDIA_ARCHS, Constant, GateCase, case_of

# AMD GPUs have 64 KiB of shared memory a workgroup (CDNA 3 ISA guide); the other numbers do not enter a compilation.
AMD = {name: Arch(name, 304, 65_536) for name in AMD_ARCHS}
ARCHS = {name: Arch(name, 132, SMEM_BYTES[name]) for name in NVIDIA_ARCHS} | AMD


class Problem(NamedTuple):
    """One compiled path. rows: queries of a request; 0 = a uniform single query (decode)."""

    name: str
    variant: Variant
    rows: int = 0
    paged: bool = True
    head_dims: tuple[int, int] = (128, 128)
    q_dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    archs: tuple[str, ...] = NVIDIA_ARCHS

    def spec(self) -> AttentionSpec:
        kv_dtype = self.kv_dtype or self.q_dtype
        page_size = 16 if self.paged else 1
        dtypes = (self.q_dtype, kv_dtype, self.q_dtype)
        return AttentionSpec(32, 8, *self.head_dims, page_size, self.paged, *dtypes, 1 if self.rows == 0 else None)


def _problems() -> Iterator[Problem]:
    plain, causal = Variant(), variants.causal()
    meta = torch.empty(0)
    mask = variants.custom_mask(meta.to(torch.uint8), meta.to(torch.int32))
    everything = variants.rope(1.0, 1e4, 128) & variants.soft_cap(30.0) & variants.alibi(meta) & mask
    yield Problem("decode", plain, archs=NVIDIA_ARCHS + AMD_ARCHS)
    yield Problem("decode_window_cap", variants.soft_cap(30.0) & variants.sliding_window(100))
    yield Problem("decode_fp8", plain, kv_dtype=torch.float8_e4m3fn, archs=("sm89", "sm90", "sm100", "sm120"))
    yield Problem("decode_d80_fp16", plain, head_dims=(80, 80), q_dtype=torch.float16)
    yield Problem("decode_d512", plain, head_dims=(512, 512))
    yield Problem("append", causal, rows=8)
    yield Problem("prefill_paged", causal, rows=4096, archs=NVIDIA_ARCHS + AMD_ARCHS)
    yield Problem("prefill_ragged", causal, rows=4096, paged=False)
    yield Problem("prefill_d64", plain, rows=4096, paged=False, head_dims=(64, 64))
    yield Problem("prefill_d256", causal, rows=4096, head_dims=(256, 256))
    yield Problem("prefill_d192_128", causal, rows=4096, paged=False, head_dims=(192, 128))
    yield Problem("prefill_fp32", causal, rows=64, q_dtype=torch.float32, archs=("sm80", "sm90"))
    yield Problem("everything", everything & variants.sliding_window(100), rows=4096, archs=("sm80", "sm90", "sm120"))


def cases() -> Iterator[GateCase]:
    """Planner and attention kernels of every problem, on the architectures it names."""
    for problem in _problems():
        spec = problem.spec()
        for name in problem.archs:
            traits = traits_of(problem.variant)
            arch = ARCHS[name]
            launch = choose(spec, arch, traits, block_m_for(spec, arch, traits, problem.rows or 1))
            options = {"num_warps": launch.num_warps}
            arguments = _attention_arguments(spec, problem.variant) | {"cfg": Constant(launch.kernel)}
            yield case_of(
                f"attention.{problem.name}.{name}", attention_kernel, arguments, options=options, archs=(name,)
            )
            if problem.name in ("decode", "prefill_paged"):
                arguments = _planner_arguments(spec, problem.variant, planner_config(launch.kernel))
                yield case_of(
                    f"planner.{problem.name}.{name}",
                    planner_kernel,
                    arguments,
                    options={"num_warps": 8},
                    archs=(name,),
                )


def _pointer(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype)


def _attention_arguments(spec: AttentionSpec, variant: Variant) -> dict[str, Any]:
    q, kv, out = _pointer(spec.q_dtype), _pointer(spec.kv_dtype), _pointer(spec.o_dtype)
    fp32, int32 = _pointer(torch.float32), _pointer(torch.int32)
    return {
        "queries": Queries(q, 16, 16),
        "pages": Pages(kv, kv, int32 if spec.paged else None, *[16] * 6),
        "outputs": Outputs(out, 16, 16, fp32, 16),
        "tables": _tables(),
        "partials": Partials(fp32, fp32, int32),
        "hooks": hooks_of(variant),
        "factors": Factors(1.0, 1.0, None, 0, None, 0, None),
    }


def _planner_arguments(spec: AttentionSpec, variant: Variant, cfg: Any) -> dict[str, Any]:
    int32 = _pointer(torch.int32)
    return {
        "requests": Requests(None if spec.uniform_qo_len else int32, int32, int32),
        "tables": _tables(),
        "bounds": hooks_of(variant).bounds,
        **dict.fromkeys(("batch_size", "total_rows", "num_programs"), 7),
        "cfg": Constant(cfg),
        "QO_LEN": Constant(spec.uniform_qo_len or 0),
        "BLOCK": Constant(PLANNER_BLOCK),
    }


def _tables() -> ScheduleTables:
    int64 = _pointer(torch.int64)
    return ScheduleTables(int64, int64, int64, _pointer(torch.int32))
