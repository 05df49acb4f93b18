"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from flashinfer.core.arch import Arch
from flashinfer.ops.page.spec import AppendSpec
from flashinfer.ops.page.triton.kernel import (
    Data,
    Divisor,
    PageStrides,
    RowStrides,
    Table,
    append_kernel,
    batch_indices_kernel,
    seq_lens_kernel,
)
from flashinfer.ops.page.triton.launch import INDEX_BLOCK, NUM_WARPS, configure
from flashinfer.testing.gate import ALL_ARCHS, GateCase

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8"}
# What converts to fp8 by itself, and what does not (`Arch.converts_to_fp8`).
NATIVE_ARCHS = ("sm90", "sm100", "sm120")
OTHER_ARCHS = tuple(arch for arch in ALL_ARCHS if arch not in NATIVE_ARCHS)

SPECS = {
    "bf16": AppendSpec(8, 128, 128, 16, torch.bfloat16, torch.bfloat16),
    "fp32_odd": AppendSpec(3, 72, 72, 16, torch.float32, torch.float32),
    "fp16_to_e4m3": AppendSpec(8, 128, 128, 16, torch.float16, torch.float8_e4m3fn),
    "bf16_to_e5m2": AppendSpec(8, 64, 64, 16, torch.bfloat16, torch.float8_e5m2),
    "bf16_qk_vo": AppendSpec(1, 192, 128, 16, torch.bfloat16, torch.bfloat16),
    "mla": AppendSpec(1, 512, 64, 64, torch.bfloat16, torch.bfloat16),
    "wide": AppendSpec(32, 256, 256, 16, torch.float16, torch.float16),
    "slots_e4m3_scaled": AppendSpec(8, 128, 128, 16, torch.bfloat16, torch.float8_e4m3fn, True, True),
    "slots_int8_scaled": AppendSpec(8, 128, 128, 16, torch.bfloat16, torch.int8, True, True),
}


def _append(name: str, spec: AppendSpec, archs: tuple[str, ...]) -> GateCase:
    cfg, _ = configure(spec, Arch("sm90" if archs is NATIVE_ARCHS else "sm80", 132, 0))
    row, cache = TYPES[spec.row_dtype], TYPES.get(spec.cache_dtype, "u8")
    data = Data(*[f"*{row}"] * 2, *[f"*{cache}"] * 2)
    strides = (*[RowStrides("i32", "i32")] * 2, *[PageStrides("i64", "i32", "i32")] * 2)
    table = Table("*i64", *["constexpr"] * 3) if spec.slots else Table(*["*i32"] * 4)
    divisor = Divisor("fp32", "*fp32" if spec.scaled else "constexpr", "i32")
    arguments: dict[str, Any] = {"data": data, "strides": strides, "table": table}
    arguments |= {"k_divisor": divisor, "v_divisor": divisor}
    scalars = dict.fromkeys(("num_tokens", "num_heads", "page_size"), "i32")
    absent = {
        (i, j): None
        for i, fields in enumerate(arguments.values())
        for j, kind in enumerate(fields)
        if kind == "constexpr"
    }
    paths = [(0, j) for j in range(4)] + [(1, i, j) for i, part in enumerate(strides) for j in range(len(part))]
    paths += [(2, j) for j in range(4) if (2, j) not in absent]
    aligned = {path: [["tt.divisibility", 16]] for path in paths}
    return GateCase(
        name=f"append.{name}",
        kernel=append_kernel,
        signature={**arguments, **scalars, "cfg": "constexpr"},
        constexprs={**absent, "cfg": cfg},
        attrs=aligned,
        options={"num_warps": NUM_WARPS},
        archs=archs,
    )


def cases() -> Iterator[GateCase]:
    """Every dtype path and block shape of the append kernel, and the index kernels."""
    for name, spec in SPECS.items():
        if spec.code_dtype in (None, torch.int8):
            yield _append(name, spec, ALL_ARCHS)
        else:
            yield _append(name, spec, OTHER_ARCHS)
            yield _append(f"{name}.native", spec, NATIVE_ARCHS)
    pointers = dict.fromkeys(("batch_indices", "positions", "append_indptr", "seq_lens"), "*i32")
    signature = {**pointers, "num_tokens": "i32", "batch_size": "i32", "steps": "i32", "BLOCK": "constexpr"}
    constexprs = {"BLOCK": INDEX_BLOCK}
    yield GateCase("batch_indices", batch_indices_kernel, signature, constexprs, options={"num_warps": NUM_WARPS})
    pointers = dict.fromkeys(("out", "kv_indptr", "kv_last_page_len"), "*i32")
    signature = {**pointers, "batch_size": "i32", "page_size": "i32", "BLOCK": "constexpr"}
    constexprs = {"BLOCK": INDEX_BLOCK}
    yield GateCase("seq_lens", seq_lens_kernel, signature, constexprs, options={"num_warps": NUM_WARPS})
