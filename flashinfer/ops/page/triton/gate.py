"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator

from flashinfer.ops.page.triton.kernel import append_kernel
from flashinfer.ops.page.triton.launch import block_shape
from flashinfer.testing.gate import GateCase

# name, dtype of the rows, of the cache, KV heads, head dims of K and V, fp8 mantissa bits
CASES = (
    ("bf16", "bf16", "bf16", 8, (128, 128), 0),
    ("fp32_odd", "fp32", "fp32", 3, (72, 72), 0),
    ("fp16_to_e4m3", "fp16", "u8", 8, (128, 128), 3),
    ("bf16_to_e5m2", "bf16", "u8", 8, (64, 64), 2),
    ("bf16_qk_vo", "bf16", "bf16", 1, (192, 128), 0),
    ("wide", "fp16", "fp16", 32, (256, 256), 0),
)


def cases() -> Iterator[GateCase]:
    """Every dtype path and block shape of the append kernel."""
    for name, row_dtype, cache_dtype, num_kv_heads, head_dims, mantissa_bits in CASES:
        block_tokens, block_cols = block_shape(num_kv_heads * max(head_dims))
        rows, pages = (f"*{row_dtype}", "i32", "i32"), (f"*{cache_dtype}", "i64", "i32", "i32")
        arguments = {"key": rows, "value": rows, "k_cache": pages, "v_cache": pages, "table": ("*i32",) * 4}
        scalars = dict.fromkeys(("num_tokens", "num_heads", "page_size"), "i32")
        constexprs = {
            "HEAD_DIMS": head_dims,
            "FP8_MANTISSA_BITS": mantissa_bits,
            "BLOCK_TOKENS": block_tokens,
            "BLOCK_COLS": block_cols,
        }
        aligned = [(i, j) for i, fields in enumerate(arguments.values()) for j in range(len(fields))]
        yield GateCase(
            name=f"append.{name}",
            kernel=append_kernel,
            signature={**arguments, **scalars, **dict.fromkeys(constexprs, "constexpr")},
            constexprs=constexprs,
            attrs={path: [["tt.divisibility", 16]] for path in aligned},
            options={"num_warps": 4},
        )
