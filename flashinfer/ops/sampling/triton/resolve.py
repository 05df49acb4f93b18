"""Draws for the rows that `filter_kernel` left open: those whose nucleus is too wide to be held at hand."""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.device.early import wait_for_launch_before
from flashinfer.ops.sampling.triton.filter import (
    ARRIVED,
    BOTTOM,
    FLOOR,
    HIGH,
    LIMIT,
    LOW,
    MAX_ROUNDS,
    NUM_PIVOTS,
    OPEN,
    PEAK,
    PIVOTS_ONLY,
    SEARCHED,
    SHIFT,
    STATE_FIELDS,
    TOP_P,
    WANTED,
)
from flashinfer.ops.sampling.triton.rows import (
    NO_KEY,
    TOP_KEY,
    pick,
    random_words,
    read,
    sort_key,
    uniform_narrow,
    weight_of,
)
from flashinfer.ops.sampling.triton.search import PART_FIELDS, collect_part, scan_weight, settle

OPEN_DRAW = tl.constexpr(128)


@triton.jit
def draw_above(x, vocab, shift, low, total, u, v, LOGITS: tl.constexpr, SCAN: tl.constexpr):
    """(token, its key) drawn by weight from those with keys at or above `low`, which weigh `total`: one read."""
    offs_scan = tl.arange(0, SCAN)
    running = tl.full((), 0.0, tl.float32)
    found = tl.full((), -1, tl.int32)
    last = tl.full((), 0, tl.int32)
    for begin in range(0, vocab, SCAN):
        x_tile = read(x, begin + offs_scan, vocab, LOGITS)
        share = tl.sum(tl.where(sort_key(x_tile) >= low, weight_of(x_tile, shift, LOGITS), 0.0), 0)
        running += share
        if share > 0:
            last = begin
            if (found < 0) & (running > u * total):
                found = begin
    begin = tl.where(found < 0, last, found)
    x_tile = read(x, begin + offs_scan, vocab, LOGITS)
    key = sort_key(x_tile)
    at = pick(tl.where(key >= low, weight_of(x_tile, shift, LOGITS), 0.0), offs_scan, v)
    return begin + at, tl.max(tl.where(offs_scan == at, key, NO_KEY), 0)


@triton.jit
def draw_by_scans(x, vocab, shift, peak, low, total, limit, random, sample, LOGITS: tl.constexpr, SCAN: tl.constexpr):
    """A token by rejection over the row itself, two reads a round; after 64 rounds the heaviest.

    total: weight of the tokens with keys at or above `low`; negative if it is not known. peak: the largest key.
    """
    keys, seed_low, seed_high, offset_low, offset_high = random
    if total < 0:
        total = scan_weight(x, vocab, shift, low, LOGITS, SCAN)
    token = tl.full((), 0, tl.int32)
    searching = tl.full((), 1, tl.int32)
    rounds = tl.full((), 0, tl.int32)
    while searching != 0:
        draw = tl.full([1], OPEN_DRAW, tl.int32) + rounds
        a, b, _c, _d = random_words(keys, seed_low, seed_high, offset_low, offset_high, sample, draw)
        u = tl.sum(uniform_narrow(a), 0)
        v = tl.sum(uniform_narrow(b), 0)
        token, key = draw_above(x, vocab, shift, low, total, u, v, LOGITS, SCAN)
        rounds += 1
        if limit == float("inf"):
            searching = 0
        else:
            mass = scan_weight(x, vocab, shift, key + 1, LOGITS, SCAN)
            if (mass < limit) | (mass <= 0) | (mass != mass):
                searching = 0
            elif rounds >= MAX_ROUNDS:
                token, key = draw_above(x, vocab, shift, peak, total, 0.0, 0.0, LOGITS, SCAN)
                searching = 0
            else:
                low = key + 1
                total = mass
    return token


@triton.jit
def pivot_masses(x, vocab, shift, pivots, split, tiles_per_split, LOGITS: tl.constexpr, SCAN: tl.constexpr):
    """Weight above each of the four pivots in this split's tiles."""
    heavier = tl.zeros([NUM_PIVOTS, SCAN], tl.float32)
    for i in range(tiles_per_split):
        offs = (split * tiles_per_split + i) * SCAN + tl.arange(0, SCAN)
        v = read(x, offs, vocab, LOGITS)
        heavier += tl.where(v[None, :] > pivots[:, None], weight_of(v, shift, LOGITS)[None, :], 0.0)
    return tl.sum(heavier, 1)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high", "num_splits", "tiles_per_split"])
