"""Launches of products with adapters: one for each slice."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from flashinfer.core.launch import Prebound, integer_classes, pointers
from flashinfer.ops.lora.spec import Adapters, Expand, Pairs, Shrink
from flashinfer.ops.lora.triton.kernel import Index, Order, expand_kernel, shrink_kernel

# Elements of a tile: 32 for each of 128 threads.
TILE = 4096
NUM_WARPS = 4
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
NO_ORDER = Order(None, None, None)
_launch_shrink = Prebound(shrink_kernel)
_launch_expand = Prebound(expand_kernel)


def tile(rank: int, other: int) -> tuple[int, int]:
    """(rows or columns of the rank, of the other side) of a tile."""
    block_r = triton.next_power_of_2(rank)
    return block_r, min(triton.next_power_of_2(other), max(16, TILE // block_r))


def _index(adapters: Adapters, s: int, pairs: Pairs) -> Index:
    return Index(adapters.table[s], adapters.stride, *pairs)


def _key(numbers: tuple[int, ...], constants: tuple[Any, ...], *tensors: torch.Tensor | None) -> tuple[Any, ...]:
    return integer_classes(numbers), constants, pointers(*tensors)


def shrink(tensors: Shrink) -> None:
    """A launch a slice."""
    y, x, adapters, pairs, by_pair = tensors
    rank, depth = y.shape[2], x.shape[1]
    block_r, block_k = tile(rank, depth)
    constants = (by_pair, DTYPES[adapters.dtype], block_r, block_k)
    for s in range(y.shape[0]):
        index, target = _index(adapters, s, pairs), y[s]
        key = _key((y.stride(1), x.stride(0), adapters.stride, rank, depth), constants, target, x, index.table, *pairs)
        arguments = ((target, y.stride(1)), (x, x.stride(0)), index, rank, depth, *constants)
        _launch_shrink((y.shape[1], 1, 1), key, arguments, y.device, num_warps=NUM_WARPS)


def expand(tensors: Expand) -> None:
    """A launch a slice; before, where pairs are summed, torch sorts them by token."""
    y, x, adapters, pairs, weights, begins, widths = tensors
    order, rank = NO_ORDER, x.shape[2]
    if weights is not None:
        tokens, sorted_pairs = torch.sort(pairs.tokens, stable=True)
        rows = torch.arange(y.shape[0] + 1, dtype=tokens.dtype, device=y.device)
        order = Order(sorted_pairs, torch.searchsorted(tokens, rows), weights)
    for s, width in enumerate(widths):
        block_r, block_n = tile(rank, width)
        constants = (DTYPES[adapters.dtype], block_r, block_n)
        index, source, begin = _index(adapters, s, pairs), x[s], begins[s : s + 1]
        numbers = (y.stride(0), x.stride(1), adapters.stride, rank, width)
        key = _key(numbers, constants, y, source, index.table, *pairs, *order, begin)
        target = (y, y.stride(0))
        arguments = (target, (source, x.stride(1)), index, order, begin, rank, width, *constants)
        grid = (y.shape[0], triton.cdiv(width, block_n), 1)
        _launch_expand(grid, key, arguments, y.device, num_warps=NUM_WARPS)
