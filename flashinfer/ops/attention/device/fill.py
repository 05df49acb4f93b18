"""Rows that belong to no request: 0 in the output, -inf in the lse, without writing all the others twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flashinfer.core.launch import Prebound, alignment

NUM_PROGRAMS = 64
BLOCK = 1024


@triton.jit(do_not_specialize=["batch_size", "rows", "row_size", "heads"])
def fill_kernel(out, lse, qo_indptr, batch_size, rows, row_size, heads, BLOCK: tl.constexpr):
    """Fill the rows before the first request's and after the last one's; out, lse (or None) are contiguous."""
    first = tl.load(qo_indptr)
    last = tl.load(qo_indptr + batch_size)
    outside = tl.maximum(rows - last, 0) + first
    for place in range(tl.program_id(0), outside, tl.num_programs(0)):
        row = tl.where(place < first, place, last + place - first).to(tl.int64)
        for base in range(0, row_size, BLOCK):
            offs = base + tl.arange(0, BLOCK)
            tl.store(out + row * row_size + offs, 0.0, mask=offs < row_size)
        if lse is not None:
            for base in range(0, heads, BLOCK):
                offs = base + tl.arange(0, BLOCK)
                tl.store(lse + row * heads + offs, float("-inf"), mask=offs < heads)


_launch = Prebound(fill_kernel)


def fill_uncovered(out: torch.Tensor, lse: torch.Tensor | None, qo_indptr: torch.Tensor) -> None:
    """out `[rows, heads, dim]` and lse `[rows, heads]`, contiguous; qo_indptr int32 `[batch + 1]`, all on one GPU."""
    rows, heads, dim = out.shape
    _launch(
        (NUM_PROGRAMS, 1, 1),
        (out.dtype, lse is None, alignment(out, lse, qo_indptr)),
        (out, lse, qo_indptr, qo_indptr.numel() - 1, rows, heads * dim, heads, BLOCK),
        out.device,
        num_warps=4,
    )
