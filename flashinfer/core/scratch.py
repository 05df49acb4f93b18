"""Scratch memory of a call, cut from one tensor."""

from __future__ import annotations

import math

import torch

# Slices begin on this many bytes, so that wide loads are aligned.
ALIGNMENT = 256


class Scratch:
    """Tensors that live for one call: cut from `buffer` (uint8, on the device of `like`), or new where it is full.

    needed: how many bytes a buffer that holds all of them has.
    """

    def __init__(self, like: torch.Tensor, buffer: torch.Tensor | None) -> None:
        self.like = like
        self.buffer = buffer
        self.needed = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory that holds anything."""
        begin, size = self.needed, math.prod(shape) * dtype.itemsize
        self.needed += -(-size // ALIGNMENT) * ALIGNMENT
        if self.buffer is None or begin + size > self.buffer.numel():
            return self.like.new_empty(shape, dtype=dtype)
        return self.buffer[begin : begin + size].view(dtype).view(shape)
