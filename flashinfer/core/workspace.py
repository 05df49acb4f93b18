"""Scratch memory with named slices: grows by itself, takes the user's buffer where it is large enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class Arena:
    """Named device buffers of one wrapper.

    `buffer` is the user's workspace (any dtype, on the wanted device); slices asked for with `shared=True` are cut from
    it as long as it is large enough, since wrappers that do not run at the same time may share it: its content is only
    valid within a run. All other slices are private and keep their content. A slice grows when a plan needs more; with
    `frozen` set (CUDA graphs hold its address) growth is an error.
    """

    def __init__(self, device: torch.device, buffer: torch.Tensor | None = None) -> None:
        self.device = device
        self.frozen = False
        self.buffer = buffer
        self._slices: dict[str, torch.Tensor] = {}

    @property
    def buffer(self) -> torch.Tensor | None:
        return self._buffer

    @buffer.setter
    def buffer(self, buffer: torch.Tensor | None) -> None:
        self._buffer = buffer
        self._bytes = None if buffer is None else buffer.view(-1).view(torch.uint8)
        self._slices = {}

    def private(self, name: str, shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
        """A slice of its own, at least `shape` large, content kept between runs (zeroed once if `zero`)."""
        size = math.prod(shape)
        held = self._slices.get(name)
        if held is None or held.numel() < size or held.dtype != dtype:
            self._check_growth(name, held)
            make = torch.zeros if zero else torch.empty
            held = make(size, dtype=dtype, device=self.device)
            self._slices[name] = held
        return held[:size].view(tuple(shape))

    def shared(self, shapes: dict[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, torch.Tensor]:
        """Slices valid within one run, cut from the user's buffer if all of them fit, else from one of our own."""
        offsets, total = {}, 0
        for name, (shape, dtype) in shapes.items():
            offsets[name] = total
            total += -(-math.prod(shape) * dtype.itemsize // 16) * 16
        source = self._bytes
        if source is None or source.numel() < total:
            source = self.private("shared", (total,), torch.uint8)
        return {
            name: source[offsets[name] : offsets[name] + math.prod(shape) * dtype.itemsize]
            .view(dtype)
            .view(tuple(shape))
            for name, (shape, dtype) in shapes.items()
        }

    def _check_growth(self, name: str, held: torch.Tensor | None) -> None:
        if self.frozen and held is not None:
            raise RuntimeError(
                f"workspace slice {name!r} would have to grow, but a CUDA graph may hold its address. "
                "Plan the largest batch first, before the capture."
            )
