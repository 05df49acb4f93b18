"""Gated activations with FlashInfer's names and signatures.

`enable_pdl` (programmatic dependent launch) is accepted everywhere and ignored: it changes no result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashinfer.core import check
from flashinfer.ops import activation as ops

ROW_ALIGNMENT = 16  # bytes; what callers of FlashInfer are held to, so that rows can be read in 16-byte vectors


def _and_mul(
    op: Callable[[torch.Tensor, torch.Tensor], None], input: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    check.tensor("input", input, dtypes=check.FLOAT_DTYPES, inner_contiguous=True)
    if input.dim() == 0:
        raise ValueError(check.problem("input", "0 dimensions", "[..., 2 * hidden_size]", "Pass rows of both halves."))
    size = input.shape[-1]
    check.multiple("last dimension of input in bytes", size * input.element_size(), "row alignment", ROW_ALIGNMENT)
    shape = (*input.shape[:-1], size // 2)
    if out is None:
        out = torch.empty(shape, dtype=input.dtype, device=input.device)
    else:
        check.tensor("out", out, dtypes=(input.dtype,), shape=shape, like=("input", input))
    op(input, out)
    return out


def silu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """`silu(input[..., :d]) * input[..., d:]`, computed in fp32.

    input: `[..., 2 * d]`, fp32, fp16 or bf16, innermost stride 1, rows of a multiple of 16 bytes.
    out: `[..., d]`, input's dtype and device; made if not given. Returns out. Raises ValueError for anything else.
    """
    return _and_mul(ops.silu_and_mul, input, out)


def gelu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """`gelu(input[..., :d]) * input[..., d:]` with the exact (erf) GELU; otherwise as `silu_and_mul`."""
    return _and_mul(ops.gelu_and_mul, input, out)


def gelu_tanh_and_mul(
    input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None
) -> torch.Tensor:
    """`gelu(input[..., :d]) * input[..., d:]` with the tanh approximation of GELU; otherwise as `silu_and_mul`."""
    return _and_mul(ops.gelu_tanh_and_mul, input, out)
