"""How an all-to-all is spread over programs and warps."""

from __future__ import annotations

import triton

from flashinfer.core.arch import Arch
from flashinfer.ops.alltoall.room import MAX_PROGRAMS
from flashinfer.ops.alltoall.spec import CombineSpec, DispatchSpec
from flashinfer.ops.alltoall.triton.kernel import CombineConfig, DispatchConfig

# Programs of a launch: one a token for few tokens, then several tokens each. For many tokens more than a GPU runs at
# once let the last rows come in while the first are added up. Fastest of 32 to 1024 at 64, 256, 512 and 4096 tokens of
# 7168 bf16: one a token, 128, 128, 1024; 4, 8 and 16 warps were within 4 % of each other there (two H200s,
# bench/results/h200x2-alltoall-2026-11-22.json, "sweep").
PROGRAMS, TOKENS_OF_MANY, CPU_PROGRAMS = 128, 4, 3
# Elements of 4 bytes a thread holds.
PER_THREAD = 16
MIN_WARPS, MAX_WARPS = 4, 16
# Elements of a row that are added up in one go, from few ranks; those of all ranks are loaded at once.
BLOCK, FEW_RANKS = 8192, 8
# Flags, one a token and rank, looked at in one go for what lies before a program's tokens.
SCAN = 1024


def programs(tokens_per_rank: int, arch: Arch) -> int:
    """How many programs a launch has: the same on all ranks, so a matter of what they agree on."""
    if arch.is_cpu:
        return min(tokens_per_rank, CPU_PROGRAMS)
    return min(tokens_per_rank, max(PROGRAMS, tokens_per_rank // TOKENS_OF_MANY), MAX_PROGRAMS)


def dispatch_config(spec: DispatchSpec) -> tuple[DispatchConfig, int]:
    """The configuration of a dispatch, and the warps of a program."""
    ranks, block_k = triton.next_power_of_2(spec.world_size), triton.next_power_of_2(spec.top_k)
    blocks = tuple(triton.next_power_of_2(row.words) for row in spec.rows)
    scan = max(16, min(SCAN // ranks, 4 * SCAN // block_k))
    cfg = DispatchConfig(
        spec.world_size, spec.num_experts, spec.top_k, ranks, block_k, scan, spec.rows, blocks, spec.ids
    )
    return cfg, _warps(max(*blocks, scan * block_k))


def combine_config(spec: CombineSpec) -> tuple[CombineConfig, int]:
    """The configuration of a combine, and the warps of a program."""
    most = BLOCK if spec.world_size <= FEW_RANKS else BLOCK // 2
    block = min(triton.next_power_of_2(spec.hidden_size), most)
    cfg = CombineConfig(spec.world_size, spec.hidden_size, spec.dtype.itemsize, block)
    return cfg, _warps(block * 4 // 8)


def _warps(words: int) -> int:
    return min(max(triton.next_power_of_2(words) // (32 * PER_THREAD), MIN_WARPS), MAX_WARPS)
