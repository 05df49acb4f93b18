"""The records of a gated activation: what kind it is (host values), and the tensors it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class GatedSpec:
    """One kind of gated activation: `name(x) * gate` of rows of `width` elements each.

    name: "silu", "gelu" (erf) or "gelu_tanh". out_dtype: the input's, or an fp8 dtype for the scaled result.
    """

    name: str
    width: int
    dtype: torch.dtype
    out_dtype: torch.dtype


class Gated(NamedTuple):
    """The tensors, on one device, innermost stride 1.

    out `[..., width]`, input `[..., 2 * width]` (x, then gate); scale: fp32 of one element, which the result is divided
    by.
    """

    out: torch.Tensor
    input: torch.Tensor
    scale: torch.Tensor | None = None
