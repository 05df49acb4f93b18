"""Pairs of a token and an expert, sorted by expert: a counting sort, stable, in an order that nothing changes.

Pair `p = token * top_k + j`. Blocks of pairs are counted; then each block adds up what blocks before it have of every
expert, and writes its pairs where they belong: a chunk of pairs finds its own order by comparing each with each, which
takes fewer steps than counting per expert what came before. No order depends on atomics, no value is read on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.early import let_next_launch_begin, wait_for_launch_before


@dataclass(frozen=True)
class SortConfig:
    """experts: their number rounded up to 2^n. chunk: pairs compared with each other. blocks: counts read at a time.
    early: see `device/early`."""

    num_experts: int
    top_k: int
    experts: int
    chunk: int
    blocks: int
    early: bool


class Sorted(NamedTuple):
    """int32: indptr `[num_experts + 1]`; order `[pairs]`: the pair in each row; tokens: its token; rows `[pairs]`: the
    row of each pair, -1 for one of an expert held elsewhere. Any but indptr may be None."""

    indptr: torch.Tensor
    order: torch.Tensor | None
    tokens: torch.Tensor | None
    rows: torch.Tensor | None


@triton.jit
def experts_of(ids, pair, end, first, cfg: tl.constexpr):
    """int32: the expert of each pair by its number here, `cfg.experts` where it is not held here; and whether it is."""
    local = tl.load(ids + pair, mask=pair < end, other=-1) - first
    held = (pair < end) & (local >= 0) & (local < cfg.num_experts)
    return tl.where(held, local, cfg.experts).to(tl.int32), held


@triton.jit
def counts_of(ids, begin, end, first, cfg: tl.constexpr):
    """int32 `[experts]`: how many of the pairs `begin` to `end` go to each."""
    total = tl.full([cfg.experts], 0, tl.int32)
    AT_ONCE: tl.constexpr = 4 * cfg.chunk
    for pair in range(begin, end, AT_ONCE):
        expert, held = experts_of(ids, pair + tl.arange(0, AT_ONCE), end, first, cfg)
        total += tl.histogram(expert, cfg.experts, mask=held)
    return total


@triton.jit
def counts_before(counts, block, num_blocks, cfg: tl.constexpr):
    """int32 `[experts]`, twice: how many pairs go to each, of all blocks and of those before `block`."""
    offs_expert = tl.arange(0, cfg.experts)
    # Added up over blocks once, at the end: it takes all warps.
    total = tl.full([cfg.blocks, cfg.experts], 0, tl.int32)
    before = tl.full([cfg.blocks, cfg.experts], 0, tl.int32)
    for b in range(0, num_blocks, cfg.blocks):
        offs = b + tl.arange(0, cfg.blocks)
        mask = (offs < num_blocks)[:, None] & (offs_expert < cfg.num_experts)[None, :]
        part = tl.load(counts + offs[:, None] * cfg.num_experts + offs_expert[None, :], mask=mask, other=0)
        total += part
        before += tl.where((offs < block)[:, None], part, 0)
    return tl.sum(total, 0), tl.sum(before, 0)


@triton.jit(do_not_specialize=["num_pairs", "per_block", "first"])
def count_kernel(counts, ids, num_pairs, per_block, first, cfg: tl.constexpr):
    """Grid: blocks. counts: int32 `[blocks, num_experts]`."""
    begin = tl.program_id(0) * per_block
    wait_for_launch_before(cfg.early)
    let_next_launch_begin(cfg.early)
    total = counts_of(ids, begin, tl.minimum(begin + per_block, num_pairs), first, cfg)
    offs = tl.arange(0, cfg.experts)
    tl.store(counts + tl.program_id(0) * cfg.num_experts + offs, total, mask=offs < cfg.num_experts)


@triton.jit(do_not_specialize=["num_pairs", "per_block", "num_blocks", "first"])
def place_kernel(out, counts, ids, num_pairs, per_block, num_blocks, first, cfg: tl.constexpr):
    """Grid: blocks. counts: as `count_kernel` writes them; None where there is one block."""
    block = tl.program_id(0)
    begin = block * per_block
    end = tl.minimum(begin + per_block, num_pairs)
    offs_expert = tl.arange(0, cfg.experts)
    wait_for_launch_before(cfg.early)
    let_next_launch_begin(cfg.early)
    if counts is None:
        total = counts_of(ids, begin, end, first, cfg)
        before = tl.full([cfg.experts], 0, tl.int32)
    else:
        total, before = counts_before(counts, block, num_blocks, cfg)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(out.indptr + 1 + offs_expert, ends, mask=offs_expert < cfg.num_experts)
        tl.store(out.indptr, 0)
    base = ends - total + before
    offs = tl.arange(0, cfg.chunk)
    for pair in range(begin, end, cfg.chunk):
        expert, held = experts_of(ids, pair + offs, end, first, cfg)
        # By expert, then by pair, all different: the place in the chunk's own order is the number of smaller keys.
        key = expert * cfg.chunk + offs
        place = tl.sum((key[:, None] < key[None, :]).to(tl.int32), 0)
        found = tl.histogram(expert, cfg.experts, mask=held)
        # From a place in that order to a row: the same for all pairs of an expert.
        ahead = base - (tl.cumsum(found, 0) - found)
        row = place + tl.gather(ahead, tl.where(held, expert, 0), 0)
        base += found
        if out.order is not None:
            tl.store(out.order + row, pair + offs, mask=held)
        if out.tokens is not None:
            tl.store(out.tokens + row, (pair + offs) // cfg.top_k, mask=held)
        if out.rows is not None:
            tl.store(out.rows + pair + offs, tl.where(held, row, -1), mask=pair + offs < end)
