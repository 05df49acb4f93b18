"""Gated activations with FlashInfer's names and signatures.

`enable_pdl` (programmatic dependent launch) is accepted everywhere and ignored: it changes no result.
"""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.core.library import Op
from flashinfer.ops import activation as ops

ROW_ALIGNMENT = 16  # bytes; what callers of FlashInfer are held to, so that rows can be read in 16-byte vectors


def _out_shape(input: torch.Tensor) -> tuple[int, ...]:
    """Check `input` `[..., 2 * d]`; `[..., d]`."""
    check.tensor("input", input, dtypes=check.FLOAT_DTYPES, inner_contiguous=True)
    if input.dim() == 0:
        raise ValueError(check.problem("input", "0 dimensions", "[..., 2 * hidden_size]", "Pass rows of both halves."))
    size = input.shape[-1]
    check.multiple("last dimension of input in bytes", size * input.element_size(), "row alignment", ROW_ALIGNMENT)
    return (*input.shape[:-1], size // 2)


def _is_plain(input: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether all is as it mostly is, so that nothing is left to check."""
    return (
        isinstance(input, torch.Tensor)
        and isinstance(out, torch.Tensor)
        and input.dim() == out.dim() == 2
        and input.shape[0] == out.shape[0]
        and input.shape[1] == 2 * out.shape[1]
        and input.shape[1] % ROW_ALIGNMENT == 0
        and input.dtype == out.dtype
        and input.dtype in check.FLOAT_DTYPES
        and input.device == out.device
        and input.stride(1) == out.stride(1) == 1
    )


def _and_mul(op: Op, input: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        out = torch.empty(_out_shape(input), dtype=input.dtype, device=input.device)
    elif not _is_plain(input, out):
        shape, like = _out_shape(input), ("input", input)
        check.tensor("out", out, dtypes=(input.dtype,), shape=shape, like=like, inner_contiguous=True)
    op(out, input, None)
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


def silu_and_mul_quant(
    out: torch.Tensor, input: torch.Tensor, scale: torch.Tensor, enable_pdl: bool | None = None
) -> torch.Tensor:
    """`silu_and_mul(input) / scale` in fp8, in one pass: rounded once, saturating, NaN kept. Returns out.

    Not in FlashInfer, which has this for fp4 and mxfp8 only; the arguments are those of its `rmsnorm_quant`.
    out: `[..., d]`, float8_e4m3fn or float8_e5m2, innermost stride 1. scale: fp32, one element, on the device.
    """
    shape, like = _out_shape(input), ("input", input)
    check.tensor("out", out, dtypes=check.FP8_DTYPES, shape=shape, like=like, inner_contiguous=True)
    check.scalar("scale", scale, like=like)
    ops.silu_and_mul(out, input, scale)
    return out
