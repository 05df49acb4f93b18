"""What every attention kernel is given besides its schedule: the output and the factors of a run."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from flashinfer.core.launch import alignment, integer_classes
from flashinfer.ops.attention.spec import Scales, Tensors

LOG2_E = tl.constexpr(1.4426950408889634)
Config = TypeVar("Config")


class Output(NamedTuple):
    """out `[rows, num_qo_heads, head_dim_vo]`, strides in elements; lse fp32 `[rows, num_qo_heads]` or None."""

    data: torch.Tensor
    stride_row: int
    stride_head: int
    lse: torch.Tensor | None
    lse_stride: int

    @staticmethod
    def of(tensors: Tensors) -> Output:
        stride_row, stride_head, _ = tensors.out.stride()
        lse = tensors.lse
        return Output(tensors.out, stride_row, stride_head, lse, 0 if lse is None else lse.stride(0))


class Factors(NamedTuple):
    """`Scales` of a run: logits = q . k * sm_scale * logits[head]; outputs are multiplied by output_scale *
    output[head].

    sinks: extra logits of the denominator. The tensors are fp32 `[num_qo_heads]` or None; a stride of -1 stands for a
    factor that is not there, 0 for one value for all heads.
    """

    sm_scale: float
    output_scale: float
    logits: torch.Tensor | None
    logits_stride: int
    output: torch.Tensor | None
    output_stride: int
    sinks: torch.Tensor | None

    @staticmethod
    def of(scales: Scales) -> Factors:
        logits, output = (-1 if x is None else int(x.numel() > 1) for x in (scales.logits, scales.output))
        return Factors(scales.sm_scale, scales.output_scale, scales.logits, logits, scales.output, output, scales.sinks)


def call_key(tensors: Tensors, output: Output, factors: Factors) -> Hashable:
    """What a compiled kernel depends on of these (see `Prebound`); strides of q, k and v are the caller's to add."""
    optional = (output.lse is None, factors.logits_stride, factors.output_stride, factors.sinks is None)
    strides = integer_classes((output.stride_row, output.stride_head, output.lse_stride))
    return strides, optional, alignment(*tensors, factors.logits, factors.output, factors.sinks)


def config_for(config: Config, scales: Scales) -> Config:
    """`config`, with natural logits where the scale must come before the maximum.

    The maximum of the logits is that of the products only under one positive factor.
    """
    return _with_natural_logits(config) if scales.logits is not None or scales.sm_scale <= 0 else config


@cache
def _with_natural_logits(config: Any) -> Any:
    return replace(config, natural_logits=True)


@triton.jit
def add_sink(m_i, l_i, acc, sink):
    """The state with one more logit in its denominator; m_i and sink in base-2 units."""
    m_new = tl.maximum(m_i, sink)
    # -inf where the row saw nothing and the sink is none.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.math.exp2(m_i - shift)
    return m_new, l_i * alpha + tl.math.exp2(sink - shift), acc * alpha[:, None]
