"""How a norm is spread over programs and warps."""

from __future__ import annotations

from dataclasses import dataclass

import triton

from flashinfer.core.arch import Arch
from flashinfer.core.check import FP8_MANTISSA_BITS
from flashinfer.ops.norm.spec import NormSpec
from flashinfer.ops.norm.triton.kernel import NormConfig

WARP = 32
MAX_WARPS = 16
# Elements a thread holds: one 16-byte vector of half precision where latency counts, two where bandwidth does.
FEW, MANY = 8, 16
# Blocks of rows an SM, up to which they are few: each as quick as can be.
FEW_BLOCKS = 2


@dataclass(frozen=True)
class Launch:
    """A kernel configuration, and the warps of a program."""

    kernel: NormConfig
    num_warps: int


def choose(spec: NormSpec, arch: Arch, num_rows: int, flat: bool) -> Launch:
    """The configuration for one kind of norm; of `num_rows` it only takes whether they are few."""
    block = max(triton.next_power_of_2(spec.hidden_size), WARP)
    # Narrow rows (heads) share a program of four warps.
    rows = max(1, 4 * WARP * FEW // block)
    many = num_rows > FEW_BLOCKS * arch.num_sms * rows
    per_thread = MANY if many else FEW
    rows = max(1, 4 * WARP * per_thread // block)
    num_warps = min(max(block * rows // (WARP * per_thread), 4), MAX_WARPS)
    kernel = NormConfig(
        hidden_size=spec.hidden_size,
        block=block,
        rows=rows,
        flat=flat,
        centred=spec.centred,
        weight_bias=spec.weight_bias,
        silu=spec.silu,
        mantissa_bits=FP8_MANTISSA_BITS.get(spec.out_dtype, 0),
        native_fp8=arch.converts_to_fp8,
    )
    return Launch(kernel, num_warps)
