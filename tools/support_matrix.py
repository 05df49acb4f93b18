"""Writes docs/support.md from the tables that choose implementations at run time.

`python -m tools.support_matrix [--check]`: --check writes nothing and exits 1 when the file is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flashinfer.core.arch import CPU, SMEM_BYTES, Arch
from flashinfer.core.select import Impl
from flashinfer.ops import (
    activation,
    alltoall,
    attention,
    collectives,
    gemm,
    merge,
    moe,
    norm,
    page,
    quantization,
    rope,
    routing,
    sampling,
)
from flashinfer.ops.activation import GatedSpec
from flashinfer.ops.alltoall import CombineSpec, DispatchSpec, Row
from flashinfer.ops.attention.spec import AttentionSpec
from flashinfer.ops.collectives import CollectiveSpec
from flashinfer.ops.gemm import Epilogue, Gemm, Rows, Weights
from flashinfer.ops.moe import MoESpec
from flashinfer.ops.norm import NormSpec
from flashinfer.ops.page import AppendSpec
from flashinfer.ops.quantization import QuantSpec
from flashinfer.ops.rope import RopeSpec
from flashinfer.ops.routing import RoutingSpec
from flashinfer.ops.sampling.spec import RowSpec

PATH = Path(__file__).resolve().parents[1] / "docs" / "support.md"
# The release that comes with the torch on which the kernels were run and timed.
TRITON = "3.6.0"
ARCHS = (CPU, *(Arch(name, 132, smem, TRITON) for name, smem in SMEM_BYTES.items()))
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HEAD_DIMS = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attention_specs() -> Iterator[tuple[str, AttentionSpec]]:
    """One problem for each pair of dtypes and of head dims, of variants that do not rotate queries and keys."""
    pairs = [(q, kv) for q in FLOATS for kv in (q, *FP8)] + [(q, q) for q in FP8]
    for q, kv in pairs:
        for dims in HEAD_DIMS:
            name = f"{short(q)} q, {short(kv)} KV, head_dim {'/'.join(str(d) for d in dict.fromkeys(dims))}"
            out = q if q in FLOATS else torch.bfloat16
            yield name, AttentionSpec(32, 8, *dims, 16, True, q, kv, out)
    rotated = AttentionSpec(32, 8, 128, 128, 16, True, torch.bfloat16, torch.bfloat16, torch.bfloat16, rotates=True)
    yield "bfloat16, head_dim 128, rotated on the fly (ROPE_LLAMA)", rotated
    yield "bfloat16, head_dim 128, pages of 1", replace(rotated, rotates=False, page_size=1)
    yield "bfloat16, head_dim 128, decode", replace(rotated, rotates=False, uniform_qo_len=1)


def moe_specs() -> Iterator[tuple[str, MoESpec]]:
    """One mixture of each kind."""
    e4m3, half = torch.float8_e4m3fn, FLOATS[2]
    kinds = [("plain", d, d) for d in FLOATS]
    kinds += [("fp8_tensor", e4m3, e4m3), ("fp8_block", half, e4m3), ("mxfp4", half, torch.uint8)]
    for kind, dtype, weight_dtype in kinds:
        dtypes = (dtype, weight_dtype, half, torch.int32)
        name = f"{kind}: {short(dtype)} rows, {short(weight_dtype)} weights"
        yield name, MoESpec(kind, *dtypes, 256, 8, 7168, 2048, "swiglu", True, (False,) * 6, (1, 1))
    yield "more than 1024 experts a rank", MoESpec(kind, *dtypes, 1025, 8, 7168, 2048, "swiglu", True, (), (1, 1))


def collective_specs() -> Iterator[tuple[str, CollectiveSpec]]:
    """Sums over ranks, alone and with a norm, sums sent as fp8, and exchanges."""
    bf16 = torch.bfloat16
    yield "all-reduce, all-gather, reduce-scatter of any shape", CollectiveSpec("all_reduce", bf16, 4096, 2)
    for size, width in (("up to 16384", 16384), ("above", 16385)):
        name = f"all-reduce with RMSNorm, fp8 and fp4 codes or sums over experts, hidden_size {size}"
        yield name, CollectiveSpec("all_reduce", bf16, width, 2, False, True, 0.0)
    for group_size in (256, 96):
        spec = CollectiveSpec("all_reduce_fp8", bf16, 4096, 2, True, group_size=group_size)
        yield f"all-reduce sent as fp8, groups of {group_size}", spec
    yield "more than 16 ranks", CollectiveSpec("all_reduce", bf16, 4096, 17)
    far = "rank 1 is on another host than rank 0"
    yield "ranks that do not reach each other's memory", CollectiveSpec("all_reduce", bf16, 4096, 2, unreachable=far)


def alltoall_specs() -> Iterator[tuple[str, object]]:
    """Dispatches and combines within the kernels' bounds, and beyond each of them."""
    bf16, rows = torch.bfloat16, (Row(3584, 4),)
    yield "dispatch, rows of any dtypes up to 128 KiB", DispatchSpec(8, 256, 8, rows)
    for dtype in FLOATS:
        yield f"combine, {short(dtype)}, hidden_size up to 16384", CombineSpec(8, 7168, dtype, dtype)
    yield "dispatch, longer rows", DispatchSpec(8, 256, 8, (Row(32769, 4),))
    yield "dispatch, top_k above 64", DispatchSpec(8, 256, 65, rows)
    yield "combine, longer rows", CombineSpec(8, 16385, bf16, bf16)
    yield "more than 16 ranks", DispatchSpec(17, 272, 8, rows)
    yield "GPUs that do not reach each other's memory", DispatchSpec(8, 256, 8, rows, -1, "rank 1 is on another host")


