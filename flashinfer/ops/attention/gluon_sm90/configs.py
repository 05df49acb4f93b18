"""Tile shapes and schedule of the Hopper prefill: which configuration a spec gets."""

from __future__ import annotations

import math
from functools import cache

from flashinfer.ops.attention.device.hooks import Traits
from flashinfer.ops.attention.device.planner import PlannerConfig
from flashinfer.ops.attention.gluon_sm90.kernel import GluonConfig
from flashinfer.ops.attention.spec import AttentionSpec

# Tokens of a TMA box, at most.
BOX = 64
# Queries of a warpgroup; two warpgroups make a query tile.
ROWS = 64
# Query heads worked on side by side: their K and V share the L2 cache.
HEAD_BLOCK = 8
# Bytes of L2 that the K and V of one section of requests may fill.
SECTION_BYTES = 24 << 20
# Requests of up to so many queries, in the mean, run persistent: the next tile's loads overlap this one's end.
PERSISTENT_QUERIES = 2048


@cache
def choose(spec: AttentionSpec, traits: Traits, persistent: bool) -> GluonConfig:
    """The kernel for `spec`."""
    group, heads = spec.group_size, spec.num_qo_heads
    wide = spec.head_dim_qk > 128
    return GluonConfig(
        head_dim=spec.head_dim_qk,
        groups=2,
        rows=ROWS,
        # Registers: a wide head's accumulator, or the bits of a mask for which there are no bounds, leave half.
        block_n=64 if wide or not traits.masks_have_bounds else 128,
        stages=2,
        q_stages=1 if wide or not persistent else 2,
        box=math.gcd(spec.page_size, BOX) if spec.paged else BOX,
        page_size=spec.page_size if spec.paged else 0,
        head_block=HEAD_BLOCK if heads % HEAD_BLOCK == 0 and HEAD_BLOCK % group == 0 else heads,
        persistent=persistent,
        share_out=wide,
        natural_logits=traits.logits,
        masks_have_bounds=traits.masks_have_bounds,
        registers=240,
        turns=True,
    )


@cache
def planner_config(spec: AttentionSpec, config: GluonConfig) -> PlannerConfig:
    """Query tiles are of one head: no packing, and every query head is a column of its own."""
    return PlannerConfig(
        num_kv_heads=spec.num_qo_heads,
        group=1,
        page_size=spec.page_size,
        block_m=config.groups * config.rows,
        block_n=config.block_n,
        item_cost=0,
        masks_have_bounds=config.masks_have_bounds,
    )


def section_tokens(spec: AttentionSpec, config: GluonConfig) -> int:
    """Tokens whose K and V, for the heads worked on side by side, fill SECTION_BYTES."""
    kv_heads = max(1, config.head_block // spec.group_size)
    return max(1, SECTION_BYTES // (kv_heads * 2 * spec.head_dim_qk * spec.kv_dtype.itemsize))
