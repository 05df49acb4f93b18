"""Logits soft cap: cap * tanh(logits / cap) (Gemma 2, arXiv 2408.00118, section 2)."""

from __future__ import annotations

import torch

from flashinfer.device.language import tl
from flashinfer.ops.attention.variant import Twin, Variant, variant


def _tanh(captured, y, at):
    # tanh(y) = 1 - 2 / (exp(2 y) + 1) saturates to +-1 without overflow to NaN, but cancels near 0: a series there.
    square = y * y
    near = y * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)))
    far = 1.0 - 2.0 / (tl.exp(2.0 * y) + 1.0)
    return tl.where(tl.abs(y) < 0.1, near, far)


def _fast_tanh(captured, y, at):
    # One instruction; relative error 2^-11 (PTX ISA, tanh.approx), below that of 16-bit queries and keys.
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)


def _twin(captured, x, at):
    return captured[0] * torch.tanh(x / captured[0])


def soft_cap(cap: float, fast: bool = False) -> Variant:
    """cap: the bound of the logits, > 0, in natural units (of q . k * sm_scale).

    fast: with the GPU's own tanh, whose error is that of 16-bit operands; NVIDIA only.
    """
    tanh = _fast_tanh if fast else _tanh
    cap = float(cap)
    return variant("soft_cap", captured=(cap,), logits=tanh, unit=(1.0 / cap, cap), limit=cap, twin=Twin(logits=_twin))
