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
# Elements a thread holds: one 16-byte vector of half precision where latency counts, four where bandwidth does.
FEW, MANY = 8, 32
# Blocks of rows an SM, up to which each gets a program of its own that is as quick as can be.
FEW_BLOCKS = 2
# Beyond, programs stay and take turns: so many warps an SM, each with the next rows on their way.
RESIDENT_WARPS = 32
STAGES = 2


@dataclass(frozen=True)
class Launch:
    """A kernel configuration; max_programs: how many share the blocks of rows."""

    kernel: NormConfig
    num_warps: int
    max_programs: int


def choose(spec: NormSpec, arch: Arch, num_rows: int, flat: bool) -> Launch:
    """The configuration for one kind of norm; of `num_rows` it only takes whether they are few."""
    block = max(triton.next_power_of_2(spec.hidden_size), WARP)
    # Narrow rows (heads) share a program of four warps.
    rows = max(1, 4 * WARP * FEW // block)
    many = num_rows > FEW_BLOCKS * arch.num_sms * rows
    # Half as many where the result is fp8, whose rounding needs registers too.
    per_thread = FEW if not many else MANY if spec.out_dtype == spec.dtype else MANY // 2
    rows = max(1, 4 * WARP * per_thread // block)
    num_warps = min(max(block * rows // (WARP * per_thread), 4), MAX_WARPS)
    kernel = NormConfig(
        hidden_size=spec.hidden_size,
        block=block,
        rows=rows,
        stages=STAGES if many else 1,
        flat=flat,
        centred=spec.centred,
        weight_bias=spec.weight_bias,
        mantissa_bits=FP8_MANTISSA_BITS.get(spec.out_dtype, 0),
        native_fp8=arch.converts_to_fp8,
    )
    return Launch(kernel, num_warps, arch.num_sms * (max(1, RESIDENT_WARPS // num_warps) if many else FEW_BLOCKS))
