"""What is done to a tile of fp32 sums: scale, bias, activation, row weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.activation import gelu, silu


class Finish(NamedTuple):
    """bias `[W, N]` of row stride bias_stride; row_weights fp32 `[nnz]`; alpha, beta, limit fp32 `[W]`; None: none.

    row_factor: fp32, one element; matrix_factor: fp32 `[W]` (matrix_stride 1) or one element (0): multiply the sums.
    """

    bias: torch.Tensor | None
    bias_stride: int
    row_weights: torch.Tensor | None
    alpha: torch.Tensor | None
    beta: torch.Tensor | None
    limit: torch.Tensor | None
    row_factor: torch.Tensor | None
    matrix_factor: torch.Tensor | None
    matrix_stride: int


Parameters = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def finish_with(
    bias: torch.Tensor | None,
    row_weights: torch.Tensor | None,
    parameters: Parameters,
    row_factor: torch.Tensor | None,
    matrix_factor: torch.Tensor | None,
) -> Finish:
    """The record of these tensors, with their strides; parameters: alpha, beta, limit."""
    bias_stride = 0 if bias is None else bias.stride(0)
    matrix_stride = int(matrix_factor is not None and matrix_factor.numel() > 1)
    return Finish(bias, bias_stride, row_weights, *parameters, row_factor, matrix_factor, matrix_stride)


@triton.jit
def factor_of(finish, w):
    """What every sum of matrix `w` is multiplied by; 1.0 where nothing."""
    factor = 1.0
    if finish[6] is not None:
        factor = tl.load(finish[6])
    if finish[7] is not None:
        factor = factor * tl.load(finish[7] + w * finish[8])
    return factor


@triton.jit
def add_bias(x, finish, w, offs_col, num_cols):
    """x `[rows, cols]` plus the bias of matrix `w` in columns `offs_col`."""
    if finish[0] is not None:
        at = finish[0] + w.to(tl.int64) * finish[1] + offs_col
        x += tl.load(at, mask=offs_col < num_cols, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def swiglu(up, gate, finish, w):
    """`gate * sigmoid(alpha * gate) * (up + beta)`, both limited first; NaN stays."""
    if finish[5] is not None:
        limit = tl.load(finish[5] + w)
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if finish[3] is None:
        result = silu(gate)
    else:
        result = gate / (1.0 + tl.exp(-tl.load(finish[3] + w) * gate))
    if finish[4] is not None:
        up += tl.load(finish[4] + w)
    return result * up


@triton.jit
def geglu(up, gate, finish, w):
    return gelu(gate) * up


@triton.jit
def relu(x):
    """NaN stays."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def relu2(x):
    return relu(x) * relu(x)


# Of pairs (up, gate), and of single numbers.
PAIRED = {"swiglu": swiglu, "geglu": geglu}
SINGLE = {"": None, "silu": silu, "gelu": gelu, "relu": relu, "relu2": relu2, "identity": None}
