"""Draws among the tokens that pass a filter, where those tokens can be held at hand; other rows are left open.

Every filter is a threshold on a row's numbers. Some number of groups with the largest maxima bounds it from below, so
only these groups are read a second time, and what lies above the bound (the candidates) holds all tokens that pass. A
token of the nucleus (top_p) is drawn by rejection: it is in it if what lies above it weighs less than top_p; one that
is not takes all smaller ones with it. `resolve.py` draws for the open rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.device.early import wait_for_launch_before
from flashinfer.ops.sampling.triton.rows import (
    NEG_INF,
    NEG_INF_KEY,
    NO_KEY,
    POSITIVE_KEY,
    TOP_KEY,
    group_offsets,
    group_weights,
    kth_largest_key,
    pick,
    random_words,
    read,
    sort_key,
    uniform_narrow,
    uniform_wide,
    weight_of,
)
from flashinfer.ops.sampling.triton.search import guess_interval

# Draws of a sample: pivots take 0 to 3 (0 is the unfiltered draw), min_p 0 to 15, candidates those from 16 on, open
# rows those from 128 on.
NUM_PIVOTS = tl.constexpr(4)
CANDIDATE_DRAW = tl.constexpr(16)
MAX_ROUNDS = tl.constexpr(64)
# Groups that hold the nucleus of most rows of a language model.
HEAD_GROUPS = tl.constexpr(128)
# Groups of the sample that tells where; more spill registers.
FILTER_SAMPLE = tl.constexpr(64)
# The state of a row, ints and floats from 4 on, behind four pivots; PEAK: key of its largest number.
STATE_FIELDS = tl.constexpr(16)
FLOOR = tl.constexpr(4)
OPEN = tl.constexpr(5)
ARRIVED = tl.constexpr(6)
LOW = tl.constexpr(7)
HIGH = tl.constexpr(8)
BOTTOM = tl.constexpr(9)
PEAK = tl.constexpr(10)
WANTED = tl.constexpr(11)
LIMIT = tl.constexpr(4)
SHIFT = tl.constexpr(5)
TOP_P = tl.constexpr(6)
# What OPEN says: pivots tell, or the floor has to be found first.
PIVOTS_ONLY = tl.constexpr(1)
SEARCHED = tl.constexpr(2)


@triton.jit
def gather(x, vocab, group_key, low, slots, LOGITS: tl.constexpr, cut: tl.constexpr):
    """Write the tokens with keys at or above `low` to `slots`: (lists, values, tokens) of this sample; return how many.

    Only cut.candidates are written; with more groups than that there are more tokens than that, and nothing is read.
    """
    selected = group_key >= low
    num_selected = tl.sum(selected.to(tl.int32), 0)
    count = tl.full((), 0, tl.int32)
    if num_selected > cut.candidates:
        count = num_selected
    else:
        place = tl.cumsum(selected.to(tl.int32), 0) - 1
        tl.store(slots[0] + place, tl.arange(0, cut.groups), mask=selected)
        tl.debug_barrier()
        for begin in range(0, num_selected, cut.batch):
            listed = begin + tl.arange(0, cut.batch)
            inside = listed < num_selected
            offs = group_offsets(tl.load(slots[0] + listed, mask=inside, other=0), cut)
            v = read(x, offs, vocab, LOGITS)
            found = inside[:, None] & (offs < vocab) & (sort_key(v) >= low)
            keep = tl.reshape(found, [cut.batch * cut.group])
            position = count + tl.cumsum(keep.to(tl.int32), 0) - 1
            count += tl.sum(keep.to(tl.int32), 0)
            keep &= position < cut.candidates
            tl.store(slots[1] + position, tl.reshape(v, [cut.batch * cut.group]), mask=keep)
            tl.store(slots[2] + position, tl.reshape(offs, [cut.batch * cut.group]), mask=keep)
        tl.debug_barrier()
    return count


@triton.jit
def hold(
    x,
    vocab,
    shift,
    group_key,
    k,
    limit,
    lowest,
    slots,
    stats,
    TOP_K: tl.constexpr,
    NUCLEUS: tl.constexpr,
    LOGITS: tl.constexpr,
    cut: tl.constexpr,
):
    """(floor: the key from which on tokens are kept; their weight; how many candidates hold them; a bound of it).

    k < vocab (with TOP_K): those that top_k keeps, and all that equal the last of them. k = vocab (with NUCLEUS): the
    heaviest tokens, if they weigh `limit`. -1 candidates: they are too many, and no floor is known. stats: groups'
    maxima, sums, offsets, mask.
    """
    num_groups = tl.sum((group_key != NO_KEY).to(tl.int32), 0)
    rank = tl.where(k < vocab, k, tl.minimum(num_groups, HEAD_GROUPS))
    low = lowest
    # With at least k groups, the k-th largest maximum is at or below the k-th largest number.
    if (rank <= num_groups) & ((k < vocab) | (vocab > cut.candidates)):
        bottom = tl.full((), NO_KEY, tl.int32)
        top = tl.full((), TOP_KEY, tl.int32)
        low = tl.maximum(kth_largest_key(group_key, rank, bottom, top), lowest)
    # Above the median maximum lie about 0.7 numbers a group, above lower ones soon more than candidates.
    hopeless = (k < vocab) & (2 * k > num_groups) & (vocab > cut.candidates)
    if NUCLEUS:
        if k >= vocab:
            # Not even all of these groups weigh enough: spare reading them.
            weight, _shift = group_weights(stats[0], stats[1], stats[2], stats[3], LOGITS)
            hopeless = tl.sum(tl.where(group_key >= low, weight, 0.0), 0) < limit
    count = tl.full((), cut.candidates + 1, tl.int32)
    if hopeless == 0:
        count = gather(x, vocab, group_key, low, slots, LOGITS, cut)
    floor = lowest
    kept = tl.full((), 0.0, tl.float32)
    held = tl.full((), -1, tl.int32)
    if count <= cut.candidates:
        key, share = candidates(slots, count, shift, LOGITS, cut)
        if TOP_K:
            if k < vocab:
                floor = kth_largest_key(key, k, low, tl.full((), TOP_KEY, tl.int32))
                kept = tl.sum(tl.where(key >= floor, share, 0.0), 0)
                held = count
        if NUCLEUS:
            if k >= vocab:
                kept = tl.sum(share, 0)
                if (kept >= limit) | (low == lowest):
                    floor = low
                    held = count
    return floor, kept, held, low


@triton.jit
def candidates(slots, count, shift, LOGITS: tl.constexpr, cut: tl.constexpr):
    """(keys, weights) of the candidates; beyond `count` no key and weight 0."""
    offs = tl.arange(0, cut.candidates)
    v = tl.load(slots[1] + offs, mask=offs < count, other=NEG_INF if LOGITS else 0.0)
    return tl.where(offs < count, sort_key(v), NO_KEY), weight_of(v, shift, LOGITS)


@triton.jit
def draw_candidate(slots, key, weight, limit, random, sample, cut: tl.constexpr):
    """A token by its weight, again until less than `limit` weighs more than it; after 64 rounds the heaviest."""
    keys, seed_low, seed_high, offset_low, offset_high = random
    offs = tl.arange(0, cut.candidates)
    chosen = tl.full((), 0, tl.int32)
    searching = tl.full((), 1, tl.int32)
    rounds = tl.full((), 0, tl.int32)
    while searching != 0:
        draw = tl.full([1], CANDIDATE_DRAW, tl.int32) + rounds
        a, _b, _c, _d = random_words(keys, seed_low, seed_high, offset_low, offset_high, sample, draw)
        at = pick(weight, offs, tl.sum(uniform_narrow(a), 0))
        drawn = tl.max(tl.where(offs == at, key, NO_KEY), 0)
        heavier = tl.where(key > drawn, weight, 0.0)
        mass = tl.sum(heavier, 0)
        chosen = at
        rounds += 1
        if (mass < limit) | (mass <= 0) | (mass != mass):
            searching = 0
        elif rounds >= MAX_ROUNDS:
            chosen = tl.argmax(key, 0)
            searching = 0
        else:
            weight = heavier
    return tl.load(slots[2] + chosen)


@triton.jit
def draw_pivots(
    x, vocab, weight, offs_group, random, sample, first, NUM: tl.constexpr, LOGITS: tl.constexpr, cut: tl.constexpr
):
    """Independent draws from groups of that weight, `first` and those after it: (tokens, their numbers), `[NUM]`."""
    keys, seed_low, seed_high, offset_low, offset_high = random
    lane = tl.arange(0, NUM)
    draw = lane + first
    a, b, c, _d = random_words(keys, seed_low, seed_high, offset_low, offset_high, sample, draw)
    wide = uniform_wide(a, b)
    total = tl.sum(weight, 0)
    last = tl.max(tl.where(weight > 0, offs_group, 0), 0)
    # A group without weight is below every target: so the weights themselves are not held on.
    running = tl.where(weight > 0, tl.cumsum(weight, 0), -1.0)
    group = lane * 0
    for i in range(NUM):
        u = tl.sum(tl.where(lane == i, wide, 0.0), 0)
        at = tl.min(tl.where(running > u * total, offs_group, TOP_KEY), 0)
        group = tl.where(lane == i, tl.where(at == TOP_KEY, last, at), group)
    offs = group_offsets(group, cut)
    v = read(x, offs, vocab, LOGITS)
    w = weight_of(v, tl.max(v, 1)[:, None], LOGITS)
    element = tl.arange(0, cut.group)[None, :]
    target = uniform_narrow(c) * tl.sum(w, 1)
    chosen = tl.min(tl.where((tl.cumsum(w, 1) > target[:, None]) & (w > 0), element, TOP_KEY), 1)
    last = tl.max(tl.where(w > 0, element, 0), 1)
    here = element == tl.where(chosen == TOP_KEY, last, chosen)[:, None]
    return tl.sum(tl.where(here, offs, 0), 1), tl.max(tl.where(here, v, NEG_INF), 1)


@triton.jit
def draw_hopeful_pivots(
    x, vocab, weight, offs_group, random, sample, low, turns, LOGITS: tl.constexpr, cut: tl.constexpr
):
    """The first four of 4 * turns draws whose keys lie above `low`, which no other passes: (tokens, their numbers).

    Fewer leave -inf behind them.
    """
    order = tl.arange(0, NUM_PIVOTS)
    tokens = order * 0
    pivots = tl.full([NUM_PIVOTS], NEG_INF, tl.float32)
    found = tl.full((), 0, tl.int32)
    for turn in range(turns):
        first = turn * NUM_PIVOTS
        drawn, numbers = draw_pivots(x, vocab, weight, offs_group, random, sample, first, NUM_PIVOTS, LOGITS, cut)
        hopeful = (sort_key(numbers) > low).to(tl.int32)
        before = tl.sum(tl.where(order[None, :] < order[:, None], hopeful[None, :], 0), 1)
        place = tl.where(hopeful != 0, found + before, -1)
        mine = order[:, None] == place[None, :]
        tokens += tl.sum(tl.where(mine, drawn[None, :], 0), 1)
        pivots = tl.maximum(pivots, tl.max(tl.where(mine, numbers[None, :], NEG_INF), 1))
        found += tl.sum(hopeful, 0)
    return tokens, pivots


@triton.jit
def weight_above(
    pivot, group_max, group_tail, offs_stats, mask, weight, shift, LOGITS: tl.constexpr, cut: tl.constexpr
):
    """Bounds, fp64, of what the row's tokens above `pivot` weigh, by the statistics of its groups alone."""
    high = tl.load(group_max + offs_stats, mask=mask, other=NEG_INF)
    most = tl.where(high > pivot, weight, 0.0)
    least = tl.where(high > pivot, weight_of(high, shift, LOGITS).to(tl.float64), 0.0)
    if group_tail is not None:
        tail = tl.load(group_tail + offs_stats, mask=mask, other=0.0).to(tl.float64)
        mean = weight.to(tl.float32) * (1.0 / cut.group)
        most = tl.where((high > pivot) & (mean <= pivot), tail, most)
        least = tl.where(mean >= pivot, tl.maximum(tail, least), least)
    return tl.sum(least, 0), tl.sum(most, 0)


