"""Kernels between numbers and few bits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.decode import decode_e2m1, decode_fp8, decode_ue8m0
from flashinfer.device.fp8 import encode_e2m1, to_fp8, to_int8
from flashinfer.device.search import upper_bound


class Groups(NamedTuple):
    """Data `[rows, groups, group_size]`, strides in elements, the last 1."""

    data: torch.Tensor
    stride_row: int
    stride_group: int


class Scales(NamedTuple):
    """Scales `[rows, groups]`, strides in elements."""

    data: torch.Tensor
    stride_row: int
    stride_group: int


@triton.jit
def bytes_of(bits, LITTLE: tl.constexpr):
    """uint8 `[n]` of 0 and 1 `[n, 8]`."""
    place = tl.arange(0, 8)
    if not LITTLE:
        place = 7 - place
    return tl.sum(bits << place[None, :], axis=1).to(tl.uint8)


@triton.jit(do_not_specialize=["num_bits"])
def packbits_kernel(x, out, num_bits, LITTLE: tl.constexpr, BLOCK: tl.constexpr):
    """Bytes of a mask `[num_bits]`."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bit = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bits = tl.load(x + bit, mask=bit < num_bits, other=0) != 0
    tl.store(out + byte, bytes_of(bits.to(tl.int32), LITTLE), mask=byte * 8 < num_bits)


@triton.jit(do_not_specialize=["num_bytes", "num_segments", "steps"])
def segment_packbits_kernel(
    x, indptr, byte_indptr, out, num_bytes, num_segments, steps, LITTLE: tl.constexpr, BLOCK: tl.constexpr
):
    """Bytes of segments, each starting on a byte; 0 past the last."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = byte < num_bytes
    segment = upper_bound(byte_indptr + 1, num_segments, byte, mask, steps)
    inside = mask & (segment < num_segments)
    begin = tl.load(indptr + segment, mask=inside, other=0).to(tl.int64)
    end = tl.load(indptr + segment + 1, mask=inside, other=0)
    first = begin + 8 * (byte - tl.load(byte_indptr + segment, mask=inside, other=0))
    bit = first[:, None] + tl.arange(0, 8)[None, :]
    bits = tl.load(x + bit, mask=inside[:, None] & (bit < end[:, None]), other=0) != 0
    tl.store(out + byte, bytes_of(bits.to(tl.int32), LITTLE), mask=mask)


@triton.jit
def encode(x, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 to fp8, or to int8 without mantissa bits."""
    if MANTISSA_BITS == 0:
        return to_int8(x)
    else:
        return to_fp8(x, MANTISSA_BITS, NATIVE)


@triton.jit
def group_places(num_rows, num_groups, BLOCK_GROUPS: tl.constexpr):
    """(row, group, mask) of the groups of a program, numbered along rows."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    row = index // num_groups
    return row, index % num_groups, row < num_rows


@triton.jit(do_not_specialize=["num_rows"])
def quantize_groups_kernel(
    x,
    out,
    scales,
    num_rows,
    num_groups,
    eps,
    LIMIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of groups. x, out: Groups, scales: Scales; LIMIT: the largest code."""
    row, group, mask_group = group_places(num_rows, num_groups, BLOCK_GROUPS)
    offs = tl.arange(0, BLOCK)[None, :]
    mask = mask_group[:, None] & (offs < GROUP_SIZE)
    begin = row * x.stride_row + group * x.stride_group
    value = tl.load(x.data + begin[:, None] + offs, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(value == value, tl.abs(value), 0.0), axis=1)
    scale = tl.maximum(largest, eps)
    scale = tl.div_rn(scale, tl.full(scale.shape, LIMIT, tl.float32))
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    code = encode(tl.div_rn(value, tl.broadcast_to(scale[:, None], value.shape)), MANTISSA_BITS, NATIVE)
    begin = row * out.stride_row + group * out.stride_group
    tl.store(out.data + begin[:, None] + offs, code, mask=mask)
    tl.store(scales.data + row * scales.stride_row + group * scales.stride_group, scale, mask=mask_group)


