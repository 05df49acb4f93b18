"""ALiBi: a bias linear in the distance, one slope a head (Press et al., arXiv 2108.12409)."""

from __future__ import annotations

import math

import torch

from flashinfer.device.language import tl
from flashinfer.ops.attention.variant import Twin, Variant, variant


def get_alibi_slopes(num_heads: int) -> torch.Tensor:
    """Slopes `[num_heads]` fp32 on the CPU: 2^(-8 i / n) for n a power of two; the odd ones of 2n fill up the rest."""
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / n) for i in range(num_heads - n)]
    return torch.tensor(slopes, dtype=torch.float32)


def _logits(captured, x, at):
    distance = at.kv_idx - (at.kv_len - at.qo_len + at.qo_idx)
    return x + tl.load(captured[0] + at.qo_head) * distance.to(tl.float32)


def _twin(captured, x, at):
    return x + captured[0][at.qo_head] * (at.kv_idx - (at.kv_len - at.qo_len + at.qo_idx))


def alibi(slopes: torch.Tensor) -> Variant:
    """slopes: `[num_qo_heads]` fp32, on the device of the queries."""
    return variant("alibi", captured=(slopes,), logits=_logits, twin=Twin(logits=_twin))
