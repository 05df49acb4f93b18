"""Products with adapters in plain torch, pair by pair, on the CPU: what they mean."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch

from flashinfer.ops.lora.spec import Adapters, Expand, Pairs, Shrink


def _matrix(adapters: Adapters, where: tuple[int, int], adapter: int, shape: tuple[int, int]) -> torch.Tensor:
    """The matrix of (slice, expert) and adapter, fp32."""
    size = shape[0] * shape[1]
    address = int(adapters.table[where]) + adapter * adapters.stride * adapters.dtype.itemsize
    memory = (ctypes.c_byte * (size * adapters.dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=adapters.dtype).view(shape).float()


def _present(pairs: Pairs) -> Iterator[tuple[int, int, int, int]]:
    """(pair, token, expert, adapter) of pairs whose token has an adapter."""
    for pair, (token, expert) in enumerate(zip(pairs.tokens.tolist(), pairs.experts.tolist(), strict=True)):
        adapter = int(pairs.adapters[token])
        if adapter >= 0:
            yield pair, token, expert, adapter


@torch.no_grad()
def shrink(tensors: Shrink) -> None:
    """Sums in fp32."""
    y, x, adapters, pairs, by_pair = tensors
    for pair, token, expert, adapter in _present(pairs):
        row = x[pair if by_pair else token].float()
        for s in range(y.shape[0]):
            a = _matrix(adapters, (s, expert), adapter, (y.shape[2], x.shape[1]))
            y[s, pair] = y[s, pair].float() + a @ row


@torch.no_grad()
def expand(tensors: Expand) -> None:
    """Sums in fp32."""
    y, x, adapters, pairs, weights, begins, widths = tensors
    sums = torch.zeros(y.shape, dtype=torch.float32)
    for pair, token, expert, adapter in _present(pairs):
        row, weight = (pair, 1.0) if weights is None else (token, float(weights[pair]))
        for s, (begin, width) in enumerate(zip(begins.tolist(), widths, strict=True)):
            b = _matrix(adapters, (s, expert), adapter, (width, x.shape[2]))
            sums[row, begin : begin + width] += weight * (b @ x[s, pair].float())
    y.copy_(y.float() + sums)
