"""Host side of the Hopper products: tensor maps and the launch."""

from __future__ import annotations

from functools import cache

import torch

from flashinfer.device.gluon import gl
from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig

Box = tuple[int, ...]


@cache
def box_layout(rank: int, columns: int, bits: int) -> gl.NVMMASharedLayout:
    """Shared memory of a box whose rows are `columns` elements."""
    width = min(128, columns * bits // 8)
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)


def boxes(config: GemmConfig) -> tuple[Box, Box, Box]:
    """Of the rows, the weights and the output."""
    depth = config.block_k
    weights = (1, depth, depth) if config.n_major else (1, config.block_n, depth)
    return (config.block_m, depth), weights, (config.out_rows, config.out_part)
