"""Rotary embedding of queries and keys on the fly (Su et al., arXiv 2104.09864), NeoX halves, as Llama has it.

Component d of a head pairs with d + head_dim/2; the pair (a, b) at position p becomes
(a cos - b sin, b cos + a sin) with the angle p / rope_scale * rope_theta^(-2 d / head_dim).
"""

from __future__ import annotations

import math

import torch

from flashinfer.device.language import tl
from flashinfer.ops.attention.variant import Twin, Variant, variant


def _rotate(captured, x, partner, pos, dims, HEAD_DIM):
    half = HEAD_DIM // 2
    frequency = tl.exp2((dims % half).to(tl.float32) * captured[1])
    angle = pos.to(tl.float32) * captured[0] * frequency
    signed = tl.where(dims < half, -partner, partner)
    return x * tl.cos(angle) + signed * tl.sin(angle)


def _twin(captured, x, pos):
    rate, log2_step = captured
    half = x.shape[-1] // 2
    frequency = torch.exp2(torch.arange(half, device=x.device, dtype=torch.float32) * log2_step)
    angle = (pos.to(torch.float32)[:, None] * rate * frequency)[:, None, :].to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rope(rope_scale: float, rope_theta: float, head_dim: int) -> Variant:
    """rope_scale divides positions; rope_theta is the base of the frequencies; head_dim is rotated whole."""
    captured = (1.0 / rope_scale, -2.0 * math.log2(rope_theta) / head_dim)
    return variant("rope", captured=captured, query=_rotate, key=_rotate, twin=Twin(rotate=_twin))
