"""Host side of the Hopper products: tensor maps and the launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, lru_cache, partial

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashinfer.core import replay
from flashinfer.core.arch import Arch
from flashinfer.core.launch import Prebound, integer_classes, pointers, token
from flashinfer.device.finish import Finish, finish_with
from flashinfer.device.gluon import gl
from flashinfer.ops.gemm.gluon_sm90.configs import Launch, choose, contenders, imposed
from flashinfer.ops.gemm.gluon_sm90.epilogue import Target
from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig, Shape, grouped_kernel
from flashinfer.ops.gemm.gluon_sm90.packed import BlockScales
from flashinfer.ops.gemm.gluon_sm90.producer import COPY, Scattered
from flashinfer.ops.gemm.gluon_sm90.scales import Scales
from flashinfer.ops.gemm.gluon_sm90.schedule import Groups
from flashinfer.ops.gemm.measured import measure, measuring
from flashinfer.ops.gemm.spec import FP4_BLOCK, Gemm, GemmSpec, Rows, Weights, most_row_tiles

Box = tuple[int, ...]
# Groups, and tiles a program, from which on tiles are taken by whoever is free: where warpgroups share a tile by its
# rows, the last one of each group takes less time than others, and programs that were to share weights drift apart.
DRIFT_GROUPS, DRIFT_TILES = 16, 4
_launch = Prebound(grouped_kernel)


def bind(spec: GemmSpec, arch: Arch) -> Callable[[Gemm], None]:
    """The call for one kind of product: one launch, no host sync."""

    def run(tensors: Gemm) -> None:
        out, rows, weights = tensors.out, tensors.rows, tensors.weights
        num_rows, num_groups = out.shape[0], tensors.num_groups
        finish = finish_of(spec, tensors)
        asked = spec, arch, tensors.rows_at_once, num_groups, finish is not None
        if measuring(out.device):
            measure(arch, out.device, *contenders(*asked), imposed, partial(run, tensors))
        launch = choose(*asked)
        config, (start, consumer, producer) = launch.kernel, launch.registers
        indices = weights.indices
        tiles = most_tiles(config, spec, num_rows, num_groups)
        grid = max(1, min(tiles, arch.num_sms * launch.per_sm))
        taken = taken_of(config, num_groups, tiles, grid, out.device)
        groups = Groups(rows.indptr, rows.lengths, indices, 0 if indices is None else indices.stride(0), taken)
        target = Target(out, out.stride(0))
        scales = scales_of(spec, rows, weights)
        x_map, *maps = maps_of(config, tensors)
        scattered = scattered_of(rows)
        arguments = (
            x_map if scattered is None else scattered,
            *maps,
            target,
            finish,
            groups,
            num_rows,
            num_groups,
            Shape(spec.out_cols, spec.k),
            scales,
            config,
            consumer,
            producer,
        )
        key = _key(spec, launch, target, finish, groups, scales, scattered)
        _launch((grid, 1, 1), key, arguments, out.device, num_warps=4, maxnreg=start, launch_pdl=True)

    return run


def most_tiles(config: GemmConfig, spec: GemmSpec, num_rows: int, num_groups: int) -> int:
    """Tiles that there can be."""
    return most_row_tiles(num_rows, num_groups, config.block_m) * -(-spec.out_cols // config.out_columns)


def shares_rows(config: GemmConfig) -> bool:
    """Whether warpgroups share a tile by its rows, so that the end of a group is less work."""
    return config.split_rows and config.consumers > 1


def taken_of(config: GemmConfig, num_groups: int, tiles: int, grid: int, device: torch.device) -> torch.Tensor | None:
    """The counter of tiles taken, where programs would drift apart; filling it takes a launch."""
    if not shares_rows(config) or num_groups < DRIFT_GROUPS or tiles < DRIFT_TILES * grid:
        return None
    return replay.zeros(1, device)


# ---- Tensor maps


@cache
def box_layout(rank: int, columns: int, bits: int) -> gl.NVMMASharedLayout:
    """Shared memory of a box whose rows are `columns` elements."""
    width = min(128, columns * bits // 8)
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)


def boxes(config: GemmConfig) -> tuple[Box, Box, Box]:
    """Of the rows, the weights and the output."""
    depth, weight_depth = config.block_k, config.weight_depth
    weights = (1, depth, depth) if config.n_major else (1, config.block_n, weight_depth)
    if config.gated:
        weights = (1, config.out_columns // config.gate_block, 2, config.gate_block, weight_depth)
    return (config.row_box, depth), weights, (config.out_rows, config.out_part)


def maps_of(config: GemmConfig, tensors: Gemm) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """Tensor maps of rows, weights and output."""
    row_box, weight_box, out_box = boxes(config)
    out, rows = tensors.out, tensors.rows.values
    matrices = tensors.weights.values
    if config.n_major:
        matrices = matrices.transpose(1, 2)
    shape, strides = list(matrices.shape), map_strides(matrices)
    if config.gated:
        pairs, block, stride = shape[1] // 2, config.gate_block, strides[1]
        shape = [shape[0], pairs // block, 2, block, shape[2]]
        strides = [strides[0], block * stride, pairs * stride, stride, 1]
    return (
        tensor_map(rows, list(rows.shape), map_strides(rows), row_box),
        tensor_map(matrices, shape, strides, weight_box),
        tensor_map(out, list(out.shape), map_strides(out), out_box),
    )


def map_strides(x: torch.Tensor) -> list[int]:
    """Those of dimensions of size 1 mean nothing, but a tensor map wants them in multiples of 16 bytes too."""
    return [s if n > 1 else x.shape[-1] for n, s in zip(x.shape[:-1], x.stride(), strict=False)] + [1]


def tensor_map(x: torch.Tensor, shape: list[int], strides: list[int], box: Box) -> TensorDescriptor:
    """As the constructor makes it, less 10 us of checks that `support` has made."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = x, shape, strides
    made.block_shape, made.layout, made.padding = list(box), box_layout(len(box), box[-1], x.itemsize * 8), "zero"
    return made


