"""The records of a grouped matrix product: its two sides, what is done to the result, and what kind it is.

Every row r of group g gives `out[r] = finish(values[r] @ weights[w(g)].T)`: rows are sorted by group, each group has a
weight matrix of its own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

# Elements of a row that share a scale, and rows of a weight matrix that do; by kind of the weights.
FP8_BLOCK = 128
FP4_BLOCK = {"mxfp4": 32, "nvfp4": 16}
KINDS = ("plain", "fp8_tensor", "fp8_block", *FP4_BLOCK)
GATED = ("swiglu", "geglu")
ACTIVATIONS = (*GATED, "relu2", "silu", "gelu", "relu", "identity")
# Rows a group, on average, up to which 4-bit weights take longer to come than to be multiplied.
FEW_ROWS = 32
# Bytes that the address and all strides of a tensor map are multiples of.
MAP_BYTES = 16


class Rows(NamedTuple):
    """The left side, sorted by group.

    values: `[T, K]`, any row stride, innermost 1; fp16, bf16, fp32, or fp8. Group g owns rows `indptr[g]` to
    `indptr[g + 1]` of the product: indptr int32 or int64 `[G + 1]`, never read on the host. Without indptr all groups
    have room for equally many rows, of which `lengths[g]` (int32 or int64 `[G]`) exist, or all; the number of groups is
    then that of lengths, else of the weights' indices, else of the weights. indices: int32 or int64 `[nnz]`, row r of
    the product is made of `values[indices[r]]`; None: of `values[r]`. scale: fp32, what fp8 values are multiplied by:
    `[ceil(T / rows), ceil(K / 128)]` for kind "fp8_block", with 1 or 128 rows to a scale, any strides; one element for
    "fp8_tensor", None means 1.
    """

    values: torch.Tensor
    indptr: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


class Weights(NamedTuple):
    """The right side: W matrices of N rows and K columns.

    values: `[W, N, K]` with a stride of 1 in K or in N (a transposed view of `[W, K, N]`); for fp4 kinds uint8
    `[W, N, K / 2]`, the even column in the low four bits. indices: int32 or int64 `[G]`, any stride: group g uses
    `values[indices[g]]`; negative: its rows become 0. scale: what values are multiplied by: kind "fp8_block": fp32
    `[W, ceil(N / cols), ceil(K / 128)]` with 1 or 128 rows of the matrix to a scale; "mxfp4": uint8 e8m0
    `[W, N, K / 32]`; "nvfp4": e4m3 `[W, N, K / 16]`; else None. global_scale: fp32 `[W]` or one element, multiplies the
    sum; for "fp8_tensor" it is the scale of the weights.
    """

    values: torch.Tensor
    indices: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    kind: str = "plain"
    global_scale: torch.Tensor | None = None


class Activation(NamedTuple):
    """A function of the sums. Gated ones take pairs: of N columns the first half is up, the second gate.

    kind: "swiglu": `gate * sigmoid(alpha * gate) * (up + beta)` with `gate = min(gate, limit)` and up within
    [-limit, limit] first; "geglu": `gelu(gate) * up` (erf); "relu2": `max(x, 0)^2`; "silu", "gelu" (erf), "relu",
    "identity". alpha, beta, limit: fp32 `[W]`, for swiglu; None means 1, 0 and no limit.
    """

    kind: str
    alpha: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    limit: torch.Tensor | None = None

    @property
    def gated(self) -> bool:
        return self.kind in GATED


class Epilogue(NamedTuple):
    """What is done to the fp32 sums, in this order. bias: `[W, N]`; row_weights: fp32 `[nnz]`, multiply rows."""

    bias: torch.Tensor | None = None
    activation: Activation | None = None
    row_weights: torch.Tensor | None = None

    @property
    def parameters(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """alpha, beta and limit of the activation."""
        return (None, None, None) if self.activation is None else self.activation[1:]


class GemmSpec(NamedTuple):
    """One kind of product: what an implementation is chosen and configured by.

    kind: of the weights. n, k: of a weight matrix. layout: "one" group, "ragged" (indptr), "padded" (lengths), "equal"
    (room for equally many rows, all there). transposed: the stride of 1 is that of N. scale_rows, scale_cols: rows of
    `values`, and of a weight matrix, that share a scale; 0 without scales. row_map, weight_map, out_map: whether
    address and strides allow a tensor map (TMA) of rows, weights, result. activation: "" for none. few_rows: of fp4
    kinds, whether groups have FEW_ROWS rows at most. Defaults: the plainest product of groups.
    """

    kind: str
    row_dtype: torch.dtype
    weight_dtype: torch.dtype
    out_dtype: torch.dtype
    n: int
    k: int
    layout: str = "ragged"
    gathered: bool = False
    indexed: bool = False
    transposed: bool = False
    scale_rows: int = 0
    scale_cols: int = 0
    row_map: bool = True
    weight_map: bool = True
    out_map: bool = True
    bias: bool = False
    activation: str = ""
    row_weights: bool = False
    few_rows: bool = False

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def out_cols(self) -> int:
        return self.n // 2 if self.gated else self.n


class Gemm(NamedTuple):
    """All tensors of a product, on one device.

    out: `[nnz, N]`, or `[nnz, N / 2]` where gated; innermost stride 1. expected_rows: of a group, about, where that is
    far from nnz over the number of groups; 0 if not known. Tiles are chosen by it.
    """

    out: torch.Tensor
    rows: Rows
    weights: Weights
    epilogue: Epilogue
    expected_rows: int = 0

    @property
    def num_groups(self) -> int:
        rows, weights = self.rows, self.weights
        if rows.indptr is not None:
            return rows.indptr.shape[0] - 1
        if rows.lengths is not None:
            return rows.lengths.shape[0]
        return (weights.values if weights.indices is None else weights.indices).shape[0]

    @property
    def rows_at_once(self) -> int:
        """Of all groups together, about."""
        return self.expected_rows * self.num_groups or self.out.shape[0]

    @property
    def spec(self) -> GemmSpec:
        out, rows, weights, epilogue, _ = self
        values, matrices = rows.values, weights.values
        n = matrices.shape[1]
        blocks = weights.kind == "fp8_block"
        return GemmSpec(
            kind=weights.kind,
            row_dtype=values.dtype,
            weight_dtype=matrices.dtype,
            out_dtype=out.dtype,
            n=n,
            k=values.shape[1],
            layout=self._layout(),
            gathered=rows.indices is not None,
            indexed=weights.indices is not None,
            transposed=matrices.stride(2) != 1 and matrices.shape[2] > 1,
            scale_rows=shared_by(values.shape[0], rows.scale.shape[0]) if blocks and rows.scale is not None else 0,
            scale_cols=shared_by(n, weights.scale.shape[1]) if blocks and weights.scale is not None else 0,
            row_map=mappable(values),
            weight_map=mappable(matrices) or mappable(matrices.transpose(1, 2)),
            out_map=mappable(out),
            bias=epilogue.bias is not None,
            activation="" if epilogue.activation is None else epilogue.activation.kind,
            row_weights=epilogue.row_weights is not None,
            few_rows=weights.kind in FP4_BLOCK and self.rows_at_once <= FEW_ROWS * self.num_groups,
        )

    def _layout(self) -> str:
        if self.rows.indptr is not None:
            return "ragged"
        if self.rows.lengths is not None:
            return "padded"
        return "one" if self.num_groups == 1 else "equal"


def shared_by(count: int, scales: int) -> int:
    """How many of `count` rows share one of `scales`."""
    return 1 if scales == count else FP8_BLOCK


def most_row_tiles(num_rows: int, num_groups: int, block_m: int) -> int:
    """Tiles of `block_m` rows that so many rows can fall into: every group may end within one."""
    partial = min(num_groups, num_rows)
    return (num_rows - partial) // block_m + partial


def mappable(x: torch.Tensor) -> bool:
    """Whether a tensor map can describe `x`: innermost stride 1, everything else in multiples of 16 bytes."""
    return x.data_ptr() % MAP_BYTES == 0 and _mappable(x.shape, x.stride(), x.element_size())


@lru_cache(maxsize=4096)
def _mappable(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Strides of dimensions of size 1 mean nothing, but must be something a map accepts (`map_strides`)."""
    outer = [s * itemsize % MAP_BYTES == 0 and s > 0 for n, s in zip(shape[:-1], strides, strict=False) if n > 1]
    return min(shape) > 0 and (strides[-1] == 1 or shape[-1] == 1) and all(outer)
