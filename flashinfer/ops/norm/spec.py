"""The records of a norm: what kind it is (host values), and the tensors it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class NormSpec:
    """One kind of norm over the last dimension of `hidden_size` elements.

    centred: LayerNorm (the mean is taken off, a shift added) rather than RMSNorm. adds: whether the input is first
    added to a residual, which is written. out_dtype: the input's, or an fp8 dtype for the scaled result.
    """

    hidden_size: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    out_dtype: torch.dtype
    centred: bool
    adds: bool
    weight_bias: float


class Norm(NamedTuple):
    """The tensors of a norm, on one device, innermost stride 1.

    out, input, residual: `[rows, hidden_size]` or `[rows, num_heads, hidden_size]`, any strides else; out may be input.
    weight, shift: `[hidden_size]`, contiguous; the factor is weight + weight_bias, the shift LayerNorm's. scale: fp32
    of one element, which the result is divided by.
    """

    out: torch.Tensor
    input: torch.Tensor
    weight: torch.Tensor
    residual: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    scale: torch.Tensor | None = None
