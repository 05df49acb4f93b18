"""Grouped matrix products: groups of rows of unequal number, each with a weight matrix of its own."""

from __future__ import annotations

from typing import Any

import torch

from flashinfer.core import check, library
from flashinfer.core.replay import replayed
from flashinfer.core.select import Choice, Impl
from flashinfer.ops.gemm.dense import dense
from flashinfer.ops.gemm.spec import (
    ACTIVATIONS,
    FP4_BLOCK,
    FP8_BLOCK,
    GATED,
    KINDS,
    MAP_BYTES,
    Activation,
    Epilogue,
    Gemm,
    GemmSpec,
    Rows,
    Weights,
)
from flashinfer.ops.gemm.support import gluon_sm90_supports, torch_supports, triton_supports

IMPLS = (
    Impl("gluon_sm90", "flashinfer.ops.gemm.gluon_sm90", gluon_sm90_supports),
    Impl("triton", "flashinfer.ops.gemm.triton", triton_supports),
    Impl("torch", "flashinfer.ops.gemm.reference", torch_supports),
)
CHOICE = Choice(IMPLS)
NO_EPILOGUE = Epilogue()


def grouped_gemm(
    rows: Rows,
    weights: Weights,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    expected_rows: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """The product of each group's rows with its weights, `[nnz, N]`, or `[nnz, N / 2]` with a gated activation.

    nnz: the rows of `out`, of `rows.indices`, or of `rows.values`; at least what groups own. Rows of `out` that
    no group owns stay as they are. out_dtype: of a new result; default: that of 16-bit values, bf16 for fp8.
    expected_rows: of a group, about, where that is far from nnz over the number of groups.
    The group sizes stay on the device: it neither waits nor reads them. Checks nothing; callers do.
    """
    activation = epilogue.activation or Activation("identity")
    if out is None:
        values = rows.values
        num_rows = (values if rows.indices is None else rows.indices).shape[0]
        n = weights.values.shape[1] // (2 if activation.gated else 1)
        default = torch.bfloat16 if values.dtype.itemsize == 1 else values.dtype
        out = torch.empty(num_rows, n, dtype=out_dtype or default, device=values.device)
    scale, global_scale = weights.scale, weights.global_scale
    if weights.kind == "fp8_tensor" and global_scale is None:
        scale, global_scale = None, scale
    _product(
        out,
        (rows.values, weights.values),
        rows[1:],
        (weights.indices, scale, global_scale),
        (epilogue.bias, epilogue.row_weights, *activation[1:]),
        (weights.kind, "" if epilogue.activation is None else activation.kind, backend),
        expected_rows,
    )
    return out


@replayed
def _product(out: torch.Tensor, *others: Any) -> None:
    """`multiply`, with tuples for lists."""
    *lists, expected_rows = others
    multiply(out, *map(list, lists), expected_rows)


@library.register(
    "grouped_gemm(Tensor(a!) out, Tensor[] sides, Tensor?[] rows, Tensor?[] weights, Tensor?[] epilogue, str[] names, "
    "int expected_rows) -> ()"
)
def multiply(
    out: torch.Tensor,
    sides: list[torch.Tensor],
    rows: list[torch.Tensor | None],
    weights: list[torch.Tensor | None],
    epilogue: list[torch.Tensor | None],
    names: list[str],
    expected_rows: int,
) -> None:
    """`grouped_gemm` of tensors.

    sides: values of rows and of weights. rows, weights, epilogue: what else these have, in the order of their fields.
    names: kind of the weights, activation ("" for none), backend.
    """
    kind, activation, backend = names
    indices, scale, global_scale = weights
    bias, row_weights, *parameters = epilogue
    tensors = Gemm(
        out,
        Rows(sides[0], *rows),
        Weights(sides[1], indices, scale, kind, global_scale),
        Epilogue(bias, Activation(activation, *parameters) if activation else None, row_weights),
        expected_rows,
    )
    if out.numel() == 0 or tensors.num_groups == 0:
        return
    if out.is_cpu:
        check_values(tensors)
    CHOICE.call(tensors.spec, out.device, backend)(tensors)


def check_values(tensors: Gemm) -> None:
    """Check on the CPU that all groups lie inside of what there is; raises ValueError."""
    rows, weights = tensors.rows, tensors.weights
    num_rows = tensors.out.shape[0]
    owned = num_rows
    if rows.indptr is not None:
        check.indptr("indptr", rows.indptr)
        check.index_range("indptr", rows.indptr, 0, num_rows + 1)
        owned = int(rows.indptr[-1])
    elif rows.lengths is not None:
        check.index_range("lengths", rows.lengths, 0, num_rows // tensors.num_groups + 1)
    if rows.indices is not None and rows.lengths is None:
        check.index_range("row indices", rows.indices[:owned], 0, rows.values.shape[0])
    if weights.indices is not None:
        check.index_range("weight indices", weights.indices, -(2**31), weights.values.shape[0])


def batched_fp8(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor
) -> None:
    """`out [b, m, n] = a [b, m, k] @ b [b, k, n] * a_scale * b_scale`; scales fp32 `[1]`."""
    batch, rows, n = out.shape
    flat = out.stride(0) == out.stride(1) * rows or batch == 1
    result = out if flat else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    weights = Weights(b.transpose(1, 2), kind="fp8_tensor", global_scale=b_scale)
    grouped_gemm(Rows(a.flatten(0, 1), scale=a_scale), weights, out=result.view(batch * rows, n))
    if not flat:
        out.copy_(result)


def indptr_of(lengths: torch.Tensor) -> torch.Tensor:
    """int32 `[groups + 1]`: where groups of these lengths begin and end."""
    indptr = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=indptr[1:])
    return indptr


def even_bounds(rows: torch.Tensor, size: int) -> torch.Tensor | None:
    """Bounds of groups of `size` rows, of which the last may have fewer; None where it has not."""
    if rows.shape[0] % size == 0:
        return None
    groups = -(-rows.shape[0] // size)
    return (torch.arange(groups + 1, dtype=torch.int32, device=rows.device) * size).clamp_(max=rows.shape[0])


__all__ = [
    "ACTIVATIONS",
    "CHOICE",
    "FP4_BLOCK",
    "FP8_BLOCK",
    "GATED",
    "IMPLS",
    "KINDS",
    "MAP_BYTES",
    "Activation",
    "Epilogue",
    "Gemm",
    "GemmSpec",
    "Rows",
    "Weights",
    "batched_fp8",
    "check_values",
    "dense",
    "even_bounds",
    "grouped_gemm",
    "indptr_of",
    "multiply",
]
