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
    append_fp4_kernel,
    append_kernel,
    batch_indices_kernel,
    seq_lens_kernel,
)
from flashinfer.ops.page.triton.launch import INDEX_BLOCK, NUM_WARPS, configure, fp4_tile
from flashinfer.testing.gate import ALL_ARCHS, FP8_ARCHS, OTHER_ARCHS, SPELLED, GateCase

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
    cfg, _ = configure(spec, Arch("sm90" if archs is FP8_ARCHS else "sm80", 132, 0))
    row, cache = SPELLED[spec.row_dtype], SPELLED[spec.cache_dtype]
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


def _append_fp4(name: str, slots: bool, archs: tuple[str, ...]) -> GateCase:
    block_tokens, block_groups = fp4_tile(8 * 8)
    strides = (RowStrides("i32", "i32"), *[PageStrides("i64", "i32", "i32")] * 2)
    table = Table("*i64", *["constexpr"] * 3) if slots else Table(*["*i32"] * 4)
    signature: dict[str, Any] = {"rows": "*bf16", "codes": "*u8", "scales": "*u8", "strides": strides, "table": table}
    signature |= {"global_scale": "fp32", **dict.fromkeys(("num_tokens", "num_groups", "page_size"), "i32")}
    constexprs: dict[Any, Any] = {"HEAD_GROUPS": 8, "NATIVE": archs is FP8_ARCHS}
    constexprs |= {"BLOCK_TOKENS": block_tokens, "BLOCK_GROUPS": block_groups}
    signature |= dict.fromkeys(constexprs, "constexpr")
    absent: dict[Any, Any] = {(4, j): None for j in (1, 2, 3)} if slots else {}
    options = {"num_warps": NUM_WARPS}
    return GateCase(name, append_fp4_kernel, signature, constexprs | absent, options=options, archs=archs)


def cases() -> Iterator[GateCase]:
    """Every dtype path and block shape of the append kernel, and the index kernels."""
    for name, spec in SPECS.items():
        if spec.code_dtype in (None, torch.int8):
            yield _append(name, spec, ALL_ARCHS)
        else:
            yield _append(name, spec, OTHER_ARCHS)
            yield _append(f"{name}.native", spec, FP8_ARCHS)
    for slots in (False, True):
        name = "append_fp4.slots" if slots else "append_fp4"
        yield _append_fp4(name, slots, OTHER_ARCHS)
        yield _append_fp4(f"{name}.native", slots, FP8_ARCHS)
    pointers = dict.fromkeys(("batch_indices", "positions", "append_indptr", "seq_lens"), "*i32")
    signature = {**pointers, "num_tokens": "i32", "batch_size": "i32", "steps": "i32", "BLOCK": "constexpr"}
    constexprs = {"BLOCK": INDEX_BLOCK}
    yield GateCase("batch_indices", batch_indices_kernel, signature, constexprs, options={"num_warps": NUM_WARPS})
    pointers = dict.fromkeys(("out", "kv_indptr", "kv_last_page_len"), "*i32")
    signature = {**pointers, "batch_size": "i32", "page_size": "i32", "BLOCK": "constexpr"}
    constexprs = {"BLOCK": INDEX_BLOCK}
    yield GateCase("seq_lens", seq_lens_kernel, signature, constexprs, options={"num_warps": NUM_WARPS})
