"""Tile shapes and schedule of the Hopper prefill: which configuration a spec gets."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch

from flashinfer.core.tuning import Imposed
from flashinfer.ops.attention.device.hooks import Traits
from flashinfer.ops.attention.device.planner import PlannerConfig
from flashinfer.ops.attention.gluon_sm90.kernel import GROUPS, GluonConfig
from flashinfer.ops.attention.spec import AttentionSpec
from flashinfer.ops.attention.support import HOPPER_QUERY_TILE

# Tokens of a TMA box, at most.
BOX = 64
# Query heads worked on side by side: their K and V share the L2 cache.
HEAD_BLOCK = 8
# Exponents, base 2, up to which bf16 weights and their fp32 sums need no running maximum to stay in range: 2^80, times
# a million tokens and values of 2^26, is still finite, and 2^-80 still normal.
MOST_EXPONENT = 80
# Bytes of L2 that the K and V of one section of requests may fill.
SECTION_BYTES = 24 << 20


class Schedule(NamedTuple):
    """What measuring decides, each on or off: see the fields of these names in `GluonConfig`."""

    persistent: bool
    turns: bool


imposed: Imposed[Schedule] = Imposed()


@cache
def tuned() -> dict[tuple[int, bool], Schedule]:
    """What `bench.tune` measured and wrote: the schedule of each (head_dim, whether the variant masks)."""
    text = files("flashinfer.ops.attention").joinpath("tuned", "sm90.json").read_text(encoding="utf-8")
    return {
        (entry["head_dim"], entry["masks"]): Schedule(*(entry["schedule"][name] for name in Schedule._fields))
        for entry in json.loads(text)["entries"]
    }


def choose(spec: AttentionSpec, traits: Traits) -> GluonConfig:
    """The kernel for `spec`."""
    return configured(spec, traits, imposed.get() or tuned()[spec.head_dim_qk, traits.masks])


@cache
def configured(spec: AttentionSpec, traits: Traits, schedule: Schedule) -> GluonConfig:
    """The kernel for `spec` under a given schedule."""
    group, heads = spec.group_size, spec.num_qo_heads
    wide = spec.head_dim_qk > 128
    # Registers: a wide head's accumulator, or the bits of a mask for which there are no bounds, each take half.
    block_n = 128 >> wide >> (not traits.masks_have_bounds)
    return GluonConfig(
        head_dim=spec.head_dim_qk,
        rows=HOPPER_QUERY_TILE // GROUPS.value,
        block_n=block_n,
        stages=2,
        q_stages=2 if schedule.persistent and not wide else 1,
        box=min(_box(spec.page_size) if spec.paged else BOX, block_n),
        page_size=spec.page_size if spec.paged else 0,
        head_block=HEAD_BLOCK if heads % HEAD_BLOCK == 0 and HEAD_BLOCK % group == 0 else heads,
        persistent=schedule.persistent,
        share_out=wide,
        natural_logits=traits.logits,
        masks_have_bounds=traits.masks_have_bounds,
        turns=schedule.turns,
        fixed_maximum=spec.q_dtype == torch.bfloat16 and traits.limit * math.log2(math.e) <= MOST_EXPONENT,
        halves=traits.masks and traits.masks_have_bounds and not traits.logits and not wide,
    )


def _box(page_size: int) -> int:
    """Tokens of a box of a page; 0 where none keeps the 128-byte swizzle, which repeats every 8 tokens."""
    return math.gcd(page_size, BOX) if page_size % 8 == 0 else 0


@cache
def planner_config(spec: AttentionSpec, config: GluonConfig) -> PlannerConfig:
    """Query tiles are of one head: no packing, and every query head is a column of its own."""
    return PlannerConfig(
        num_kv_heads=spec.num_qo_heads,
        group=1,
        page_size=spec.page_size,
        block_m=HOPPER_QUERY_TILE,
        block_n=config.block_n,
        item_cost=0,
        masks_have_bounds=config.masks_have_bounds,
    )


def section_tokens(spec: AttentionSpec, config: GluonConfig) -> int:
    """Tokens whose K and V, for the heads worked on side by side, fill SECTION_BYTES."""
    kv_heads = max(1, config.head_block // spec.group_size)
    return max(1, SECTION_BYTES // (kv_heads * 2 * spec.head_dim_qk * spec.kv_dtype.itemsize))
