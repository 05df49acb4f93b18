"""Packing of boolean masks into bits, in plain torch."""

from __future__ import annotations

import torch
from torch.nn import functional


def _bytes(bits: torch.Tensor, bitorder: str) -> torch.Tensor:
    """uint8 `[n]` of bool `[n, 8]`; bitorder "little" puts the first bit at weight 1, "big" at weight 128."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    if bitorder == "big":
        place = 7 - place
    return (bits.to(torch.uint8) << place).sum(dim=1, dtype=torch.uint8)


def packbits(x: torch.Tensor, bitorder: str) -> torch.Tensor:
    """uint8 `[ceil(n / 8)]` of bool `[n]`, the last byte filled with zeros."""
    padded = functional.pad(x, (0, -x.numel() % 8))
    return _bytes(padded.view(-1, 8), bitorder)


def packed_indptr(indptr: torch.Tensor) -> torch.Tensor:
    """Byte offsets `[batch_size + 1]` of segments with bit offsets `indptr`, each segment starting on a byte."""
    num_bytes = torch.div(indptr.diff() + 7, 8, rounding_mode="floor")
    return functional.pad(num_bytes.cumsum(0, dtype=indptr.dtype), (1, 0))


def segment_packbits(
    x: torch.Tensor, indptr: torch.Tensor, byte_indptr: torch.Tensor, num_bytes: int, bitorder: str
) -> torch.Tensor:
    """uint8 `[num_bytes]`: segment i of bool `x` fills bytes `byte_indptr[i]` to `byte_indptr[i + 1]`.

    num_bytes: at least `byte_indptr[-1]`, known on the host (the rest is 0); nothing here waits for the device.
    """
    if x.numel() == 0:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=x.device)
    byte = torch.arange(num_bytes, device=x.device)
    segment = torch.searchsorted(byte_indptr[1:], byte, right=True).clamp(max=indptr.numel() - 2)
    first_bit = indptr[segment] + 8 * (byte - byte_indptr[segment])
    bit = first_bit[:, None] + torch.arange(8, device=x.device)
    inside = bit < indptr[segment + 1][:, None]
    return _bytes(x[bit.clamp(max=x.numel() - 1)] & inside, bitorder)