@triton.jit(do_not_specialize=["num_elements"])
def quantize_by_scale_kernel(
    x, scale, out, num_elements, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr
):
    """Everything over one scale."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    value = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32)
    value = tl.div_rn(value, tl.zeros_like(value) + tl.load(scale))
    tl.store(out + offs, encode(value, MANTISSA_BITS, NATIVE), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def dequantize_groups_kernel(
    x,
    scales,
    out,
    num_rows,
    num_groups,
    GROUP_SIZE: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: blocks of groups. x, out: Groups, scales: Scales."""
    row, group, mask_group = group_places(num_rows, num_groups, BLOCK_GROUPS)
    offs = tl.arange(0, BLOCK)[None, :]
    mask = mask_group[:, None] & (offs < GROUP_SIZE)
    begin = row * x.stride_row + group * x.stride_group
    code = tl.load(x.data + begin[:, None] + offs, mask=mask, other=0)
    scale = tl.load(scales.data + row * scales.stride_row + group * scales.stride_group, mask=mask_group, other=0.0)
    if MANTISSA_BITS == 0:
        value = code.to(tl.float32)
    else:
        value = decode_fp8(code, MANTISSA_BITS)
    begin = row * out.stride_row + group * out.stride_group
    target = out.data + begin[:, None] + offs
    tl.store(target, (value * scale[:, None]).to(out.data.dtype.element_ty), mask=mask)


