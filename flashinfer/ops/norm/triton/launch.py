"""Launch of the norm kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton

from flashinfer.core.arch import Arch
from flashinfer.core.launch import Prebound, alignment, token
from flashinfer.core.rows import RowLayout, row_layout
from flashinfer.device.rows import Rows
from flashinfer.ops.norm.spec import Norm, NormSpec
from flashinfer.ops.norm.triton.configs import Launch, choose
from flashinfer.ops.norm.triton.kernel import norm_kernel

_launch = Prebound(norm_kernel)


def bind(spec: NormSpec, arch: Arch) -> Callable[[Norm, float], None]:
    """The call `(tensors, eps)` for one kind of norm: one launch, no host sync."""

    @lru_cache(maxsize=4096)
    def configured(layout: RowLayout) -> tuple[Launch, tuple[int, int, int], object]:
        launch = choose(spec, arch, layout.num_rows, layout.flat)
        blocks = triton.cdiv(layout.num_rows, launch.kernel.rows)
        turns = triton.cdiv(blocks, launch.max_programs)
        # As few programs as take no more turns: then none is left to work alone at the end.
        return launch, (triton.cdiv(blocks, turns), 1, 1), token(spec, launch, layout.key)

    def run(tensors: Norm, eps: float) -> None:
        out, input, weight, residual, shift, scale = tensors
        if residual is None:
            layout = row_layout(input.shape, input.stride(), out.stride())
            added = None
        else:
            layout = row_layout(input.shape, input.stride(), out.stride(), residual.stride())
            added = Rows(residual, *layout.strides[2])
        launch, grid, key = configured(layout)
        if launch.kernel.mantissa_bits:
            out = out.view(torch.uint8)
        aligned = alignment(*[t for t in tensors if t is not None])  # which are None is known from the spec
        arguments = (
            Rows(out, *layout.strides[1]),
            Rows(input, *layout.strides[0]),
            added,
            weight,
            shift,
            scale,
            layout.num_rows,
            layout.num_inner,
            eps,
            launch.kernel,
        )
        _launch(grid, (key, aligned), arguments, input.device, num_warps=launch.num_warps)

    return run