# ---- The other arguments


def scattered_of(rows: Rows) -> Scattered | None:
    if rows.indices is None:
        return None
    return Scattered(rows.values, rows.values.stride(0) // COPY.value, rows.indices)


def scales_of(spec: GemmSpec, rows: Rows, weights: Weights) -> Scales | BlockScales | None:
    """Those of blocks."""
    if spec.kind in FP4_BLOCK:
        assert weights.scale is not None
        return BlockScales(weights.scale.view(torch.uint8), *weights.scale.stride())
    if spec.kind != "fp8_block":
        return None
    assert rows.scale is not None and weights.scale is not None
    return Scales(rows.scale, *rows.scale.stride(), weights.scale, *weights.scale.stride())


def finish_of(spec: GemmSpec, tensors: Gemm) -> Finish | None:
    """What is done to the sums; None for nothing."""
    epilogue, matrix_factor = tensors.epilogue, tensors.weights.global_scale
    row_factor = tensors.rows.scale if spec.kind == "fp8_tensor" else None
    if all(x is None for x in (*epilogue, row_factor, matrix_factor)):
        return None
    return finish_with(epilogue.bias, epilogue.row_weights, epilogue.parameters, row_factor, matrix_factor)


def _key(spec: GemmSpec, launch: Launch, *records: tuple[object, ...] | None) -> Hashable:
    """Everything that the compiled form depends on."""
    given = [x for record in records for x in record or ()]
    numbers = tuple(x for x in given if isinstance(x, int))
    tensors = [x for x in given if x is None or isinstance(x, torch.Tensor)]
    present = tuple(record is not None for record in records)
    return _token(spec, launch, numbers), present, pointers(*tensors)


@lru_cache(maxsize=4096)
def _token(spec: GemmSpec, launch: Launch, numbers: tuple[int, ...]) -> object:
    return token(spec, launch, integer_classes((*numbers, spec.out_cols, spec.k)))
