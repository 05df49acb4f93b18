"""Rotary position embedding in plain torch (Su et al., arXiv 2104.09864): fp32 angles, in place, no host sync.

The pair (a, b) of a head at position p becomes (a cos - b sin, b cos + a sin) with the angle p * frequency. Pairs are
(d, d + rotary_dim/2) in the NeoX order and (2d, 2d + 1) in the interleaved one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Smoothing:
    """Llama 3.1's scaling of frequencies by their wavelength in tokens.

    Above old_context_len / low_freq_factor they are divided by rope_scale, below old_context_len / high_freq_factor
    kept; between the two the result moves linearly with the frequency.
    """

    low_freq_factor: float
    high_freq_factor: float
    old_context_len: float


@dataclass(frozen=True)
class Rope:
    """How heads are rotated: the first rotary_dim components, in pairs; rope_scale divides positions."""

    rotary_dim: int
    interleave: bool
    rope_scale: float
    rope_theta: float
    smoothing: Smoothing | None = None


def _frequencies(rope: Rope, device: torch.device) -> torch.Tensor:
    """fp32 `[rotary_dim / 2]` radians a token, made in fp64."""
    exponent = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float64, device=device) / rope.rotary_dim
    frequency = torch.exp(-exponent * math.log(rope.rope_theta))
    stretched = frequency / rope.rope_scale
    if rope.smoothing is not None:
        low, high = rope.smoothing.low_freq_factor, rope.smoothing.high_freq_factor
        turns = rope.smoothing.old_context_len * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        stretched = torch.lerp(stretched, frequency, kept)
    return stretched.float()


def angles(rope: Rope, positions: torch.Tensor) -> torch.Tensor:
    """fp32 `[nnz, rotary_dim / 2]` radians for integer `positions` `[nnz]`."""
    return positions.float()[:, None] * _frequencies(rope, positions.device)


def request_positions(indptr: torch.Tensor, offsets: torch.Tensor, nnz: int) -> torch.Tensor:
    """int64 `[nnz]`: token j of request i stands at `offsets[i] + j`; tokens past `indptr[-1]` get 0 (no rotation)."""
    token = torch.arange(nnz, device=indptr.device)
    if offsets.numel() == 0:
        return torch.zeros_like(token)
    request = torch.searchsorted(indptr[1:], token, right=True)
    inside = request < offsets.numel()
    request = request.clamp(max=offsets.numel() - 1)
    return torch.where(inside, offsets[request] + token - indptr[request], 0)


def rotate_inplace(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleave: bool) -> None:
    """Rotate the first `2 * cos.shape[-1]` components of `x` `[nnz, num_heads, head_dim]` (any strides) in place.

    cos, sin: fp32 `[nnz, rotary_dim / 2]`.
    """
    half = cos.shape[-1]
    rotated = x[..., : 2 * half]
    a, b = (rotated[..., 0::2], rotated[..., 1::2]) if interleave else (rotated[..., :half], rotated[..., half:])
    cos, sin = cos[:, None, :], sin[:, None, :]
    wide_a, wide_b = a.float(), b.float()
    new_a = wide_a * cos - wide_b * sin
    new_b = wide_b * cos + wide_a * sin
    a.copy_(new_a)
    b.copy_(new_b)


def rotate_by_angles(rope: Rope, positions: torch.Tensor, *heads: torch.Tensor) -> None:
    """Rotate each of `heads` `[nnz, num_heads, head_dim]` in place for `positions` `[nnz]`."""
    angle = angles(rope, positions)
    cos, sin = angle.cos(), angle.sin()
    for x in heads:
        rotate_inplace(x, cos, sin, rope.interleave)