@triton.jit(
    do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high", "num_groups", "k_value", "p_value"]
)
def filter_kernel(
    x,
    rows,
    group_max,
    group_sum,
    group_tail,
    keys,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    top_k,
    k_value,
    top_p,
    p_value,
    scratch,
    tokens,
    valid,
    stride,
    vocab,
    num_groups,
    KIND: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    LOGITS: tl.constexpr,
    cut: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: samples. One draw each from the row's tokens that pass; see `resolve_kernel` for those left open.

    KIND: which filters: "k", "p", "kp" (top_p of what top_k keeps), "joint". top_k, top_p: `[rows]` or None for the
    values. group_tail: None, or what the tokens above their group's mean weigh. scratch: group list, candidates'
    numbers and tokens, floats and ints of the state.
    """
    wait_for_launch_before(EARLY)
    sample = tl.program_id(0)
    row = sample
    if rows is not None:
        row = tl.load(rows + sample).to(tl.int32)
    entry = sample if PER_SAMPLE else row
    x += row.to(tl.int64) * stride
    offs_group = tl.arange(0, cut.groups)
    mask = offs_group < num_groups
    offs_stats = entry.to(tl.int64) * cut.groups + offs_group
    weight, shift = group_weights(group_max, group_sum, offs_stats, mask, LOGITS)
    total = tl.sum(weight, 0)
    group_high = tl.load(group_max + offs_stats, mask=mask, other=NEG_INF)
    group_key = tl.where(mask, sort_key(group_high), NO_KEY)
    random = (keys, seed_low, seed_high, offset_low, offset_high)
    wide_sample = sample.to(tl.int64)
    slots = (
        scratch[0] + wide_sample * cut.groups,
        scratch[1] + wide_sample * cut.candidates,
        scratch[2] + wide_sample * cut.candidates,
    )
    lowest = tl.full((), NEG_INF_KEY + 1 if LOGITS else POSITIVE_KEY, tl.int32)
    k = vocab
    if KIND == "k" or KIND == "kp" or KIND == "joint":
        k = k_value
        if top_k is not None:
            k = tl.minimum(tl.load(top_k + row), vocab)
        k = tl.maximum(k, 1)
    k = tl.cast(k, tl.int32)
    p = tl.cast(p_value, tl.float32)
    if KIND != "k":
        if top_p is not None:
            p = tl.load(top_p + row).to(tl.float32)
    usable = (total > 0) & (total < float("inf"))
    floor = lowest
    bound = lowest
    limit = tl.full((), float("inf"), tl.float32)
    held = tl.full((), -1, tl.int32)
    if usable:
        unlimited = p >= 1.0
        if (k < vocab) | (unlimited == 0):
            TOP_K: tl.constexpr = KIND != "p"
            mass = (p * total).to(tl.float32)
            stats = (group_max, group_sum, offs_stats, mask)
            floor, share, held, bound = hold(
                x, vocab, shift, group_key, k, mass, lowest, slots, stats, TOP_K, KIND != "k", LOGITS, cut
            )
            if unlimited == 0:
                limit = tl.where((k < vocab) & (held >= 0), p * share, mass) if KIND == "kp" else mass
    token = tl.full((), 0, tl.int32)
    is_open = tl.full((), 0, tl.int32)
    if held >= 0:
        key, share = candidates(slots, held, shift, LOGITS, cut)
        token = draw_candidate(slots, key, tl.where(key >= floor, share, 0.0), limit, random, sample, cut)
    elif usable:
        # Read again rather than held in registers all the while.
        weight, shift = group_weights(group_max, group_sum, offs_stats, mask, LOGITS)
        group_high = tl.load(group_max + offs_stats, mask=mask, other=NEG_INF)
        floats = scratch[3] + wide_sample * STATE_FIELDS
        ints = scratch[4] + wide_sample * STATE_FIELDS
        peak = sort_key(tl.max(group_high, 0))
        low = tl.full((), NO_KEY, tl.int32)
        turns = tl.full((), 1, tl.int32)
        is_open = tl.full((), PIVOTS_ONLY, tl.int32)
        if KIND != "p":
            # Of all that are not held, top_k's: of the nucleus alone pivots tell.
            if k < vocab:
                light = (vocab - k).to(tl.float32)
                bottom = bound - 1
                low, high = guess_interval(x, vocab, num_groups, light, bottom, peak, False, FILTER_SAMPLE, LOGITS, cut)
                tl.store(ints + LOW, low)
                tl.store(ints + HIGH, high)
                tl.store(ints + BOTTOM, bottom)
                tl.store(ints + WANTED, k)
                is_open = tl.full((), SEARCHED, tl.int32)
                turns = tl.full((), 4, tl.int32)
        pivot_tokens, pivots = draw_hopeful_pivots(
            x, vocab, weight, offs_group, random, sample, low, turns, LOGITS, cut
        )
        order = tl.arange(0, NUM_PIVOTS)
        # The first pivot that passes is the answer, unless one before it may pass as well.
        searching = (is_open == PIVOTS_ONLY).to(tl.int32)
        for i in range(NUM_PIVOTS):
            if searching != 0:
                pivot = tl.max(tl.where(order == i, pivots, NEG_INF), 0)
                least, most = weight_above(pivot, group_max, group_tail, offs_stats, mask, weight, shift, LOGITS, cut)
                if (most < limit) | (most <= 0):
                    token = tl.sum(tl.where(order == i, pivot_tokens, 0), 0)
                    is_open = tl.full((), 0, tl.int32)
                    searching = tl.full((), 0, tl.int32)
                elif least < limit * 1.0001:
                    searching = tl.full((), 0, tl.int32)
        tl.store(floats + order, pivots)
        tl.store(ints + order, pivot_tokens)
        tl.store(floats + LIMIT, limit)
        tl.store(floats + SHIFT, shift)
        tl.store(floats + TOP_P, p)
        tl.store(ints + FLOOR, lowest)
        tl.store(ints + PEAK, peak)
        tl.store(ints + ARRIVED, 0)
    tl.store(scratch[4] + wide_sample * STATE_FIELDS + OPEN, is_open)
    tl.store(tokens + sample, token.to(tokens.dtype.element_ty))
    if valid is not None:
        tl.store(valid + sample, usable.to(tl.int8))