def resolve_kernel(
    x,
    rows,
    keys,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    state,
    partial,
    found,
    tokens,
    stride,
    vocab,
    num_splits,
    tiles_per_split,
    KIND: tl.constexpr,
    SPLITS: tl.constexpr,
    FOUND: tl.constexpr,
    LOGITS: tl.constexpr,
    SCAN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: samples * num_splits; programs of samples that are not open leave at once.

    The splits of a row sum what weighs more than each pivot, and collect what its floor is searched for among; the
    last one to arrive takes the first pivot that passes, or goes on alone. state: floats and ints of `filter_kernel`;
    partial: fp32 `[samples, num_splits, PART_FIELDS]`; found: fp32 `[samples, FOUND]`, of top_p None. SPLITS:
    num_splits rounded up to 2^n.
    """
    wait_for_launch_before(EARLY)
    sample = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    floats = state[0] + sample.to(tl.int64) * STATE_FIELDS
    ints = state[1] + sample.to(tl.int64) * STATE_FIELDS
    is_open = tl.load(ints + OPEN)
    if is_open != 0:
        row = sample
        if rows is not None:
            row = tl.load(rows + sample).to(tl.int32)
        x += row.to(tl.int64) * stride
        order = tl.arange(0, NUM_PIVOTS)
        shift = tl.load(floats + SHIFT)
        fields = partial + sample.to(tl.int64) * num_splits * PART_FIELDS
        if KIND != "p":
            found += sample.to(tl.int64) * FOUND
        low = tl.load(ints + LOW)
        high = tl.load(ints + HIGH)
        mine = fields + split * PART_FIELDS
        if KIND != "k":
            masses = pivot_masses(x, vocab, shift, tl.load(floats + order), split, tiles_per_split, LOGITS, SCAN)
            tl.store(mine + order, masses)
        if KIND != "p":
            if is_open == SEARCHED:
                ROOM: tl.constexpr = FOUND // SPLITS
                begin = split * tiles_per_split * SCAN
                room = found + split * ROOM
                # Half as much at a time as for the pivots: more spills registers.
                tiles = 2 * tiles_per_split
                HALF: tl.constexpr = SCAN // 2
                collect_part(x, vocab, shift, low, high, begin, tiles, room, mine, ROOM, LOGITS, HALF)
        tl.debug_barrier()
        last = tl.atomic_add(ints + ARRIVED, 1, sem="acq_rel", scope="gpu") == num_splits - 1
        tl.debug_barrier()
        if last:
            limit = tl.load(floats + LIMIT)
            floor = tl.load(ints + FLOOR)
            peak = tl.load(ints + PEAK)
            kept = tl.full((), -1.0, tl.float32)
            if KIND != "p":
                if is_open == SEARCHED:
                    interval = (low, high, tl.load(ints + BOTTOM), peak)
                    k = tl.load(ints + WANTED)
                    floor, kept = settle(
                        x, vocab, shift, found, fields, num_splits, k, interval, FOUND, SPLITS, LOGITS, SCAN
                    )
                    if KIND == "kp":
                        p = tl.load(floats + TOP_P)
                        limit = tl.where(p < 1.0, p * kept, float("inf"))
            masses = tl.zeros([NUM_PIVOTS], tl.float32)
            if KIND != "k":
                splits = tl.arange(0, SPLITS)
                offs = splits[:, None] * PART_FIELDS + order[None, :]
                there = (splits < num_splits)[:, None]
                masses = tl.sum(tl.load(fields + offs, mask=there, other=0.0, cache_modifier=".cg"), 0)
            key = sort_key(tl.load(floats + order))
            light = (masses < limit) | (masses <= 0)
            # Pivots at or below `low` were passed over: where the floor is not above it, none counts.
            passes = (key >= floor) & light & ((is_open == PIVOTS_ONLY) | (floor > low))
            first = tl.min(tl.where(passes, order, NUM_PIVOTS), 0)
            if first < NUM_PIVOTS:
                token = tl.load(ints + first)
            else:
                above = tl.max(tl.where(light, NO_KEY, tl.minimum(key, TOP_KEY - 1) + 1), 0)
                bound = tl.maximum(floor, above)
                total = tl.where(above >= floor, tl.min(tl.where(light, float("inf"), masses), 0), kept)
                random = (keys, seed_low, seed_high, offset_low, offset_high)
                token = draw_by_scans(x, vocab, shift, peak, bound, total, limit, random, sample, LOGITS, SCAN)
            tl.store(tokens + sample, token.to(tokens.dtype.element_ty))
