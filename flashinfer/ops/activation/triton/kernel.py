"""The gated-activation kernel: each program takes a tile of rows and columns."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from flashinfer.device.activation import gelu, silu
from flashinfer.device.fp8 import to_fp8
from flashinfer.device.rows import row_pointers


@dataclass(frozen=True)
class GatedConfig:
    """What a compiled form depends on, besides the activation.

    width: columns of the result. rows, cols: of a tile. flat: see `row_pointers`. mantissa_bits: of the fp8 result, 0
    if it is none.
    """

    width: int
    rows: int
    cols: int
    flat: bool
    mantissa_bits: int
    native_fp8: bool


@triton.jit
def gelu_tanh(x):
    """(1 + tanh(u)) / 2 = sigmoid(2 u)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}


@triton.jit(do_not_specialize=["num_rows", "num_inner"])
def gated_kernel(out, input, scale, num_rows, num_inner, activation: tl.constexpr, cfg: tl.constexpr):
    """Grid: row blocks times column blocks, columns first. out, input: Rows; scale: None where there is none."""
    COL_BLOCKS: tl.constexpr = (cfg.width + cfg.cols - 1) // cfg.cols
    offs_row = tl.program_id(0) // COL_BLOCKS * cfg.rows + tl.arange(0, cfg.rows)
    offs_col = tl.program_id(0) % COL_BLOCKS * cfg.cols + tl.arange(0, cfg.cols)
    mask = (offs_row < num_rows)[:, None] & (offs_col < cfg.width)[None, :]
    pointers = row_pointers(input, offs_row, num_inner, cfg.flat) + offs_col[None, :]
    # Nobody reads the input again, so the caches are left to others.
    x = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    y = tl.load(pointers + cfg.width, mask=mask, other=0.0, eviction_policy="evict_first")
    y = activation(x.to(tl.float32)) * y.to(tl.float32)
    if scale is not None:
        y *= 1.0 / tl.load(scale)
    pointers = row_pointers(out, offs_row, num_inner, cfg.flat) + offs_col[None, :]
    if cfg.mantissa_bits > 0:
        tl.store(pointers, to_fp8(y, cfg.mantissa_bits, cfg.native_fp8), mask=mask)
    else:
        tl.store(pointers, y.to(out.data.dtype.element_ty), mask=mask)
