"""The factors of a run as kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from flashinfer.ops.attention.spec import Scales

LOG2_E = tl.constexpr(1.4426950408889634)


class Factors(NamedTuple):
    """`Scales` of a run: logits = q . k * sm_scale * logits[head]; outputs are multiplied by output_scale *
    output[head].

    sinks: extra logits of the denominator. The tensors are fp32 `[num_qo_heads]` (stride 0 or 1) or None.
    """

    sm_scale: float
    output_scale: float
    logits: torch.Tensor | None
    logits_stride: int
    output: torch.Tensor | None
    output_stride: int
    sinks: torch.Tensor | None


def factors_of(scales: Scales) -> Factors:
    """The kernel's form; a stride of -1 stands for a factor that is not there, 0 for one value for all heads."""
    logits, output = (-1 if factor is None else int(factor.numel() > 1) for factor in (scales.logits, scales.output))
    return Factors(scales.sm_scale, scales.output_scale, scales.logits, logits, scales.output, output, scales.sinks)


def needs_natural_logits(scales: Scales) -> bool:
    """Whether logits must be scaled before the maximum: it is that of the products only under one positive factor."""
    return scales.logits is not None or scales.sm_scale <= 0
