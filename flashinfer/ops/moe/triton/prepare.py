"""Rows on their way to a product: brought into the order of experts, in e4m3 with a scale for every 128 columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.early import let_next_launch_begin, wait_for_launch_before
from flashinfer.device.fp8 import to_fp8


@dataclass(frozen=True)
class RowsConfig:
    """rows, columns: of a program. quantise: to e4m3 with a scale for its columns, else copied. early: see
    `device/early`."""

    rows: int
    columns: int
    quantise: bool
    native_fp8: bool
    early: bool


class Gathered(NamedTuple):
    """tokens: int32 `[pairs]`, where each row comes from; count: int32, one element: rows there are. None: all rows."""

    tokens: torch.Tensor | None
    count: torch.Tensor | None


@triton.jit
def quantised(x, NATIVE: tl.constexpr):
    """Codes (bytes) and fp32 scales of x fp32 `[rows, columns]`: largest |x| of a row / 448, 1 for a row of zeros."""
    scale = tl.div_rn(tl.max(tl.abs(x), 1), 448.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    return to_fp8(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)), 3, NATIVE), scale


@triton.jit(do_not_specialize=["num_rows"])
def rows_kernel(out, scales, x, gathered, num_rows, width, stride, cfg: tl.constexpr):
    """Grid: (blocks of rows, of columns). out: `[rows, width]`, of x's dtype or bytes of e4m3.

    scales: fp32 `[rows, blocks]`. x: `stride` elements a row.
    """
    row = (tl.program_id(0) * cfg.rows + tl.arange(0, cfg.rows)).to(tl.int64)
    offs = tl.program_id(1) * cfg.columns + tl.arange(0, cfg.columns)
    wait_for_launch_before(cfg.early)
    let_next_launch_begin(cfg.early)
    source = row
    if gathered.tokens is not None:
        exists = row < tl.load(gathered.count)
        source = tl.load(gathered.tokens + row, mask=exists, other=0).to(tl.int64)
    else:
        exists = row < num_rows
    mask = exists[:, None] & (offs < width)[None, :]
    tile = tl.load(x + source[:, None] * stride + offs[None, :], mask=mask, other=0)
    to = out + row[:, None] * width + offs[None, :]
    if cfg.quantise:
        code, scale = quantised(tile.to(tl.float32), cfg.native_fp8)
        tl.store(to, code, mask=mask)
        tl.store(scales + row * tl.num_programs(1) + tl.program_id(1), scale, mask=exists)
    else:
        tl.store(to, tile, mask=mask)


@triton.jit(do_not_specialize=["first"])
def cast_kernel(out, hidden, scale, ids, order, count, width, first, scale_stride, cfg: tl.constexpr):
    """Grid: as `rows_kernel`. out: bytes of e4m3 of `hidden` fp32 `[rows, width]` times the scale of the row's expert.

    order: int32, the pair of each row, an index into ids; count: int32, one element: rows there are.
    """
    row = (tl.program_id(0) * cfg.rows + tl.arange(0, cfg.rows)).to(tl.int64)
    offs = tl.program_id(1) * cfg.columns + tl.arange(0, cfg.columns)
    exists = row < tl.load(count)
    pair = tl.load(order + row, mask=exists, other=0)
    expert = tl.load(ids + pair, mask=exists, other=0) - first
    factor = tl.load(scale + expert * scale_stride, mask=exists, other=0.0)
    mask = exists[:, None] & (offs < width)[None, :]
    at = row[:, None] * width + offs[None, :]
    value = tl.load(hidden + at, mask=mask, other=0.0) * factor[:, None]
    tl.store(out + at, to_fp8(value, 3, cfg.native_fp8), mask=mask)
