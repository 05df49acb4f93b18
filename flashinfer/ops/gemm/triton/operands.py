"""Tiles of the two sides, by tensor map or by pointers, as a product takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.decode import decode_e2m1, decode_e2m1_pairs, decode_fp8, decode_ue8m0


class RowSide(NamedTuple):
    """`Rows` with strides in elements."""

    values: torch.Tensor
    stride: int
    indices: torch.Tensor | None
    scale: torch.Tensor | None
    scale_row: int
    scale_block: int


class WeightSide(NamedTuple):
    """`Weights` with strides in elements."""

    values: torch.Tensor
    stride_w: int
    stride_n: int
    stride_k: int
    indices: torch.Tensor | None
    indices_stride: int
    scale: torch.Tensor | None
    scale_w: int
    scale_n: int
    scale_k: int


@triton.jit
def load_rows(x_desc, rows, row, source, exists, k, depth, cfg: tl.constexpr):
    """`[block_m, block_k]` of the left side from column `k` on; zeros past the end. source: int64, see RowSide."""
    if cfg.row_map:
        return x_desc.load([row, k])
    else:
        offs_k = k + tl.arange(0, cfg.block_k)
        mask = exists[:, None] & (offs_k < depth)[None, :]
        return tl.load(rows[0] + source[:, None] * rows[1] + offs_k[None, :], mask=mask, other=0.0)


@triton.jit
def load_matrix(w_desc, weights, w, col, k, num_cols, depth, cfg: tl.constexpr):
    """`[block_n, block_k]` of matrix `w` from (col, k) on, as stored; zeros past the end.

    Of packed fp4, k, depth and the width count bytes.
    """
    WIDTH: tl.constexpr = cfg.block_k // cfg.packed
    if cfg.weight_map:
        if cfg.transposed:
            return w_desc.load([w, k, col]).reshape(WIDTH, cfg.block_n).T
        else:
            return w_desc.load([w, col, k]).reshape(cfg.block_n, WIDTH)
    else:
        offs_n = col + tl.arange(0, cfg.block_n)
        offs_k = k + tl.arange(0, WIDTH)
        at = weights[0] + w.to(tl.int64) * weights[1]
        at += offs_n.to(tl.int64)[:, None] * weights[2] + offs_k.to(tl.int64)[None, :] * weights[3]
        return tl.load(at, mask=(offs_n < num_cols)[:, None] & (offs_k < depth)[None, :], other=0.0)


@triton.jit
def fp4_scales(weights, w, col, k, num_cols, depth, cfg: tl.constexpr):
    """Codes `[block_n, block_k / scale_block]` of the scales of matrix `w` from (col, k) on; zeros past the end."""
    offs_n = col + tl.arange(0, cfg.block_n)
    offs_s = k // cfg.scale_block + tl.arange(0, cfg.block_k // cfg.scale_block)
    at = weights[6] + w.to(tl.int64) * weights[7]
    at += offs_n.to(tl.int64)[:, None] * weights[8] + offs_s[None, :] * weights[9]
    mask = (offs_n < num_cols)[:, None] & (offs_s < depth // cfg.scale_block)[None, :]
    return tl.load(at, mask=mask, other=0)


@triton.jit
def load_fp4(w_desc, weights, w, scales, col, k, num_cols, depth, dtype: tl.constexpr, cfg: tl.constexpr):
    """`load_matrix` of packed fp4, as numbers of `dtype`: code times scale is exact in 16 bits."""
    BYTES: tl.constexpr = cfg.block_k // 2
    BLOCKS: tl.constexpr = cfg.block_k // cfg.scale_block
    packed = load_matrix(w_desc, weights, w, col, k // 2, num_cols, depth // 2, cfg)
    factor = decode_ue8m0(scales) if cfg.kind == "mxfp4" else decode_fp8(scales, 3)
    if cfg.fp4_pairs:
        return decode_e2m1_pairs(packed, factor)
    else:
        factor = tl.broadcast_to(factor[:, :, None], (cfg.block_n, BLOCKS, cfg.scale_block // 2))
        factor = factor.reshape(cfg.block_n, BYTES)
        low = (decode_e2m1(packed & 15) * factor).to(dtype)
        high = (decode_e2m1(packed >> 4) * factor).to(dtype)
        return tl.join(low, high).reshape(cfg.block_n, cfg.block_k)


@triton.jit
def row_scales(rows, source, exists, k, cfg: tl.constexpr):
    """fp32 `[block_m]`: the scale of each row in the block of column `k`."""
    at = rows[3] + source // cfg.scale_rows * rows[4] + k // 128 * rows[5]
    return tl.load(at, mask=exists, other=0.0)


@triton.jit
def matrix_scales(weights, w, col, k, num_cols, cfg: tl.constexpr):
    """fp32: the scale of the tile from (col, k) on, or `[block_n]` where its columns have several."""
    at = weights[6] + w.to(tl.int64) * weights[7] + k // 128 * weights[9]
    if cfg.one_scale:
        return tl.load(at + col // cfg.scale_cols * weights[8])
    else:
        offs_n = col + tl.arange(0, cfg.block_n)
        return tl.load(at + offs_n // cfg.scale_cols * weights[8], mask=offs_n < num_cols, other=0.0)
