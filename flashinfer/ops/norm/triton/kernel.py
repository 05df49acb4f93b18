"""The norm kernel: a program holds whole rows in registers, so each is read once."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from flashinfer.device.fp8 import to_fp8
from flashinfer.device.rows import row_pointers


@dataclass(frozen=True)
class NormConfig:
    """What a compiled form depends on.

    block: hidden_size rounded up to 2^n. rows: rows a program takes at a time. stages: rows on their way while others
    are worked on, 1 = none. flat: see `row_pointers`. mantissa_bits: of the fp8 result, 0 if it is none.
    """

    hidden_size: int
    block: int
    rows: int
    stages: int
    flat: bool
    centred: bool
    weight_bias: float
    mantissa_bits: int
    native_fp8: bool


@triton.jit
def _mean(x, cfg: tl.constexpr):
    return tl.sum(x, 1)[:, None] / cfg.hidden_size


@triton.jit(do_not_specialize=["num_rows", "num_inner"])
def norm_kernel(out, input, residual, weight, shift, scale, num_rows, num_inner, eps, cfg: tl.constexpr):
    """Grid: any number of programs, which take turns over blocks of `cfg.rows` rows.

    out, input, residual: Rows; residual, shift, scale: None where there is none. num_inner: see `row_pointers`.
    """
    offs_col = tl.arange(0, cfg.block)
    mask_col = offs_col < cfg.hidden_size
    w = tl.load(weight + offs_col, mask=mask_col, other=0.0)
    if shift is not None:
        b = tl.load(shift + offs_col, mask=mask_col, other=0.0)
    if scale is not None:
        inverse = 1.0 / tl.load(scale)
    num_blocks = tl.cdiv(num_rows, cfg.rows)
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=cfg.stages):
        row = block * cfg.rows + tl.arange(0, cfg.rows)
        mask = (row < num_rows)[:, None] & mask_col[None, :]
        pointers = row_pointers(input, row, num_inner, cfg.flat) + offs_col[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            pointers = row_pointers(residual, row, num_inner, cfg.flat) + offs_col[None, :]
            x += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            tl.store(pointers, x.to(residual.data.dtype.element_ty), mask=mask)
        if cfg.centred:
            x = tl.where(mask_col[None, :], x - _mean(x, cfg), 0.0)
            x = tl.where(mask_col[None, :], x - _mean(x, cfg), 0.0)  # takes the rounding of the mean back out
        y = x * tl.rsqrt(_mean(x * x, cfg) + eps) * (w.to(tl.float32) + cfg.weight_bias)[None, :]
        if shift is not None:
            y += b.to(tl.float32)[None, :]
        if scale is not None:
            y *= inverse
        pointers = row_pointers(out, row, num_inner, cfg.flat) + offs_col[None, :]
        if cfg.mantissa_bits > 0:
            tl.store(pointers, to_fp8(y, cfg.mantissa_bits, cfg.native_fp8), mask=mask)
        else:
            tl.store(pointers, y.to(out.data.dtype.element_ty), mask=mask)
