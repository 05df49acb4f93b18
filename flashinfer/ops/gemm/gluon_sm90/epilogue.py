"""From accumulators to the output: what is done to them, and two ways out of shared memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.device.finish import add_bias, factor_of
from flashinfer.device.gluon import (
    constexpr_function,
    fence_async_shared,
    gl,
    jit,
    partition_barrier,
    tma_store,
    tma_store_wait,
)
from flashinfer.ops.gemm.gluon_sm90.schedule import weights_of


class Target(NamedTuple):
    """out `[rows, columns]`, the innermost stride 1."""

    data: torch.Tensor
    stride_row: int


@constexpr_function
def accumulator_layout(columns, bits):
    """Of a `[64, columns]` accumulator of one warpgroup, for operands of `bits` bits."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 256 // bits])


@constexpr_function
def _copy_layout(columns):
    """16 bytes a thread, a warp's threads along the columns."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@jit
def halves(x, BLOCK: gl.constexpr):
    """`[rows, columns]` whose columns alternate between blocks of BLOCK: the even blocks, and the odd ones."""
    ROWS: gl.constexpr = x.shape[0]
    PAIRS: gl.constexpr = x.shape[1] // (2 * BLOCK)
    even, odd = x.reshape([ROWS, PAIRS, 2, BLOCK]).permute((0, 1, 3, 2)).split()
    return even.reshape([ROWS, PAIRS * BLOCK]), odd.reshape([ROWS, PAIRS * BLOCK])


@jit
def finished(x, gate, finish, groups, place, counts, cfg: gl.constexpr):
    """Sums `[rows, columns]` (with those of the gates, if gated) to numbers of the output, fp32.

    place: (group, first row, rows of the group from there on, first column). finish: `Finish`.
    """
    group, row, left, column = place
    if not cfg.finishes:
        return x
    else:
        which = weights_of(groups, group)
        matrix = gl.maximum(which, 0)
        LAYOUT: gl.constexpr = x.type.layout
        offs_n = column + gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
        factor = factor_of(finish, matrix)
        if cfg.gated:
            columns = 2 * counts.columns
            pair = add_bias(gate * factor, finish, matrix, counts.columns + offs_n, columns)
            x = cfg.activation(add_bias(x * factor, finish, matrix, offs_n, counts.columns), pair, finish, matrix)
        else:
            x = add_bias(x * factor, finish, matrix, offs_n, counts.columns)
            if cfg.activation is not None:
                x = cfg.activation(x)
        if finish[2] is not None:
            offs_m = gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT))
            x *= gl.load(finish[2] + row + offs_m, mask=offs_m < left, other=0.0)[:, None]
        if groups.indices is not None:
            x = gl.where(which < 0, 0.0, x)
        return x


@jit
def _put_rows(staging, target, row, left, column, counts):
    """`staging` to the output, of rows those before `left`."""
    LAYOUT: gl.constexpr = _copy_layout(staging.shape[1])
    offs_m = gl.arange(0, staging.shape[0], gl.SliceLayout(1, LAYOUT))
    offs_n = column + gl.arange(0, staging.shape[1], gl.SliceLayout(0, LAYOUT))
    offs = (row + offs_m).to(gl.int64)[:, None] * target.stride_row + offs_n[None, :]
    mask = (offs_m < left)[:, None] & (offs_n < counts.columns)[None, :]
    gl.store(target.data + offs, staging.load(LAYOUT), mask=mask)


@jit
def put(value, staging, o_desc, target, row, left, column, counts, BOX: gl.constexpr):
    """value `[rows, columns]` to the output from (row, column) on, through `staging`.

    By TMA where all rows are of the group, which ends `left` rows on, and they are a box of its map, which ends at the
    last column. Else by stores under a mask.
    """
    # The store of the part before has left the buffer, as the thread that asked for it knows.
    tma_store_wait(0)
    partition_barrier()
    staging.store(value)
    if BOX:
        if left >= staging.shape[0]:
            fence_async_shared()
            tma_store(o_desc, [row, column], staging)
        else:
            _put_rows(staging, target, row, left, column, counts)
    else:
        _put_rows(staging, target, row, left, column, counts)


@jit
def write(x, staging, o_desc, target, finish, groups, place, counts, BOX: gl.constexpr, cfg: gl.constexpr):
    """Sums `[rows, columns]` to the output, from `place` on. BOX: rows are as many as TMA stores at once."""
    group, row, left, column = place
    # One part after the other: what is done to all sums at once takes more registers than there are.
    WIDTH: gl.constexpr = cfg.out_part * (2 if cfg.gated else 1)
    PARTS: gl.constexpr = x.shape[1] // WIDTH
    parts = (x,)
    if PARTS == 2:
        parts = halves(x, WIDTH)
    if PARTS == 4:
        first, second = halves(x, 2 * WIDTH)
        parts = halves(first, WIDTH) + halves(second, WIDTH)
    for i in gl.static_range(PARTS):
        at = (group, row, left, column + i * cfg.out_part)
        if cfg.gated:
            up, gate = halves(parts[i], cfg.gate_block)
        else:
            up, gate = parts[i], None
        value = finished(up, gate, finish, groups, at, counts, cfg).to(o_desc.dtype)
        put(value, staging, o_desc, target, row, left, at[3], counts, BOX)
