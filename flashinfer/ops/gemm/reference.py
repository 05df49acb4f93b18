"""Grouped matrix products in plain torch, group by group: what they mean. On a GPU it waits for the group sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from flashinfer.core.arch import Arch
from flashinfer.ops.gemm.spec import FP4_BLOCK, FP8_BLOCK, Activation, Epilogue, Gemm, GemmSpec, Rows, Weights

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def bind(spec: GemmSpec, arch: Arch) -> Callable[[Gemm], None]:
    """The call for one kind of product."""
    return run


@torch.no_grad()
def run(tensors: Gemm) -> None:
    """Write the rows of all groups to `out`; sums in fp32."""
    multiply(tensors, torch.float32)


def multiply(tensors: Gemm, dtype: torch.dtype) -> None:
    """`run` in any dtype: float64 is what others are judged by."""
    out, rows, weights, epilogue, _ = tensors
    for group, begin, end in spans(tensors):
        index = group if weights.indices is None else int(weights.indices[group])
        if begin == end:
            continue
        if index < 0:
            out[begin:end].zero_()
            continue
        sums = left(rows, begin, end, dtype) @ matrix(weights, index, dtype).T
        if weights.kind == "fp8_tensor" and rows.scale is not None:
            sums = sums * rows.scale.reshape(()).to(dtype)
        if weights.global_scale is not None:
            sums = sums * per_matrix(weights.global_scale, index).to(dtype)
        out[begin:end].copy_(finish(sums, epilogue, index, slice(begin, end)))


def spans(tensors: Gemm) -> Iterator[tuple[int, int, int]]:
    """(group, its first row, the row behind its last)."""
    rows, num_groups, num_rows = tensors.rows, tensors.num_groups, tensors.out.shape[0]
    if rows.indptr is not None:
        bounds = rows.indptr.tolist()
        yield from ((g, bounds[g], min(bounds[g + 1], num_rows)) for g in range(num_groups))
        return
    room = num_rows // max(num_groups, 1)
    lengths = [room] * num_groups if rows.lengths is None else rows.lengths.tolist()
    yield from ((g, g * room, g * room + n) for g, n in enumerate(lengths))


def left(rows: Rows, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows `begin` to `end` of the left side, times their block scales."""
    if rows.indices is None:
        chosen = torch.arange(begin, end, device=rows.values.device)
        values = rows.values[begin:end].to(dtype)
    else:
        chosen = rows.indices[begin:end].long()
        values = _gathered(rows.values, chosen).to(dtype)
    if rows.scale is None or rows.scale.dim() < 2:
        return values
    shared = 1 if rows.scale.shape[0] == rows.values.shape[0] else FP8_BLOCK
    return values * _spread(rows.scale[chosen // shared], values.shape[1], FP8_BLOCK).to(dtype)


def matrix(weights: Weights, index: int, dtype: torch.dtype) -> torch.Tensor:
    """`[N, K]` of one weight matrix, times its block scales."""
    values = weights.values[index]
    if weights.kind in FP4_BLOCK:
        assert weights.scale is not None
        numbers = _e2m1(values, dtype)
        return numbers * _spread(_fp4_scales(weights, index), numbers.shape[1], FP4_BLOCK[weights.kind]).to(dtype)
    if weights.scale is None:
        return values.to(dtype)
    scale = weights.scale[index]
    if scale.shape[0] != values.shape[0]:
        scale = scale.repeat_interleave(FP8_BLOCK, dim=0)[: values.shape[0]]
    return values.to(dtype) * _spread(scale, values.shape[1], FP8_BLOCK).to(dtype)


def _gathered(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """fp8 tensors cannot be indexed on every device; their bytes can."""
    return x.view(torch.uint8)[rows].view(x.dtype) if x.dtype.itemsize == 1 else x[rows]


def _spread(scale: torch.Tensor, columns: int, block: int) -> torch.Tensor:
    """A scale for every column."""
    return scale.repeat_interleave(block, dim=-1)[..., :columns]


def _e2m1(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers `[..., 2 * n]` of bytes `[..., n]`, the first of a pair in the low bits."""
    codes = torch.stack([x & 15, x >> 4], dim=-1).flatten(-2).long()
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=dtype, device=x.device)
    return table[codes]


def _fp4_scales(weights: Weights, index: int) -> torch.Tensor:
    assert weights.scale is not None
    scale = weights.scale[index]
    if weights.kind == "nvfp4":
        return scale.view(torch.float8_e4m3fn).float()
    powers = torch.ldexp(torch.ones(scale.shape, device=scale.device), scale.int() - 127)
    return powers.masked_fill(scale == 255, torch.nan)


def per_matrix(x: torch.Tensor, index: int) -> torch.Tensor:
    """The entry of a matrix in a tensor of one element for all or one for each."""
    return x.reshape(-1)[index if x.numel() > 1 else 0]


# ---- what is done to the sums


def finish(sums: torch.Tensor, epilogue: Epilogue, index: int, rows: slice) -> torch.Tensor:
    """Bias, activation and row weights, in the dtype of the sums."""
    bias, activation, row_weights = epilogue
    if bias is not None:
        sums = sums + bias[index].to(sums.dtype)
    if activation is not None:
        sums = ACTIVATIONS[activation.kind](sums, activation, index)
    return sums if row_weights is None else sums * row_weights[rows, None].to(sums.dtype)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """`x * Phi(x)`; Phi(x) = erfc(-x / sqrt(2)) / 2, exact where 1 + erf would cancel."""
    return 0.5 * x * torch.erfc(-math.sqrt(0.5) * x)


def _swiglu(x: torch.Tensor, activation: Activation, index: int) -> torch.Tensor:
    up, gate = x.chunk(2, dim=-1)
    alpha, beta, limit = (None if t is None else t[index].to(x.dtype) for t in activation[1:])
    if limit is not None:
        gate, up = torch.minimum(gate, limit), torch.maximum(torch.minimum(up, limit), -limit)
    turned = gate if alpha is None else alpha * gate
    return gate * torch.sigmoid(turned) * (up if beta is None else up + beta)


def _geglu(x: torch.Tensor, activation: Activation, index: int) -> torch.Tensor:
    up, gate = x.chunk(2, dim=-1)
    return gelu(gate) * up


def _plain(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *_: object) -> torch.Tensor:
    return function(x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor, Activation, int], torch.Tensor]] = {
    "swiglu": _swiglu,
    "geglu": _geglu,
    "relu2": partial(_plain, lambda x: torch.relu(x).square()),
    "silu": partial(_plain, torch.nn.functional.silu),
    "gelu": partial(_plain, gelu),
    "relu": partial(_plain, torch.relu),
    "identity": partial(_plain, lambda x: x),
}
