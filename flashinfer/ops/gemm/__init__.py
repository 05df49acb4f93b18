"""Grouped matrix products: groups of rows of unequal number, each with a weight matrix of its own."""

from __future__ import annotations

import torch

from flashinfer.core import library
from flashinfer.core.select import Choice, Impl
from flashinfer.ops.gemm.spec import (
    ACTIVATIONS,
    FP4_BLOCK,
    FP8_BLOCK,
    GATED,
    KINDS,
    Activation,
    Epilogue,
    Gemm,
    GemmSpec,
    Rows,
    Weights,
)
from flashinfer.ops.gemm.support import torch_supports, triton_supports

IMPLS = (
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
    backend: str = "auto",
) -> torch.Tensor:
    """The product of each group's rows with its weights, `[nnz, N]`, or `[nnz, N / 2]` with a gated activation.

    nnz: the rows of `out`, of `rows.indices`, or of `rows.values`; at least what groups own. Rows of `out` that
    no group owns stay as they are. out_dtype: of a new result; default: that of 16-bit values, bf16 for fp8.
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
    multiply(
        out,
        [rows.values, weights.values],
        list(rows[1:]),
        [weights.indices, scale, global_scale],
        [epilogue.bias, epilogue.row_weights, *activation[1:]],
        weights.kind,
        "" if epilogue.activation is None else activation.kind,
        backend,
    )
    return out


@library.register(
    "grouped_gemm(Tensor(a!) out, Tensor[] sides, Tensor?[] rows, Tensor?[] weights, Tensor?[] epilogue, str kind, "
    "str activation, str backend) -> ()"
)
def multiply(
    out: torch.Tensor,
    sides: list[torch.Tensor],
    rows: list[torch.Tensor | None],
    weights: list[torch.Tensor | None],
    epilogue: list[torch.Tensor | None],
    kind: str,
    activation: str,
    backend: str,
) -> None:
    """`grouped_gemm` of tensors: of Rows and Weights the values, then the other fields in their order."""
    indices, scale, global_scale = weights
    bias, row_weights, *parameters = epilogue
    tensors = Gemm(
        out,
        Rows(sides[0], *rows),
        Weights(sides[1], indices, scale, kind, global_scale),
        Epilogue(bias, Activation(activation, *parameters) if activation else None, row_weights),
    )
    if out.numel() == 0 or tensors.num_groups == 0:
        return
    CHOICE.call(tensors.spec, out.device, backend)(tensors)


__all__ = [
    "ACTIVATIONS",
    "CHOICE",
    "FP4_BLOCK",
    "FP8_BLOCK",
    "GATED",
    "IMPLS",
    "KINDS",
    "Activation",
    "Epilogue",
    "Gemm",
    "GemmSpec",
    "Rows",
    "Weights",
    "grouped_gemm",
    "multiply",
]
