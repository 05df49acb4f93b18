"""Scratch memory of a call, cut from one tensor."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch

# Slices begin on this many bytes, so that wide loads are aligned.
ALIGNMENT = 256
# Kinds of calls whose need is known; beyond, it is found out anew.
CAPACITY = 4096


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


class Needs:
    """How many bytes of scratch memory each kind of call takes at the most, of those made so far.

    Calls of one kind may differ in what they take: a buffer of the most is enough for all, so that all are repeated.
    """

    def __init__(self) -> None:
        self._sizes: dict[Hashable, int] = {}

    def buffer(self, kind: Hashable, device: torch.device) -> torch.Tensor | None:
        """Memory for a call; None before the first one of its kind, and where it needs none."""
        size = self._sizes.get(kind)
        return torch.empty(size, dtype=torch.uint8, device=device) if size else None

    def note(self, kind: Hashable, size: int) -> None:
        """Keep what a call of this kind took."""
        if len(self._sizes) >= CAPACITY:
            self._sizes.clear()
        self._sizes[kind] = max(size, self._sizes.get(kind, 0))
