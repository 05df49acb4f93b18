"""The append kernel: each program takes a few tokens and a block of their columns (heads and components together)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Rows(NamedTuple):
    """New keys or values `[nnz, num_kv_heads, head_dim]`, strides in elements."""

    data: torch.Tensor
    stride_token: int
    stride_head: int


class Pages(NamedTuple):
    """A cache `[pages, page_size, num_kv_heads, head_dim]`, strides in elements."""

    data: torch.Tensor
    stride_page: int
    stride_slot: int
    stride_head: int


class Table(NamedTuple):
    """Where each token goes; int32."""

    batch_indices: torch.Tensor
    positions: torch.Tensor
    indices: torch.Tensor
    indptr: torch.Tensor


@triton.jit
def encode_fp8(x, MANTISSA_BITS: tl.constexpr):
    """fp32 to the bytes of e4m3fn (3 mantissa bits) or e5m2 (2): nearest even, saturating, NaN kept.

    Integer arithmetic: sm_80 has no instruction for e4m3, and the interpreter rounds as a GPU does.
    """
    LIMIT: tl.constexpr = 448.0 if MANTISSA_BITS == 3 else 57344.0
    BIAS: tl.constexpr = 7 if MANTISSA_BITS == 3 else 15
    SHIFT: tl.constexpr = 23 - MANTISSA_BITS
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), LIMIT)
    bits = magnitude.to(tl.int32, bitcast=True)
    rounded = bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)
    normal = (rounded >> SHIFT) - ((127 - BIAS) << MANTISSA_BITS)
    # Below the smallest normal number the fp32 adder rounds: added to `ANCHOR`, the last place is one subnormal step.
    ANCHOR: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA_BITS)
    anchor = tl.full(x.shape, ANCHOR, tl.float32)
    subnormal = (magnitude + anchor).to(tl.int32, bitcast=True) - anchor.to(tl.int32, bitcast=True)
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
    code = tl.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    return (tl.where(x == x, code, 0x7F) | sign).to(tl.uint8)


@triton.jit
def copy_rows(rows, pages, offs_token, page, slot, mask_token, offs_col, num_heads, HEAD_DIM, FP8_MANTISSA_BITS):
    """Copy columns `offs_col` of tokens `offs_token` to their pages, converting to the cache's dtype."""
    head = (offs_col // HEAD_DIM)[None, :]
    dim = (offs_col % HEAD_DIM)[None, :]
    mask = mask_token[:, None] & (offs_col < num_heads * HEAD_DIM)[None, :]
    source = rows[0] + offs_token[:, None] * rows[1] + head * rows[2] + dim
    target = pages[0] + (page * pages[1] + slot * pages[2])[:, None] + head.to(tl.int64) * pages[3] + dim
    x = tl.load(source, mask=mask, other=0)
    if FP8_MANTISSA_BITS > 0:
        x = encode_fp8(x.to(tl.float32), FP8_MANTISSA_BITS)
    tl.store(target, x.to(pages[0].dtype.element_ty), mask=mask)


@triton.jit
def append_kernel(
    key,
    value,
    k_cache,
    v_cache,
    table,
    num_tokens,
    num_heads,
    page_size,
    HEAD_DIMS: tl.constexpr,
    FP8_MANTISSA_BITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Grid: (token blocks, column blocks). key, value: Rows; k_cache, v_cache: Pages; table: Table; HEAD_DIMS: of K, V.

    FP8_MANTISSA_BITS: 0 when the cache's dtype is not an fp8 to convert to. Offsets are 64-bit: page times stride, and
    token times stride, pass 2^31 elements.
    """
    offs_token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    offs_col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = offs_token < num_tokens
    request = tl.load(table[0] + offs_token, mask=mask, other=-1)
    mask = mask & (request >= 0)
    position = tl.load(table[1] + offs_token, mask=mask, other=0)
    entry = tl.load(table[3] + request, mask=mask, other=0) + position // page_size
    page = tl.load(table[2] + entry, mask=mask, other=0).to(tl.int64)
    slot = (position % page_size).to(tl.int64)
    copy_rows(key, k_cache, offs_token, page, slot, mask, offs_col, num_heads, HEAD_DIMS[0], FP8_MANTISSA_BITS)
    copy_rows(value, v_cache, offs_token, page, slot, mask, offs_col, num_heads, HEAD_DIMS[1], FP8_MANTISSA_BITS)
