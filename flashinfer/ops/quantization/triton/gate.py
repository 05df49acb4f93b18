"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashinfer.ops.quantization.triton import kernel as kernels
from flashinfer.ops.quantization.triton.kernel import Groups, Scales, Tokens
from flashinfer.ops.quantization.triton.launch import BLOCK_BYTES, NUM_WARPS, TILE, block_of, fp4_tile
from flashinfer.testing.gate import ALL_ARCHS, FP8_ARCHS, OTHER_ARCHS, GateCase

# name, mantissa bits, largest code, architectures, whether they convert to fp8
CODES = (
    ("e4m3", 3, 448.0, OTHER_ARCHS, False),
    ("e4m3.native", 3, 448.0, FP8_ARCHS, True),
    ("e5m2.native", 2, 57344.0, FP8_ARCHS, True),
    ("int8", 0, 127.0, ALL_ARCHS, False),
)


def _case(
    name: str, kernel: Any, arguments: dict[str, Any], constexprs: dict[str, Any], warps: int, archs: tuple[str, ...]
) -> GateCase:
    """Every pointer and 64-bit integer is a multiple of 16."""
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, kind in enumerate(arguments.values()):
        fields = enumerate(kind) if isinstance(kind, tuple) else ((None, kind),)
        for j, field in fields:
            if field.startswith("*") or field == "i64":
                aligned[(i,) if j is None else (i, j)] = [["tt.divisibility", 16]]
    signature = {**arguments, **dict.fromkeys(constexprs, "constexpr")}
    return GateCase(name, kernel, signature, constexprs, aligned, {"num_warps": warps}, archs)


def _quantize() -> Iterator[GateCase]:
    for name, mantissa_bits, limit, archs, native in CODES:
        code = "*u8" if mantissa_bits else "*i8"
        kind = {"MANTISSA_BITS": mantissa_bits, "NATIVE": native}
        for group_size in (128, 4096):
            block_groups, block, warps = block_of(group_size)
            moved = {"x": Groups("*bf16", "i64", "i64"), "out": Groups(code, "i64", "i64")}
            arguments = {**moved, "scales": Scales("*fp32", "i32", "i32")}
            arguments |= {"num_rows": "i32", "num_groups": "i32", "eps": "fp32"}
            tiles = {"BLOCK_GROUPS": block_groups, "BLOCK": block}
            constexprs = {"LIMIT": limit, "GROUP_SIZE": group_size, "POWER_OF_TWO": True, **kind, **tiles}
            label = f"quantize_groups.{name}.{group_size}"
            yield _case(label, kernels.quantize_groups_kernel, arguments, constexprs, warps, archs)
        arguments = {"x": "*bf16", "scale": "*fp32", "out": code, "num_elements": "i32"}
        constexprs = {**kind, "BLOCK": TILE}
        label = f"quantize_by_scale.{name}"
        yield _case(label, kernels.quantize_by_scale_kernel, arguments, constexprs, NUM_WARPS, archs)


def _dequantize() -> Iterator[GateCase]:
    for mantissa_bits, code in ((3, "*u8"), (2, "*u8"), (0, "*i8")):
        block_groups, block, warps = block_of(128)
        arguments = {"x": Groups(code, "i64", "i64"), "scales": Scales("*fp32", "i32", "i32")}
        arguments |= {"out": Groups("*bf16", "i64", "i64"), "num_rows": "i32", "num_groups": "i32"}
        constexprs = {"GROUP_SIZE": 128, "MANTISSA_BITS": mantissa_bits, "BLOCK_GROUPS": block_groups, "BLOCK": block}
        label = f"dequantize_groups.{mantissa_bits}"
        yield _case(label, kernels.dequantize_groups_kernel, arguments, constexprs, warps, ALL_ARCHS)
    for ue8m0, tile_rows, group_size in ((True, 128, 32), (False, 8, 16), (False, 1, 16)):
        arguments = {"x": "*u8", "scales": "*u8", "global_scale": "*fp32", "out": "*bf16"}
        arguments |= {"num_rows": "i32", "num_groups": "i32"}
        constexprs = {"GROUP_SIZE": group_size, "UE8M0": ue8m0, "TILE_ROWS": tile_rows}
        constexprs["BLOCK_GROUPS"] = TILE // group_size
        label = f"dequantize_fp4.{tile_rows}"
        yield _case(label, kernels.dequantize_fp4_kernel, arguments, constexprs, NUM_WARPS, ALL_ARCHS)


def _quantize_fp4() -> Iterator[GateCase]:
    for archs, tile_rows in ((FP8_ARCHS, 128), (OTHER_ARCHS, 8), (FP8_ARCHS, 1)):
        arguments = {"x": "*bf16", "global_scale": "*fp32", "out": "*u8", "scales": "*u8"}
        arguments |= {"num_rows": "i32", "num_groups": "i32"}
        constexprs = {"NATIVE": archs is FP8_ARCHS, "TILE_ROWS": tile_rows, "BLOCK_GROUPS": TILE // 16}
        yield _case(f"quantize_fp4.{tile_rows}", kernels.quantize_fp4_kernel, arguments, constexprs, NUM_WARPS, archs)


def _pages() -> Iterator[GateCase]:
    for head_dim, dtype in ((128, "*bf16"), (96, "*fp32")):
        block_dim, block_tokens = fp4_tile(head_dim)
        bytes_, out = Tokens("*u8", "i64", "i64", "i64"), Tokens(dtype, "i64", "i64", "i64")
        arguments = {"codes": bytes_, "scales": bytes_, "out": out, "global_scale": "*fp32", "table": "*i32"}
        arguments |= {"table_stride": "i32", "seq_lens": "*i32", "page_size": "i32", "max_tokens": "i32"}
        constexprs = {"HEAD_DIM": head_dim, "BLOCK_DIM": block_dim, "BLOCK_TOKENS": block_tokens}
        label = f"dequantize_fp4_pages.{head_dim}"
        yield _case(label, kernels.dequantize_fp4_pages_kernel, arguments, constexprs, NUM_WARPS, ALL_ARCHS)


def cases() -> Iterator[GateCase]:
    """Every kernel, in the kinds that are used."""
    yield from _quantize()
    yield from _dequantize()
    yield from _quantize_fp4()
    yield from _pages()
    arguments: dict[str, Any] = {"x": "*u8", "out": "*u8", "num_bits": "i32"}
    constexprs: dict[str, Any] = {"LITTLE": False, "BLOCK": BLOCK_BYTES}
    yield _case("packbits", kernels.packbits_kernel, arguments, constexprs, NUM_WARPS, ALL_ARCHS)
    arguments = {"x": "*u8", "indptr": "*i32", "byte_indptr": "*i32", "out": "*u8"}
    arguments |= {"num_bytes": "i32", "num_segments": "i32", "steps": "i32"}
    constexprs = {"LITTLE": True, "BLOCK": BLOCK_BYTES}
    yield _case("segment_packbits", kernels.segment_packbits_kernel, arguments, constexprs, NUM_WARPS, ALL_ARCHS)
    heads = Groups("*bf16", "i64", "i64")
    arguments = {"k": heads, "k_nope": heads, "k_rope": heads, "num_tokens": "i32", "num_heads": "i32"}
    constexprs = {"NOPE": 128, "ROPE": 64, "BLOCK_HEADS": 16, "BLOCK_NOPE": 128, "BLOCK_ROPE": 64}
    yield _case("concat_heads", kernels.concat_heads_kernel, arguments, constexprs, NUM_WARPS, ALL_ARCHS)
