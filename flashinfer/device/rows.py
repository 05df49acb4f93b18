"""Row-by-row access to tensors whose rows lie in one or two strided dimensions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Rows(NamedTuple):
    """Rows `[outer, inner, width]`, strides in elements, the last 1 (`core/rows.py`)."""

    data: torch.Tensor
    stride_outer: int
    stride_inner: int


@triton.jit
def row_pointers(rows, row, num_inner, FLAT: tl.constexpr):
    """Pointers `[n, 1]` to the first elements of rows `row` `[n]`; 64-bit, since row times stride passes 2^31."""
    if FLAT:
        offset = row.to(tl.int64) * rows.stride_inner
    else:
        offset = (row // num_inner).to(tl.int64) * rows.stride_outer + (row % num_inner).to(
            tl.int64
        ) * rows.stride_inner
    return rows.data + offset[:, None]
