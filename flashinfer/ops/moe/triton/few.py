"""Both products for few tokens: every program reads a tile of one expert's weights once, for all rows it has.

The time is that of reading weights, so programs are many and their loads deep; a tile of rows is as high as what an
expert hardly has more of. The sums of a tile whose columns are split go to parts of their own, which `combine_kernel`
adds in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.decode import decode_e2m1, decode_e2m1_pairs, decode_fp8, decode_ue8m0
from flashinfer.device.early import ask_for, let_next_launch_begin, wait_for_launch_before
from flashinfer.device.finish import factor_of
from flashinfer.device.fp8 import to_fp8


@dataclass(frozen=True)
class FewConfig:
    """One of the two products, and how it is cut.

    first: its rows are tokens and its results activations; else rows are pairs and results fp32 parts. width: columns
    of the result; depth: of the rows. block_r: rows of the weights in a tile, up and gate counted both; block_m: pairs;
    block_k: columns. splits: parts of the depth. scan: 2^n of at least the number of pairs, among which a program looks
    for its own; 0: they come sorted. by_expert: program i takes expert i, else the expert of pair i if no pair before
    has the same. weights_left: weights are the left operand of the product, as Hopper's instructions like it for few
    rows. fp4: weights are mxfp4, fp4_pairs: decoded two at a time. fp8: weights and rows are e4m3. blocks: both with
    scales of 128 columns; scale_rows: rows of the weights that share one. early: see `device/early`. ahead: columns of
    a tile whose weights a program asks for before it waits for the launch before it, 0 where that is not one of this
    call, or sorts its pairs.
    """

    first: bool
    fp4: bool
    fp8: bool
    blocks: bool
    width: int
    depth: int
    num_experts: int
    top_k: int
    gated: bool
    block_r: int
    block_m: int
    block_k: int
    splits: int
    scan: int
    by_expert: bool
    weights_left: bool
    scale_rows: int
    fp8_out: bool
    native_fp8: bool
    fp4_pairs: bool
    num_stages: int
    early: bool
    ahead: int


class Input(NamedTuple):
    """data: tokens, or activations of pairs, `stride` elements apart. scale: fp32, one for 128 columns of a row."""

    data: torch.Tensor
    stride: int
    scale: torch.Tensor | None
    scale_stride: int


class Matrices(NamedTuple):
    """`Weights` with strides in elements."""

    data: torch.Tensor
    stride_e: int
    stride_n: int
    stride_k: int
    scale: torch.Tensor | None
    scale_e: int
    scale_n: int
    scale_k: int


class Output(NamedTuple):
    """data: activations `[pairs, width]`, or fp32 `[splits, pairs, width]`; contiguous. scale: `hidden_scale`."""

    data: torch.Tensor
    scale: torch.Tensor | None
    scale_stride: int


class Pairs(NamedTuple):
    """ids `[num_pairs]`; indptr, order: as `place_kernel` writes them, None where programs look themselves."""

    ids: torch.Tensor
    indptr: torch.Tensor | None
    order: torch.Tensor | None


@triton.jit
def mine_among(pairs, slot, num_pairs, first, cfg: tl.constexpr):
    """The expert of program `slot`, how many pairs it has, and of every pair its rank among them, -1 for others."""
    offs = tl.arange(0, cfg.scan)
    local = (tl.load(pairs.ids + offs, mask=offs < num_pairs, other=-1) - first).to(tl.int32)
    held = (offs < num_pairs) & (local >= 0) & (local < cfg.num_experts)
    expert = slot
    if not cfg.by_expert:
        expert = tl.max(tl.where(held & (offs == slot), local, -1), 0)
    hit = (held & (local == expert)).to(tl.int32)
    count = tl.sum(hit, 0)
    if not cfg.by_expert:
        earlier = tl.sum(tl.where(offs < slot, hit, 0), 0)
        count = tl.where(earlier > 0, 0, count)
    rank = tl.where(hit == 1, tl.cumsum(hit, 0) - 1, -1)
    return expert, count, rank


@triton.jit
def weight_tile(w, at, mask_r, k, depth, cfg: tl.constexpr):
    """`[block_r, block_k]` of an expert's weights from column `k` on; zeros past the end. at: pointers to rows."""
    PACKED: tl.constexpr = 2 if cfg.fp4 else 1
    offs_k = k // PACKED + tl.arange(0, cfg.block_k // PACKED)
    mask = mask_r[:, None]
    if cfg.depth % (cfg.block_k * cfg.splits) != 0:
        mask = mask & (offs_k < depth // PACKED)[None, :]
    at = at[:, None] + offs_k[None, :] * w.stride_k
    return tl.load(at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def fp4_scales(w, at_scale, mask_r, k, cfg: tl.constexpr):
    """Codes `[block_r, block_k / 32]` of the scales of a tile from column `k` on."""
    offs = k // 32 + tl.arange(0, cfg.block_k // 32)
    mask = mask_r[:, None] & (offs < cfg.depth // 32)[None, :]
    return tl.load(at_scale[:, None] + offs[None, :] * w.scale_k, mask=mask, other=0)


@triton.jit
def spread_fp4(codes, scales, dtype: tl.constexpr, cfg: tl.constexpr):
    """Numbers `[block_r, block_k]` of packed codes, times the scales of their 32 columns; exact in 16 bits."""
    BLOCKS: tl.constexpr = cfg.block_k // 32
    factor = decode_ue8m0(scales)
    if cfg.fp4_pairs and dtype == tl.bfloat16:
        return decode_e2m1_pairs(codes, factor)
    else:
        factor = tl.broadcast_to(factor[:, :, None], (cfg.block_r, BLOCKS, 16)).reshape(cfg.block_r, cfg.block_k // 2)
        low = (decode_e2m1(codes & 15) * factor).to(dtype)
        high = (decode_e2m1(codes >> 4) * factor).to(dtype)
        return tl.join(low, high).reshape(cfg.block_r, cfg.block_k)


@triton.jit
def from_fp8(codes, cfg: tl.constexpr):
    """Bytes of e4m3 as fp16, which has all these numbers; products of two are exact in fp32."""
    if cfg.native_fp8:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        return decode_fp8(codes, 3).to(tl.float16)


@triton.jit
def multiplied(a, x, acc, cfg: tl.constexpr):
    """`acc + a @ x.T`, `[block_r, block_m]`, or its transpose."""
    PRECISION: tl.constexpr = "ieee"
    if cfg.weights_left:
        return tl.dot(a, x.T, acc, input_precision=PRECISION)
    else:
        return tl.dot(x, a.T, acc, input_precision=PRECISION)


@triton.jit
def block_factors(x, w, at_scale, mask_r, x_row, mask_m, k, cfg: tl.constexpr):
    """What the product of columns `k` to `k + 127` is multiplied by, fp32, in its shape."""
    of_rows = tl.load(x.scale + x_row * x.scale_stride + k // 128, mask=mask_m, other=0.0)
    of_weights = tl.load(at_scale + k // 128 * w.scale_k, mask=mask_r, other=0.0)
    if cfg.weights_left:
        return of_weights[:, None] * of_rows[None, :]
    else:
        return of_rows[:, None] * of_weights[None, :]


@triton.jit
def sums(x, w, at, at_scale, mask_r, x_row, mask_m, k_begin, k_end, cfg: tl.constexpr):
    """fp32 `[block_r, block_m]`: the weights' rows times the rows of `x`."""
    SHAPE: tl.constexpr = (cfg.block_r, cfg.block_m) if cfg.weights_left else (cfg.block_m, cfg.block_r)
    acc = tl.full(SHAPE, 0.0, tl.float32)
    at_x = x.data + x_row * x.stride
    if cfg.blocks:
        # The last parts of a split may have no columns.
        factor = block_factors(x, w, at_scale, mask_r, x_row, mask_m, tl.minimum(k_begin, cfg.depth - 1), cfg)
    elif cfg.fp4:
        factor = fp4_scales(w, at_scale, mask_r, k_begin, cfg)
    for k in tl.range(k_begin, k_end, cfg.block_k, num_stages=cfg.num_stages):
        offs_k = k + tl.arange(0, cfg.block_k)
        mask = mask_m[:, None]
        if cfg.depth % (cfg.block_k * cfg.splits) != 0:
            mask = mask & (offs_k < k_end)[None, :]
        tile = weight_tile(w, at, mask_r, k, k_end, cfg)
        rows = tl.load(at_x[:, None] + offs_k[None, :], mask=mask, other=0)
        if cfg.blocks:
            part = tl.full(SHAPE, 0.0, tl.float32)
            if cfg.native_fp8:
                # Tensor cores of Hopper sum fp8 products in few bits, of 128 here.
                left, right = tile.to(tl.float8e4nv, bitcast=True), rows.to(tl.float8e4nv, bitcast=True)
                part = multiplied(left, right, part, cfg)
            else:
                part = multiplied(from_fp8(tile, cfg), from_fp8(rows, cfg), part, cfg)
            acc += part * factor
            # Of the next block, while its weights come: products wait for nothing but those.
            following = tl.minimum(k + cfg.block_k, k_end - 1)
            factor = block_factors(x, w, at_scale, mask_r, x_row, mask_m, following, cfg)
        elif cfg.fp8:
            acc = multiplied(from_fp8(tile, cfg), from_fp8(rows, cfg), acc, cfg)
        elif cfg.fp4:
            acc = multiplied(spread_fp4(tile, factor, rows.dtype, cfg), rows, acc, cfg)
            factor = fp4_scales(w, at_scale, mask_r, k + cfg.block_k, cfg)
        else:
            acc = multiplied(tile, rows, acc, cfg)
    return acc if cfg.weights_left else acc.T


@triton.jit
def ask_for_weights(w, at, mask_r, k, cfg: tl.constexpr):
    """Begin to bring `cfg.ahead` columns of a tile from column `k` on into the L2 cache."""
    PACKED: tl.constexpr = 2 if cfg.fp4 else 1
    LINE: tl.constexpr = 128 // (w.data.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = cfg.ahead // PACKED // LINE
    offs = k // PACKED + tl.arange(0, LINES) * LINE
    mask = mask_r[:, None] & (offs < cfg.depth // PACKED)[None, :]
    ask_for(tl.where(mask, at[:, None] + offs[None, :] * w.stride_k, w.data), cfg.early)


@triton.jit
def finished(acc, finish, expert, row, mask_r, activation: tl.constexpr, cfg: tl.constexpr):
    """Activations `[block_r, block_m]`, of gated ones half as many rows; bias first."""
    if finish.bias is not None:
        at = finish.bias + expert.to(tl.int64) * finish.bias_stride + row
        acc += tl.load(at, mask=mask_r, other=0.0).to(tl.float32)[:, None]
    if cfg.gated:
        # Rows 2 i and 2 i + 1 are up and gate of column i.
        paired = acc.reshape(cfg.block_r // 2, 2, cfg.block_m).permute(0, 2, 1)
        up, gate = tl.split(paired)
        return activation(up, gate, finish, expert)
    elif activation is None:
        return acc
    else:
        return activation(acc)


@triton.jit(do_not_specialize=["num_pairs", "first"])
def few_kernel(out, x, w, pairs, finish, num_pairs, first, activation: tl.constexpr, cfg: tl.constexpr):
    """Grid: (tiles of rows of the weights, experts or pairs, splits)."""
    slot = tl.program_id(1)
    if cfg.ahead == 0:
        wait_for_launch_before(cfg.early)
        let_next_launch_begin(cfg.early)
    if cfg.scan > 0:
        expert, count, rank = mine_among(pairs, slot, num_pairs, first, cfg)
        begin = 0
    else:
        expert = slot
        begin = tl.load(pairs.indptr + slot)
        count = tl.load(pairs.indptr + slot + 1) - begin
    offs_r = tl.arange(0, cfg.block_r)
    if cfg.gated:
        col = tl.program_id(0) * (cfg.block_r // 2) + offs_r // 2
        row = col + offs_r % 2 * cfg.width
    else:
        col = tl.program_id(0) * cfg.block_r + offs_r
        row = col
    mask_r = col < cfg.width
    matrix = expert.to(tl.int64)
    at = w.data + matrix * w.stride_e + row.to(tl.int64) * w.stride_n
    at_scale = at
    if w.scale is not None:
        at_scale = w.scale + matrix * w.scale_e + (row // cfg.scale_rows).to(tl.int64) * w.scale_n
    STEPS: tl.constexpr = (cfg.depth + cfg.block_k * cfg.splits - 1) // (cfg.block_k * cfg.splits)
    k_begin = tl.program_id(2) * (STEPS * cfg.block_k)
    k_end = tl.minimum(k_begin + STEPS * cfg.block_k, cfg.depth)
    COLS: tl.constexpr = cfg.block_r // 2 if cfg.gated else cfg.block_r
    offs_c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    if cfg.ahead > 0:
        if count > 0:
            ask_for_weights(w, at, mask_r, k_begin, cfg)
        wait_for_launch_before(cfg.early)
        let_next_launch_begin(cfg.early)
    # Experts nobody goes to take no turn; one with more rows than a tile takes several, its weights from the L2 cache.
    for m in range(0, count, cfg.block_m):
        offs_m = m + tl.arange(0, cfg.block_m)
        mask_m = offs_m < count
        if cfg.scan > 0:
            hit = rank[None, :] == offs_m[:, None]
            pair = tl.sum(tl.where(hit, tl.arange(0, cfg.scan)[None, :], 0), 1)
        else:
            pair = tl.load(pairs.order + begin + offs_m, mask=mask_m, other=0)
        x_row = (pair // cfg.top_k if cfg.first else pair).to(tl.int64)
        acc = sums(x, w, at, at_scale, mask_r, x_row, mask_m, k_begin, k_end, cfg)
        acc *= factor_of(finish, expert)
        to = pair.to(tl.int64)[None, :] * cfg.width + offs_c[:, None]
        mask = mask_m[None, :] & (offs_c < cfg.width)[:, None]
        if cfg.first:
            value = finished(acc, finish, expert, row, mask_r, activation, cfg)
            if cfg.fp8_out:
                if out.scale is not None:
                    value *= tl.load(out.scale + expert * out.scale_stride)
                tl.store(out.data + to, to_fp8(value, 3, cfg.native_fp8), mask=mask)
            else:
                tl.store(out.data + to, value.to(out.data.dtype.element_ty), mask=mask)
        else:
            part = tl.program_id(2).to(tl.int64) * num_pairs * cfg.width
            tl.store(out.data + part + to, acc, mask=mask)
