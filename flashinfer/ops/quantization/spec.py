"""The kinds of conversion between numbers and 8 or 4 bits: host values only."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch


class SfLayout(IntEnum):
    """Order of the scales of fp4 blocks: in tiles of 128 x 4 or 8 x 4 (rows x blocks), or row after row."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


class QuantSpec(NamedTuple):
    """One kind of call: its name, the dtype read, the dtype written."""

    call: str
    dtype: torch.dtype
    out_dtype: torch.dtype


class Fp4(NamedTuple):
    """How blocks of fp4 are scaled. group_size: elements a scale; ue8m0: scales are powers of two, else e4m3."""

    group_size: int
    ue8m0: bool
    layout: SfLayout


class Fp4Pages(NamedTuple):
    """A paged NVFP4 cache of keys or of values, NHD, innermost stride 1.

    codes: uint8 `[pages, page_size, num_heads, head_dim / 2]`. scales: e4m3, or its bytes, `[pages, page_size,
    num_heads, head_dim / 16]`. global_scale: fp32 of one element.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor


def scale_offset(row: torch.Tensor, column: torch.Tensor, num_columns: int, layout: SfLayout) -> torch.Tensor:
    """Where the scale of block `column` of `row` lies (cuBLAS manual, "1D block scaling factors layout")."""
    tiles = -(-num_columns // 4)
    if layout == SfLayout.layout_linear:
        return row * num_columns + column
    if layout == SfLayout.layout_8x4:
        return (row // 8 * tiles + column // 4) * 32 + row % 8 * 4 + column % 4
    return (row // 128 * tiles + column // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


def scales_needed(num_rows: int, num_columns: int, layout: SfLayout) -> int:
    """Bytes of scales for that many rows of blocks, padding of the tiles included."""
    rows = {SfLayout.layout_128x4: 128, SfLayout.layout_8x4: 8, SfLayout.layout_linear: 1}[layout]
    columns = 1 if layout == SfLayout.layout_linear else 4
    return -(-num_rows // rows) * rows * -(-num_columns // columns) * columns


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """Codes of fp32 numbers, uint8: nearest even, saturating; NaN gives 6."""
    magnitude = x.abs().nan_to_num(nan=6.0).clamp(max=6.0)
    # A step is 0.5 below 2, 1 below 4, then 2; round() takes ties to even, and even multiples have even codes.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = (magnitude / step).round() * step
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=x.device)
    code = torch.searchsorted(values, rounded)
    return (code + 8 * (torch.signbit(x) & ~x.isnan())).to(torch.uint8)
