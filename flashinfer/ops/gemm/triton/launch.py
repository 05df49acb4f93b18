"""Launch of the grouped product."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, partial

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from flashinfer.core.arch import Arch
from flashinfer.core.launch import Prebound, integer_classes, pointers, token
from flashinfer.device.finish import Finish, finish_with
from flashinfer.ops.gemm.measured import measure, measuring
from flashinfer.ops.gemm.spec import FP4_BLOCK, Epilogue, Gemm, GemmSpec, Rows, Weights, most_row_tiles
from flashinfer.ops.gemm.triton.configs import Launch, choose, contenders, imposed
from flashinfer.ops.gemm.triton.kernel import GemmConfig, grouped_gemm_kernel
from flashinfer.ops.gemm.triton.operands import RowSide, WeightSide
from flashinfer.ops.gemm.triton.schedule import Groups

_launch = Prebound(grouped_gemm_kernel)


def bind(spec: GemmSpec, arch: Arch) -> Callable[[Gemm], None]:
    """The call for one kind of product: one launch, no host sync."""

    def run(tensors: Gemm) -> None:
        out, rows, weights, epilogue, expected_rows = tensors
        num_rows, num_groups = out.shape[0], tensors.num_groups
        asked = spec, arch, num_rows, num_groups, expected_rows
        if measuring(out.device):
            measure(arch, out.device, *contenders(*asked), imposed, partial(run, tensors))
        launch = choose(*asked)
        row_side, weight_side = row_side_of(spec, rows), weight_side_of(weights)
        groups, finish = Groups(rows.indptr, rows.lengths), finish_of(spec, rows, weights, epilogue)
        arguments = (
            *maps_of(launch.kernel, tensors),
            row_side,
            weight_side,
            groups,
            finish,
            (out, out.stride(0)),
            num_rows,
            num_groups,
            spec.n,
            spec.k,
            launch.activation,
            launch.kernel,
        )
        key = (
            _strides(spec, launch, row_side, weight_side, finish, out),
            _pointers(groups, row_side, weight_side, finish, (out,)),
        )
        grid = (grid_of(launch, spec, arch, num_rows, num_groups), 1, 1)
        _launch(grid, key, arguments, out.device, num_warps=launch.num_warps, num_stages=launch.num_stages)

    return run


def grid_of(launch: Launch, spec: GemmSpec, arch: Arch, num_rows: int, num_groups: int) -> int:
    """As many programs as are resident, or as there can be tiles."""
    m, n = launch.kernel.block_m, launch.kernel.block_n
    tiles = most_row_tiles(num_rows, num_groups, m)
    return max(1, min(tiles * -(-spec.out_cols // n), arch.num_sms * launch.per_sm))


def maps_of(cfg: GemmConfig, tensors: Gemm) -> tuple[TensorDescriptor | None, ...]:
    """Tensor maps of rows, weights and result, where they are used."""
    matrices = tensors.weights.values
    box = [1, cfg.block_n, cfg.block_k // cfg.packed]
    if cfg.transposed:
        matrices, box = matrices.transpose(1, 2), [1, cfg.block_k, cfg.block_n]
    return (
        map_of(tensors.rows.values, [cfg.block_m, cfg.block_k]) if cfg.row_map else None,
        map_of(matrices, box) if cfg.weight_map else None,
        map_of(tensors.out, [cfg.block_m, cfg.block_n]) if cfg.out_map else None,
    )


def map_of(x: torch.Tensor, box: list[int]) -> TensorDescriptor:
    """Strides of dimensions of size 1 mean nothing, but a map wants them in multiples of 16 bytes too."""
    shape, strides = list(x.shape), list(x.stride())
    usable = [stride if n > 1 else 128 for n, stride in zip(shape[:-1], strides, strict=False)]
    return TensorDescriptor(x, shape, [*usable, 1], box)


def row_side_of(spec: GemmSpec, rows: Rows) -> RowSide:
    blocks = rows.scale is not None and spec.kind == "fp8_block"
    scale_strides = rows.scale.stride() if blocks and rows.scale is not None else (0, 0)
    return RowSide(rows.values, rows.values.stride(0), rows.indices, rows.scale if blocks else None, *scale_strides)


def weight_side_of(weights: Weights) -> WeightSide:
    values, indices, scale, kind, _ = weights
    if scale is not None and kind in FP4_BLOCK:
        scale = scale.view(torch.uint8)
    index_stride = 0 if indices is None else indices.stride(0)
    scale_strides = (0, 0, 0) if scale is None else scale.stride()
    return WeightSide(values, *values.stride(), indices, index_stride, scale, *scale_strides)


def finish_of(spec: GemmSpec, rows: Rows, weights: Weights, epilogue: Epilogue) -> Finish:
    row_factor = rows.scale if spec.kind == "fp8_tensor" else None
    return finish_with(epilogue.bias, epilogue.row_weights, epilogue.parameters, row_factor, weights.global_scale)


def _strides(
    spec: GemmSpec, launch: Launch, rows: RowSide, weights: WeightSide, finish: Finish, out: torch.Tensor
) -> Hashable:
    """What the compiled form depends on of the numbers."""
    numbers = (rows.stride, *rows[4:], *weights[1:4], weights.indices_stride, *weights[7:])
    return _token(spec, launch, (*numbers, finish.bias_stride, finish.matrix_stride, out.stride(0)))


@lru_cache(maxsize=4096)
def _token(spec: GemmSpec, launch: Launch, numbers: tuple[int, ...]) -> object:
    return token(spec, launch, integer_classes((*numbers, spec.n, spec.k)))


def _pointers(*records: tuple[object, ...]) -> Hashable:
    """`pointers` of the tensors in records."""
    return pointers(*(x for record in records for x in record if x is None or isinstance(x, torch.Tensor)))
