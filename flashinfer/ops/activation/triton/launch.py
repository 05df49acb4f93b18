"""Launch of the gated-activation kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton

from flashinfer.core.arch import Arch
from flashinfer.core.check import FP8_MANTISSA_BITS
from flashinfer.core.launch import Prebound, alignment, token
from flashinfer.core.rows import RowLayout, row_layout
from flashinfer.device.rows import Rows
from flashinfer.ops.activation.spec import Gated, GatedSpec
from flashinfer.ops.activation.triton.kernel import ACTIVATIONS, GatedConfig, gated_kernel

NUM_WARPS = 4
# Elements of a tile: for each of 128 threads one 16-byte vector of half precision, or two where there is enough to do.
FEW, MANY = 1024, 2048
# Tiles an SM from which on there is enough to do.
MANY_TILES = 16

_launch = Prebound(gated_kernel)


def choose(spec: GatedSpec, arch: Arch, num_rows: int, flat: bool) -> GatedConfig:
    """The configuration for one kind; of `num_rows` it only takes whether they are few."""
    tile = MANY if num_rows * spec.width > MANY_TILES * arch.num_sms * MANY else FEW
    cols = max(16, min(triton.next_power_of_2(spec.width), tile))
    mantissa_bits = FP8_MANTISSA_BITS.get(spec.out_dtype, 0)
    return GatedConfig(spec.width, tile // cols, cols, flat, mantissa_bits, arch.converts_to_fp8)


def bind(spec: GatedSpec, arch: Arch) -> Callable[[Gated], None]:
    """The call `(tensors)` for one kind: one launch, no host sync."""
    activation = ACTIVATIONS[spec.name]

    @lru_cache(maxsize=4096)
    def configured(layout: RowLayout) -> tuple[GatedConfig, tuple[int, int, int], object]:
        cfg = choose(spec, arch, layout.num_rows, layout.flat)
        blocks = triton.cdiv(layout.num_rows, cfg.rows) * triton.cdiv(spec.width, cfg.cols)
        return cfg, (blocks, 1, 1), token(spec, cfg, layout.key)

    def run(tensors: Gated) -> None:
        out, input, scale = tensors
        layout = row_layout(input.shape, input.stride(), out.stride())
        cfg, grid, key = configured(layout)
        if cfg.mantissa_bits:
            out = out.view(torch.uint8)
        arguments = (
            Rows(out, *layout.strides[1]),
            Rows(input, *layout.strides[0]),
            scale,
            layout.num_rows,
            layout.num_inner,
            activation,
            cfg,
        )
        _launch(grid, (key, alignment(*tensors)), arguments, input.device, num_warps=NUM_WARPS)

    return run
