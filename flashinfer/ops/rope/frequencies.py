"""Frequencies of rotation, made once for each device."""

from __future__ import annotations

import math

import torch

from flashinfer.ops.rope.spec import Rope

_known: dict[tuple[Rope, torch.device], torch.Tensor] = {}


def frequencies(rope: Rope, device: torch.device) -> torch.Tensor:
    """int64 `[rotary_dim / 2]` turns a token in units of 2^-64, less whole turns; the first call waits for the device.

    Multiplied by a position in int64, which wraps, they give the angle exactly at any position; radians in fp32 would
    be wrong by a position's worth of their eps, 0.006 at position 100,000.
    While a CUDA graph is captured they are made anew: what a capture allocates belongs to its graph.
    """
    known = _known.get((rope, device))
    if known is None:
        known = _make(rope, device)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return known
            torch.cuda.current_stream(device).synchronize()  # other streams read them from now on
        _known[rope, device] = known
    return known


def _make(rope: Rope, device: torch.device) -> torch.Tensor:
    exponent = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float64, device=device) / rope.rotary_dim
    frequency = torch.exp(-exponent * math.log(rope.rope_theta))
    stretched = frequency / rope.rope_scale
    if rope.smoothing is not None:
        low, high = rope.smoothing.low_freq_factor, rope.smoothing.high_freq_factor
        turns = rope.smoothing.old_context_len * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        stretched = torch.lerp(stretched, frequency, kept)
    turns = stretched / (2 * math.pi)
    return ((turns - torch.floor(turns + 0.5)) * 2.0**64).long()
