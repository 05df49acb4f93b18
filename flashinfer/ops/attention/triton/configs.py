"""Tile shapes: which configuration a spec gets on an architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from flashinfer.core.arch import Arch
from flashinfer.ops.attention.device.hooks import Traits
from flashinfer.ops.attention.device.planner import PlannerConfig
from flashinfer.ops.attention.spec import AttentionSpec
from flashinfer.ops.attention.triton.kernel import KernelConfig

# Packed rows a query tile may have; 16 is the least a tensor-core product takes.
BLOCK_MS = (16, 32, 64, 128)
# What beginning and ending a query tile costs, in KV tiles, for short and for tall query tiles.
ITEM_COST = {False: 2, True: 4}


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel's configuration and how it is launched; hashed by identity, since `choose` makes each but once.

    programs_per_sm: resident programs of a persistent grid.
    """

    kernel: KernelConfig
    num_warps: int
    programs_per_sm: int


def power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def block_m_for(spec: AttentionSpec, arch: Arch, traits: Traits, rows_per_request: float) -> int:
    """The height of a query tile for requests of about `rows_per_request` queries, in packed rows.

    Without split_kv the choice must not depend on the batch: it is that of long requests, or of decode when every
    request is known to have few rows.
    """
    packed = rows_per_request * spec.group_size
    if not spec.split_kv and spec.uniform_qo_len is None:
        packed = BLOCK_MS[-1]
    widest = max(spec.head_dim_qk, spec.head_dim_vo)
    # Registers: wide heads, and K tiles that are rotated in float32, leave less for the accumulator; a float32 tile is
    # twice as large and is multiplied without tensor cores.
    tallest = 64 if widest > 128 or traits.key else 128
    if spec.q_dtype.itemsize == 4 or widest > 256 or (not arch.has_wgmma and (traits.key or widest > 128)):
        tallest = 32
    return next(m for m in BLOCK_MS if m >= packed or m >= tallest)


@cache
def choose(spec: AttentionSpec, arch: Arch, traits: Traits, block_m: int) -> Launch:
    """The launch for query tiles of `block_m` packed rows."""
    block_qk, block_vo = (max(16, power_of_two(dim)) for dim in (spec.head_dim_qk, spec.head_dim_vo))
    # Triton 3.6 multiplies wrongly on Hopper where V rows are shorter than 128 bytes and than K rows (docs/decisions).
    block_vo = max(block_vo, min(block_qk, 64))
    block_n, num_warps, per_sm, stages = _inner(block_m, block_qk + block_vo, spec, arch, traits)
    config = KernelConfig(
        num_kv_heads=spec.num_kv_heads,
        group=spec.group_size,
        head_dim_qk=spec.head_dim_qk,
        head_dim_vo=spec.head_dim_vo,
        block_qk=block_qk,
        block_vo=block_vo,
        page_size=spec.page_size,
        paged=spec.paged,
        block_m=block_m,
        block_n=block_n,
        num_stages=stages,
        split_kv=spec.split_kv,
        skip_masks=block_m >= 64,
        natural_logits=traits.logits,
        masks_have_bounds=traits.masks_have_bounds,
        item_cost=ITEM_COST[block_m >= 64],
        merge_rows=min(block_m, power_of_two(spec.uniform_qo_len * spec.group_size))
        if spec.uniform_qo_len
        else block_m,
    )
    return Launch(config, num_warps, per_sm)


@cache
def planner_config(config: KernelConfig) -> PlannerConfig:
    """The planner's part of a kernel's configuration."""
    return PlannerConfig(
        num_kv_heads=config.num_kv_heads,
        group=config.group,
        page_size=config.page_size,
        block_m=config.block_m,
        block_n=config.block_n,
        item_cost=config.item_cost,
        masks_have_bounds=config.masks_have_bounds,
    )


def _inner(block_m: int, dims: int, spec: AttentionSpec, arch: Arch, traits: Traits) -> tuple[int, int, int, int]:
    """(block_n, num_warps, programs per SM, stages); dims: columns of a K and a V row together, padded."""
    row_bytes = dims * spec.kv_dtype.itemsize
    heavy = spec.q_dtype.itemsize == 4 or traits.key
    wide = dims > 512 or (dims > 256 and block_m >= (64 if arch.has_wgmma else 32))
    num_warps = 8 if heavy or wide or block_m >= 128 else 4
    # Memory-bound tiles: two programs an SM; compute-bound ones: one program with all registers.
    per_sm = 1 if num_warps == 8 else 2
    block_n = 32 if heavy else 64
    if not arch.has_wgmma and (block_m >= 32 or dims > 512):
        # Operands of mma.sync lie in registers: half the width spills nothing (compile gate; not timed on such a GPU).
        block_n //= 2
    budget = max(arch.smem_bytes, 65_536) // per_sm - block_m * dims * spec.q_dtype.itemsize
    while block_n > 16 and block_n * row_bytes > budget:
        block_n //= 2
    buffers = 2 if 3 * block_n * row_bytes <= budget and not heavy else 1
    # The page table's indirection takes every second stage of Triton's pipeline.
    return block_n, num_warps, per_sm, 2 * buffers + 1 if spec.paged else buffers + 1
