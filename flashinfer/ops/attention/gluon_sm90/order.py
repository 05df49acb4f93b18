"""Puts the planner's records in the order in which a GPU full of programs should take them, on the device.

Requests are cut into sections whose K and V fit in the L2 cache together; inside of a section the longest query tiles
come first, so that none of them is left to run alone at the end (Graham's longest-processing-time rule). A counting
sort; records of one bin come in no certain order, which no result depends on.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Bins of the sort: sections times lengths.
SECTIONS = tl.constexpr(64)
LENGTHS = tl.constexpr(64)
BINS = SECTIONS.value * LENGTHS.value


@triton.jit
def _sort_keys(records, slot, mask, longest, page_size, section_tokens):
    kv_tiles = tl.load(records + slot * 8 + 3, mask=mask, other=0).to(tl.int32)
    kv_begin = tl.load(records + slot * 8 + 5, mask=mask, other=0)
    section = tl.minimum(kv_begin * page_size // section_tokens, SECTIONS - 1).to(tl.int32)
    return section * LENGTHS + (LENGTHS - 1 - kv_tiles * (LENGTHS - 1) // longest)


@triton.jit(do_not_specialize=["batch_size", "capacity", "page_size", "section_tokens"])
def order_kernel(
    tables,
    work,
    bins,
    batch_size,
    capacity,
    page_size,
    section_tokens,
    BLOCK: tl.constexpr,
):
    """One program. tables: `ScheduleTables`; work: `Tiles`; bins: int32 `[SECTIONS * LENGTHS]`."""
    NUM_BINS: tl.constexpr = SECTIONS * LENGTHS
    offs_bin = tl.arange(0, NUM_BINS)
    tl.store(bins + offs_bin, tl.zeros([NUM_BINS], tl.int32))
    count = tl.minimum(tl.load(tables.tile_base + batch_size), capacity)
    tl.store(work.num_tiles, count)
    longest = 1
    for base in range(0, count, BLOCK):
        slot = base + tl.arange(0, BLOCK)
        kv_tiles = tl.load(tables.records + slot * 8 + 3, mask=slot < count, other=0)
        longest = tl.maximum(longest, tl.max(kv_tiles, 0).to(tl.int32))
    tl.debug_barrier()
    for base in range(0, count, BLOCK):
        slot = base + tl.arange(0, BLOCK)
        mask = slot < count
        key = _sort_keys(tables.records, slot, mask, longest, page_size, section_tokens)
        tl.atomic_add(bins + key, 1, mask=mask)
    tl.debug_barrier()
    members = tl.load(bins + offs_bin, cache_modifier=".cg")
    tl.debug_barrier()
    tl.store(bins + offs_bin, tl.cumsum(members, 0) - members)
    tl.debug_barrier()
    offs_field = tl.arange(0, 8)
    for base in range(0, count, BLOCK):
        slot = base + tl.arange(0, BLOCK)
        mask = slot < count
        key = _sort_keys(tables.records, slot, mask, longest, page_size, section_tokens)
        place = tl.atomic_add(bins + key, 1, mask=mask)
        record = tl.load(tables.records + slot[:, None] * 8 + offs_field[None, :], mask=mask[:, None], other=0)
        tl.store(work.tiles + place[:, None] * 8 + offs_field[None, :], record.to(tl.int32), mask=mask[:, None])