@triton.jit
def scale_places(row, group, num_groups, TILE_ROWS: tl.constexpr):
    """`spec.scale_offset`. TILE_ROWS: rows of a tile of scales, 1 where they are linear."""
    tiles = (num_groups + 3) // 4
    if TILE_ROWS == 1:
        place = row * num_groups + group
    elif TILE_ROWS == 8:
        place = (row // 8 * tiles + group // 4) * 32 + row % 8 * 4 + group % 4
    else:
        place = (row // 128 * tiles + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    return place


@triton.jit(do_not_specialize=["num_rows"])
def quantize_fp4_kernel(
    x,
    global_scale,
    out,
    scales,
    num_rows,
    num_groups,
    NATIVE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """Grid: blocks of groups of 16. x, out contiguous; TILE_ROWS: as for `scale_places`."""
    row, group, mask_group = group_places(num_rows, num_groups, BLOCK_GROUPS)
    begin = (row * num_groups + group)[:, None]
    pairs = tl.arange(0, 8)[None, :]
    mask = mask_group[:, None]
    low = tl.load(x + begin * 16 + 2 * pairs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x + begin * 16 + 2 * pairs + 1, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.where(low == low, tl.abs(low), 0.0), tl.where(high == high, tl.abs(high), 0.0))
    largest = tl.max(largest, axis=1)
    wanted = tl.div_rn(largest, tl.full(largest.shape, 6.0, tl.float32))
    factor = tl.full(largest.shape, 1.0, tl.float32)
    if global_scale is not None:
        factor *= tl.load(global_scale)
    byte = to_fp8(factor * wanted, 3, NATIVE)
    stored = decode_fp8(byte, 3)
    divisor = tl.div_rn(tl.where(stored == 0.0, 1.0, stored), factor)
    divisor = tl.broadcast_to(divisor[:, None], low.shape)
    zero = (stored == 0.0)[:, None]
    low = encode_e2m1(tl.where(zero, 0.0, tl.div_rn(low, divisor)))
    high = encode_e2m1(tl.where(zero, 0.0, tl.div_rn(high, divisor)))
    tl.store(out + begin * 8 + pairs, (low | high << 4).to(tl.uint8), mask=mask)
    tl.store(scales + scale_places(row, group, num_groups, TILE_ROWS), byte, mask=mask_group)


@triton.jit(do_not_specialize=["num_rows"])
def dequantize_fp4_kernel(
    x,
    scales,
    global_scale,
    out,
    num_rows,
    num_groups,
    GROUP_SIZE: tl.constexpr,
    UE8M0: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """Grid: blocks of groups. x, out contiguous; TILE_ROWS: as for `scale_places`."""
    row, group, mask_group = group_places(num_rows, num_groups, BLOCK_GROUPS)
    byte = tl.load(scales + scale_places(row, group, num_groups, TILE_ROWS), mask=mask_group, other=0)
    if UE8M0:
        scale = decode_ue8m0(byte)
    else:
        scale = decode_fp8(byte, 3)
    if global_scale is not None:
        scale *= tl.load(global_scale)
    HALF: tl.constexpr = GROUP_SIZE // 2
    begin = (row * num_groups + group)[:, None]
    pairs = tl.load(x + begin * HALF + tl.arange(0, HALF)[None, :], mask=mask_group[:, None], other=0)
    value = tl.join(decode_e2m1(pairs & 15), decode_e2m1(pairs >> 4))
    value = tl.reshape(value, (BLOCK_GROUPS, GROUP_SIZE)) * scale[:, None]
    target = out + begin * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=mask_group[:, None])


class Tokens(NamedTuple):
    """Tokens `[outer, tokens, heads, width]`, strides in elements, the last 1; outer: pages, or requests."""

    data: torch.Tensor
    stride_outer: int
    stride_token: int
    stride_head: int


@triton.jit
def token_pointers(tokens, outer, token, head):
    """Pointers `[n, 1]` to the first elements; 64-bit, since page times stride passes 2^31."""
    offset = outer.to(tl.int64) * tokens.stride_outer + token.to(tl.int64) * tokens.stride_token
    return (tokens.data + offset + head.to(tl.int64) * tokens.stride_head)[:, None]


@triton.jit(do_not_specialize=["max_tokens"])
def dequantize_fp4_pages_kernel(
    codes,
    scales,
    out,
    global_scale,
    table,
    table_stride,
    seq_lens,
    page_size,
    max_tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Grid: (blocks of tokens, requests, heads). codes, scales: Tokens of pages; out: Tokens of requests."""
    HALF: tl.constexpr = BLOCK_DIM // 2
    BLOCKS: tl.constexpr = BLOCK_DIM // 16
    request, head = tl.program_id(1), tl.program_id(2)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    mask = token < tl.minimum(tl.load(seq_lens + request), max_tokens)
    entry = table + request.to(tl.int64) * table_stride + token // page_size
    page = tl.load(entry, mask=mask, other=0)
    offs_pair, offs_block = tl.arange(0, HALF)[None, :], tl.arange(0, BLOCKS)[None, :]
    source = token_pointers(codes, page, token % page_size, head) + offs_pair
    pairs = tl.load(source, mask=mask[:, None] & (offs_pair < HEAD_DIM // 2), other=0)
    source = token_pointers(scales, page, token % page_size, head) + offs_block
    scale = decode_fp8(tl.load(source, mask=mask[:, None] & (offs_block < HEAD_DIM // 16), other=0), 3)
    scale *= tl.load(global_scale)
    value = tl.join(decode_e2m1(pairs & 15), decode_e2m1(pairs >> 4))
    value = tl.reshape(value, (BLOCK_TOKENS, BLOCKS, 16)) * scale[:, :, None]
    offs_dim = tl.arange(0, BLOCK_DIM)[None, :]
    target = token_pointers(out, request, token, head) + offs_dim
    value = tl.reshape(value, (BLOCK_TOKENS, BLOCK_DIM)).to(out.data.dtype.element_ty)
    tl.store(target, value, mask=mask[:, None] & (offs_dim < HEAD_DIM))


@triton.jit(do_not_specialize=["num_tokens"])
def concat_heads_kernel(
    k,
    k_nope,
    k_rope,
    num_tokens,
    num_heads,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_NOPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
):
    """Grid: (tokens, blocks of heads). k, k_nope, k_rope: Groups `[tokens, heads, dim]`; k_rope has one head."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    mask_head = (head < num_heads)[:, None]
    offs_nope = tl.arange(0, BLOCK_NOPE)[None, :]
    offs_rope = tl.arange(0, BLOCK_ROPE)[None, :]
    mask_nope = mask_head & (offs_nope < NOPE)
    source = k_nope.data + token * k_nope.stride_row + head[:, None] * k_nope.stride_group
    nope = tl.load(source + offs_nope, mask=mask_nope)
    rope = tl.load(k_rope.data + token * k_rope.stride_row + offs_rope, mask=offs_rope < ROPE)
    target = k.data + token * k.stride_row + head[:, None] * k.stride_group
    tl.store(target + offs_nope, nope, mask=mask_nope)
    rope = tl.broadcast_to(rope, (BLOCK_HEADS, BLOCK_ROPE))
    tl.store(target + NOPE + offs_rope, rope, mask=mask_head & (offs_rope < ROPE))
