"""Several tensors as one message: one collective where there would be one for each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from flashinfer.core.peers import gather_into

# Bytes that each part of a message is padded to, so that it can be viewed in its dtype.
_ALIGNMENT = 16
Shapes = Sequence[tuple[Sequence[int], torch.dtype]]


def message_bytes(shapes: Shapes) -> int:
    """Bytes of a message of tensors of these shapes and dtypes."""
    return _bounds(shapes)[-1]


def all_to_all(
    parts: Sequence[torch.Tensor], group: dist.ProcessGroup | None, staging: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Send `part[r]` of each part to rank r; returns tensors of the parts' shapes, `[r]` being what rank r sent.

    parts: `[world_size, ...]`, any strides. staging: contiguous uint8 of 2 * world_size messages, used if given: what
    is returned lies in it then.
    """
    shapes = [(part.shape[1:], part.dtype) for part in parts]
    rows = (2, parts[0].shape[0], message_bytes(shapes))
    room = parts[0].new_empty(rows, dtype=torch.uint8) if staging is None else staging[: math.prod(rows)].view(rows)
    send, received = room
    for view, part in zip(_views(send, shapes), parts, strict=True):
        view.copy_(part)
    dist.all_to_all_single(received, send, group=group)
    return _views(received, shapes)


def all_gather(parts: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Send each part to every rank; returns `[world_size, *part.shape]` of each, `[r]` being what rank r sent."""
    shapes = [(part.shape, part.dtype) for part in parts]
    send = parts[0].new_empty((1, message_bytes(shapes)), dtype=torch.uint8)
    for view, part in zip(_views(send, shapes), parts, strict=True):
        view[0].copy_(part)
    received = send.new_empty((dist.get_world_size(group), send.shape[1]))
    gather_into(received, send, group=group)
    return _views(received, shapes)


def _bounds(shapes: Shapes) -> list[int]:
    """Where each part of a message begins, in bytes, and where the last one ends."""
    bounds = [0]
    for shape, dtype in shapes:
        size = math.prod(shape) * dtype.itemsize
        # An empty part has room, too: memory of no stride has no dtype.
        bounds.append(bounds[-1] + -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT)
    return bounds


def _views(messages: torch.Tensor, shapes: Shapes) -> list[torch.Tensor]:
    """The parts of uint8 `[rows, message_bytes]` as `[rows, *shape]` of their dtypes."""
    views = []
    for (shape, dtype), start in zip(shapes, _bounds(shapes)[:-1], strict=True):
        size = math.prod(shape) * dtype.itemsize
        views.append(messages[:, start : start + size].view(dtype).unflatten(1, tuple(shape)))
    return views