def gemm_specs() -> Iterator[tuple[str, object]]:
    """A grouped product of each kind of operands."""
    bf16, e4m3, uint8 = torch.bfloat16, torch.float8_e4m3fn, torch.uint8
    kinds = [(short(dtype), "plain", dtype, dtype) for dtype in FLOATS]
    kinds += [("float8 with one scale", "fp8_tensor", e4m3, e4m3), ("float8 in blocks", "fp8_block", e4m3, e4m3)]
    kinds += [(f"bfloat16 rows, {kind} weights", kind, bf16, uint8) for kind in ("mxfp4", "nvfp4")]
    indptr = torch.zeros(9, dtype=torch.int32)
    for name, kind, dtype, weight_dtype in kinds:
        depth = 256 // (1 if weight_dtype != uint8 else 2)
        rows = Rows(torch.empty(64, 256, dtype=dtype), indptr)
        weights = Weights(torch.empty(8, 256, depth, dtype=weight_dtype), kind=kind)
        out_dtype = dtype if dtype in FLOATS else bf16
        yield name, Gemm(torch.empty(64, 256, dtype=out_dtype), rows, weights, Epilogue()).spec


def cell(impls: Sequence[Impl], spec: object, arch: Arch, refusals: dict[str, None]) -> str:
    """The names of the rows that accept, in the order "auto" tries them."""
    accepted = []
    for impl in impls:
        reason = impl.supports(spec, arch)
        if reason is None:
            accepted.append(impl.name)
        else:
            refusals[f"{impl.name} on {arch.name}: {reason}"] = None
    return ", ".join(accepted)


def table(title: str, impls: Sequence[Impl], specs: Iterable[tuple[str, object]]) -> Iterator[str]:
    """A markdown table of problems against architectures; problems that are alike share a line."""
    refusals: dict[str, None] = {}
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, spec in specs:
        lines.setdefault(tuple(cell(impls, spec, arch, refusals) for arch in ARCHS), []).append(name)
    yield f"## {title}\n"
    yield "| problem | " + " | ".join(arch.name for arch in ARCHS) + " |"
    yield "|---" * (len(ARCHS) + 1) + "|"
    for cells, names in lines.items():
        yield "| " + "<br>".join(names) + " | " + " | ".join(cells) + " |"
    yield ""
    yield from (f"- {reason}" for reason in refusals)
    yield ""


def document() -> str:
    """The whole file."""
    bf16, e4m3 = torch.bfloat16, torch.float8_e4m3fn
    dims = (32, 8, 128, 0, 0, 0)
    ropes: list[tuple[str, object]] = [
        (short(dtype), RopeSpec(*dims, False, dtype, dtype, True, False, False, False)) for dtype in FLOATS
    ]
    ropes += [(short(dtype), RopeSpec(*dims, False, FLOATS[2], dtype, True, False, True, False)) for dtype in FP8]
    codes: list[tuple[str, object]] = [
        (f"{short(dtype)} to {short(code)}", QuantSpec("quantize_groups", dtype, code))
        for dtype in FLOATS
        for code in (*FP8, torch.int8)
    ]
    norms: list[tuple[str, object]] = [
        (f"any dtype, fp8 results included, hidden_size {size}", NormSpec(width, bf16, bf16, e4m3, False, True, 0.0))
        for size, width in (("up to 16384", 16384), ("above", 16385))
    ]
    gated = [("any dtype, fp8 results included", GatedSpec("silu", 14336, bf16, e4m3))]
    append = [("any dtype, fp8 caches included", AppendSpec(8, 128, 128, 16, torch.bfloat16, torch.float8_e4m3fn))]
    rows = [
        ("float32, float16, bfloat16; vocabularies up to 2^23", RowSpec(128_256, torch.bfloat16)),
        ("top_k selection of at most 4096 numbers", RowSpec(128_256, torch.float32, 4096)),
        ("top_k selection of more", RowSpec(128_256, torch.float32, 4097)),
    ]
    parts = [
        "# What runs where\n",
        "Generated by `python -m tools.support_matrix` from the tables that choose implementations. Each cell lists",
        'the rows that accept, in the order `backend="auto"` tries them (on the CPU "auto" is torch). Only sm90 was',
        "run and timed; for the other GPU architectures every kernel is compiled in CI.\n",
        *table("Attention: append and prefill (decode as marked); every variant", attention.IMPLS, attention_specs()),
        *table("Merging of attention states", merge.IMPLS, [("float32, float16, bfloat16", None)]),
        *table("append_paged_kv_cache", page.IMPLS, append),
        *table(
            "RoPE: in place, to new tensors, to fp8, to a paged cache, after RMSNorm of the heads", rope.IMPLS, ropes
        ),
        *table("Masks to bits; fp8, int8 and fp4", quantization.IMPLS, codes),
        *table(
            "Routing to experts", routing.IMPLS, [("every method", RoutingSpec(256, 8, num_groups=8, topk_groups=4))]
        ),
        *table("Mixture of experts", moe.IMPLS, moe_specs()),
        *table("All-to-all of expert parallelism", alltoall.IMPLS, alltoall_specs()),
        *table("Norms", norm.IMPLS, norms),
        *table("Gated activations", activation.IMPLS, gated),
        *table("Grouped products", gemm.IMPLS, gemm_specs()),
        *table("Collectives of ranks", collectives.IMPLS, collective_specs()),
        *table("Sampling, filters, speculation, top_k", sampling.IMPLS, rows),
    ]
    return "\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    text = document()
    if "--check" in arguments:
        if not PATH.exists() or PATH.read_text() != text:
            print(f"{PATH} is out of date: run python -m tools.support_matrix", file=sys.stderr)
            return 1
        return 0
    PATH.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
