"""The grouped product: persistent programs take tile after tile of all groups, whose sizes only the device knows."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from flashinfer.device.finish import add_bias, factor_of
from flashinfer.ops.gemm.triton.operands import fp4_scales, load_fp4, load_matrix, load_rows, matrix_scales, row_scales
from flashinfer.ops.gemm.triton.schedule import count_tiles, find_tile


@dataclass(frozen=True)
class GemmConfig:
    """What a compiled form depends on.

    kind: of the weights. block_m, block_n, block_k: of a tile. band: row tiles of a band. group_block: groups looked
    at in one go. single: all rows are scheduled as one group; shared_room: which has equal shares of several matrices.
    swap: the weights are the left operand, so that few rows are the narrow side of an instruction. row_map, weight_map,
    out_map: read or written by tensor map. transposed: see `GemmSpec`. packed: columns of a byte, else 1.
    scale_block: columns of a scale. scale_rows, scale_cols: see `GemmSpec`. one_scale: of a weight tile.
    gated: the activation takes pairs. fp4_pairs: fp4 is decoded two numbers at a time, to bf16.
    """

    kind: str
    block_m: int
    block_n: int
    block_k: int
    band: int
    group_block: int
    single: bool
    shared_room: bool
    swap: bool
    row_map: bool
    weight_map: bool
    out_map: bool
    transposed: bool
    packed: int
    scale_block: int
    scale_rows: int
    scale_cols: int
    one_scale: bool
    gated: bool
    fp4_pairs: bool


@triton.jit
def multiply_tile(acc, x, x_scale, w_desc, weights, w, scales, col, k, num_cols, depth, cfg: tl.constexpr):
    """acc plus the product of rows `x` with the tile of matrix `w` from (col, k) on; transposed if swapped.

    scales: of fp4, of that tile.
    """
    if cfg.packed == 2:
        y = load_fp4(w_desc, weights, w, scales, col, k, num_cols, depth, x.dtype, cfg)
    else:
        y = load_matrix(w_desc, weights, w, col, k, num_cols, depth, cfg)
    if cfg.kind == "fp8_block":
        scale = matrix_scales(weights, w, col, k, num_cols, cfg)
        if cfg.swap:
            factor = x_scale[None, :] * (scale if cfg.one_scale else scale[:, None])
            return acc + tl.dot(y, x.T) * factor
        else:
            factor = x_scale[:, None] * (scale if cfg.one_scale else scale[None, :])
            return acc + tl.dot(x, y.T) * factor
    else:
        # Tensor cores of Hopper sum fp8 products in few bits: after 128 of them the sum goes to fp32.
        SHORT: tl.constexpr = 128 if cfg.kind == "fp8_tensor" else None
        if cfg.swap:
            return tl.dot(y, x.T, acc, input_precision="ieee", max_num_imprecise_acc=SHORT)
        else:
            return tl.dot(x, y.T, acc, input_precision="ieee", max_num_imprecise_acc=SHORT)


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def grouped_gemm_kernel(
    x_desc,
    w_desc,
    o_desc,
    rows,
    weights,
    groups,
    finish,
    out,
    num_rows,
    num_groups,
    num_cols,
    depth,
    activation: tl.constexpr,
    cfg: tl.constexpr,
):
    """Grid: any number of programs. rows: RowSide; weights: WeightSide; groups: Groups; finish: Finish.

    x_desc `[T, K]`, w_desc `[W, N, K]` or `[W, K, N]`, o_desc `[nnz, columns]`: tensor maps, or None. out: (data, row
    stride). num_cols: N. activation: of pairs or of numbers, a jitted function or None.
    """
    ACC_M: tl.constexpr = cfg.block_n if cfg.swap else cfg.block_m
    ACC_N: tl.constexpr = cfg.block_m if cfg.swap else cfg.block_n
    out_cols = num_cols
    if cfg.gated:
        out_cols = num_cols // 2
    tiles_n = (out_cols + cfg.block_n - 1) // cfg.block_n
    offs_m = tl.arange(0, cfg.block_m)
    for tile in tl.range(tl.program_id(0), count_tiles(groups, num_rows, num_groups, tiles_n, cfg), tl.num_programs(0)):
        group, row, left, tile_n = find_tile(groups, tile, num_rows, num_groups, tiles_n, cfg)
        w = group
        end = depth
        if weights[4] is not None:
            w = tl.load(weights[4] + group * weights[5]).to(tl.int32)
            end = tl.where(w < 0, 0, depth)
        col = tile_n * cfg.block_n
        exists = offs_m < left
        source = (row + offs_m).to(tl.int64)
        if rows[2] is not None:
            source = tl.load(rows[2] + source, mask=exists, other=0).to(tl.int64)
        up = tl.zeros([ACC_M, ACC_N], tl.float32)
        gate = up
        up_scales, gate_scales = 0, 0
        if cfg.packed == 2:
            # Asked for a step ahead: they are too narrow for the pipeline that brings rows and weights.
            up_scales = fp4_scales(weights, tl.maximum(w, 0), col, 0, num_cols, end, cfg)
            if cfg.gated:
                gate_scales = fp4_scales(weights, tl.maximum(w, 0), out_cols + col, 0, num_cols, end, cfg)
        for k in tl.range(0, end, cfg.block_k):
            x = load_rows(x_desc, rows, row, source, exists, k, depth, cfg)
            x_scale = row_scales(rows, source, exists, k, cfg) if cfg.kind == "fp8_block" else 0.0
            up = multiply_tile(up, x, x_scale, w_desc, weights, w, up_scales, col, k, num_cols, depth, cfg)
            if cfg.gated:
                at = out_cols + col
                gate = multiply_tile(gate, x, x_scale, w_desc, weights, w, gate_scales, at, k, num_cols, depth, cfg)
            if cfg.packed == 2:
                up_scales = fp4_scales(weights, w, col, k + cfg.block_k, num_cols, depth, cfg)
                if cfg.gated:
                    gate_scales = fp4_scales(weights, w, out_cols + col, k + cfg.block_k, num_cols, depth, cfg)
        if cfg.swap:
            up = up.T
            gate = gate.T
        offs_n = col + tl.arange(0, cfg.block_n)
        matrix = tl.maximum(w, 0)
        factor = factor_of(finish, matrix)
        y = add_bias(up * factor, finish, matrix, offs_n, out_cols)
        if cfg.gated:
            pair = add_bias(gate * factor, finish, matrix, out_cols + offs_n, num_cols)
            y = activation(y, pair, finish, matrix)
        elif activation is not None:
            y = activation(y)
        if finish[2] is not None:
            y *= tl.load(finish[2] + row + offs_m, mask=exists, other=0.0)[:, None]
        if weights[4] is not None:
            y = tl.where(w < 0, 0.0, y)
        y = y.to(out[0].dtype.element_ty)
        mask = exists[:, None] & (offs_n < out_cols)[None, :]
        at = out[0] + (row + offs_m).to(tl.int64)[:, None] * out[1] + offs_n[None, :]
        if cfg.out_map:
            if left >= cfg.block_m:
                o_desc.store([row, col], y)
            else:
                tl.store(at, y, mask=mask)
        else:
            tl.store(at, y, mask=mask)
