"""Products of single rows with adapters: a program takes a pair, or a token's pairs one after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Index(NamedTuple):
    """Which matrices: the row of addresses of one slice, elements between adapters; see `Pairs` for the others."""

    table: torch.Tensor
    stride: int
    tokens: torch.Tensor
    experts: torch.Tensor
    adapters: torch.Tensor


class Order(NamedTuple):
    """Pairs sorted by token, the first of each token, weights of pairs; all None: a pair for each row."""

    pairs: torch.Tensor | None
    bounds: torch.Tensor | None
    weights: torch.Tensor | None


@triton.jit
def matrix_of(index, pair, DTYPE: tl.constexpr):
    """(token, adapter, pointer to the pair's matrix), which may be followed if adapter >= 0."""
    token = tl.load(index.tokens + pair).to(tl.int64)
    adapter = tl.load(index.adapters + token).to(tl.int64)
    address = tl.load(index.table + tl.load(index.experts + pair))
    return token, adapter, address.to(tl.pointer_type(DTYPE)) + adapter * index.stride


@triton.jit
def shrink_kernel(
    y, x, index, rank, depth, BY_PAIR: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Grid: pairs. y, x: (data, row stride)."""
    pair = tl.program_id(0).to(tl.int64)
    token, adapter, matrix = matrix_of(index, pair, DTYPE)
    if adapter >= 0:
        row = token
        if BY_PAIR:
            row = pair
        offs_r = tl.arange(0, BLOCK_R)
        sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for k in range(0, depth, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < depth
            values = tl.load(x[0] + row * x[1] + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            mask = (offs_r < rank)[:, None] & mask_k[None, :]
            a = tl.load(matrix + offs_r[:, None] * depth + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
            sums += a * values[None, :]
        at = y[0] + pair * y[1] + offs_r
        old = tl.load(at, mask=offs_r < rank, other=0.0).to(tl.float32)
        tl.store(at, (old + tl.sum(sums, 1)).to(y[0].dtype.element_ty), mask=offs_r < rank)


@triton.jit
def expand_kernel(
    y, x, index, order, begin, rank, width, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Grid: (rows of y, column blocks). y, x: (data, row stride). begin: the slice's first column. order: Order."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < rank
    mask = (offs_n < width)[:, None] & mask_r[None, :]
    first = row
    last = row + 1
    if order[1] is not None:
        first = tl.load(order[1] + row).to(tl.int64)
        last = tl.load(order[1] + row + 1).to(tl.int64)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for i in range(first, last):
        pair = i
        if order[0] is not None:
            pair = tl.load(order[0] + i)
        _, adapter, matrix = matrix_of(index, pair, DTYPE)
        if adapter >= 0:
            values = tl.load(x[0] + pair * x[1] + offs_r, mask=mask_r, other=0.0).to(tl.float32)
            b = tl.load(matrix + offs_n[:, None] * rank + offs_r[None, :], mask=mask, other=0.0).to(tl.float32)
            product = tl.sum(b * values[None, :], 1)
            if order[2] is not None:
                product *= tl.load(order[2] + pair)
            sums += product
    at = y[0] + row * y[1] + tl.load(begin) + offs_n
    old = tl.load(at, mask=offs_n < width, other=0.0).to(tl.float32)
    tl.store(at, (old + sums).to(y[0].dtype.element_ty), mask=offs_n < width)
