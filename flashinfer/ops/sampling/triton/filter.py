"""Draws among the tokens that pass a filter, where those tokens can be held at hand; other rows are left open.

Every filter is a threshold on a row's numbers. Some number of groups with the largest maxima bounds it from below, so
only these groups are read a second time, and what lies above the bound (the candidates) holds all tokens that pass. A
token of the nucleus (top_p) is drawn by rejection: it is in it if what lies above it weighs less than top_p; one that
is not takes all smaller ones with it. `resolve.py` draws for the open rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

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

# Draws of a sample: pivots take 0 to 3 (0 is the unfiltered draw), min_p 0 to 15, candidates those from 16 on, open
# rows those from 128 on.
NUM_PIVOTS = tl.constexpr(4)
CANDIDATE_DRAW = tl.constexpr(16)
MAX_ROUNDS = tl.constexpr(64)
# Groups that hold the nucleus of most rows of a language model.
HEAD_GROUPS = tl.constexpr(128)


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
def scan_between(x, vocab, shift, low, high, slots, LOGITS: tl.constexpr, cut: tl.constexpr, SCAN: tl.constexpr):
    """`gather` of keys in [low, high), by reading the whole row.

    Returns (how many there are; how many lie at or above `high`, and their weight).
    """
    count = tl.full((), 0, tl.int32)
    higher = tl.full((), 0, tl.int32)
    mass = tl.full((), 0.0, tl.float32)
    for begin in range(0, vocab, SCAN):
        offs = begin + tl.arange(0, SCAN)
        v = read(x, offs, vocab, LOGITS)
        key = tl.where(offs < vocab, sort_key(v), NO_KEY)
        higher += tl.sum((key >= high).to(tl.int32), 0)
        mass += tl.sum(tl.where(key >= high, weight_of(v, shift, LOGITS), 0.0), 0)
        keep = (key >= low) & (key < high)
        position = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        count += tl.sum(keep.to(tl.int32), 0)
        keep &= position < cut.candidates
        tl.store(slots[1] + position, v, mask=keep)
        tl.store(slots[2] + position, offs, mask=keep)
    tl.debug_barrier()
    return count, higher, mass


@triton.jit
def scan_for_kth(x, vocab, k, low, high, LOGITS: tl.constexpr, SCAN: tl.constexpr):
    """A key with k numbers of the row at or above it, that of the k-th if more are, by halving: at most 33 reads."""
    offs_scan = tl.arange(0, SCAN)
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    at_low = vocab
    while (high - low > 1) & (at_low > k):
        middle = (low + high) >> 1
        hits = tl.zeros([SCAN], tl.int32)
        for begin in range(0, vocab, SCAN):
            key = sort_key(read(x, begin + offs_scan, vocab, LOGITS))
            hits += ((key >= middle.to(tl.int32)) & (begin + offs_scan < vocab)).to(tl.int32)
        count = tl.sum(hits, 0)
        if count >= k:
            low = middle
            at_low = count
        else:
            high = middle
    return low.to(tl.int32)


@triton.jit
def scan_weight(x, vocab, shift, low, LOGITS: tl.constexpr, SCAN: tl.constexpr):
    """Weight of the row's tokens with keys at or above `low`: one read."""
    offs_scan = tl.arange(0, SCAN)
    weight = tl.zeros([SCAN], tl.float32)
    for begin in range(0, vocab, SCAN):
        v = read(x, begin + offs_scan, vocab, LOGITS)
        weight += tl.where(sort_key(v) >= low, weight_of(v, shift, LOGITS), 0.0)
    return tl.sum(weight, 0)


@triton.jit
def bracket(group_key, k, vocab, lowest, cut: tl.constexpr):
    """Keys [low, high) to look for the k-th largest number in; for k = vocab, the key where the heaviest groups begin.

    With at least k groups, the k-th largest maximum is at or below it, and high is open. With fewer, were the numbers
    in random order, a share 1 - (1 - k/vocab)^group of all groups would reach it: a guess of four deviations around.
    """
    num_groups = tl.sum((group_key != NO_KEY).to(tl.int32), 0)
    low_rank = k.to(tl.int32)
    high_rank = tl.full((), 0, tl.int32)
    if k > num_groups:
        low_rank = tl.full((), 0, tl.int32)
        if vocab > cut.candidates:
            if k >= vocab:
                low_rank = tl.minimum(num_groups, HEAD_GROUPS)
            else:
                share = 1.0 - tl.exp2(tl.log2(1.0 - k.to(tl.float32) / vocab) * cut.group)
                rank = num_groups * share
                margin = 4.0 * tl.sqrt(rank * (1.0 - share)) + 1.0
                if rank + margin < num_groups:
                    low_rank = (rank + margin).to(tl.int32)
                    high_rank = tl.maximum(rank - margin, 1.0).to(tl.int32)
    low = lowest
    high = tl.full((), TOP_KEY, tl.int32)
    bottom = tl.full((), NO_KEY, tl.int32)
    top = tl.full((), TOP_KEY, tl.int32)
    # A loop, so that the search is compiled once.
    for step in range((low_rank > 0).to(tl.int32) + (high_rank > 0).to(tl.int32)):
        edge = kth_largest_key(group_key, tl.where(step == 0, low_rank, high_rank), bottom, top)
        high = tl.where(step == 0, high, tl.maximum(edge, low))
        low = tl.where(step == 0, tl.maximum(edge, lowest), low)
    return low, high


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
    SCAN: tl.constexpr,
):
    """(floor: the key from which on tokens are kept; their weight; how many candidates hold them, -1 if they do not).

    k < vocab (with TOP_K): those that top_k keeps, and all that equal the last of them; right in any case. k = vocab
    (with NUCLEUS): the heaviest tokens, if they weigh `limit`. stats: groups' maxima, sums, offsets, mask.
    """
    low, high = bracket(group_key, k, vocab, lowest, cut)
    above = tl.full((), 0, tl.int32)
    mass = tl.full((), 0.0, tl.float32)
    hopeless = high != high
    if NUCLEUS:
        if k >= vocab:
            # Not even all of these groups weigh enough: spare reading them.
            weight, _shift = group_weights(stats[0], stats[1], stats[2], stats[3], LOGITS)
            hopeless = tl.sum(tl.where(group_key >= low, weight, 0.0), 0) < limit
    if hopeless:
        count = tl.full((), cut.candidates + 1, tl.int32)
    elif high == TOP_KEY:
        count = gather(x, vocab, group_key, low, slots, LOGITS, cut)
    else:
        count, above, mass = scan_between(x, vocab, shift, low, high, slots, LOGITS, cut, SCAN)
    floor = lowest
    mass_kept = tl.full((), 0.0, tl.float32)
    held = tl.full((), -1, tl.int32)
    if NUCLEUS:
        if (k >= vocab) & (count <= cut.candidates):
            _keys, share = candidates(slots, count, shift, LOGITS, cut)
            mass_kept = tl.sum(share, 0)
            if (mass_kept >= limit) | (low == lowest):
                held = count
                floor = low
    if TOP_K:
        if k < vocab:
            if (count <= cut.candidates) & (above < k) & ((above + count >= k) | (low == lowest)):
                key, share = candidates(slots, count, shift, LOGITS, cut)
                floor = kth_largest_key(key, k - above, low, high)
                mass_kept = mass + tl.sum(tl.where(key >= floor, share, 0.0), 0)
                if high == TOP_KEY:
                    held = count
            else:
                # A guess may be wrong on either side; a bound may not.
                bottom = tl.where(high == TOP_KEY, low, lowest)
                peak = tl.max(group_key, 0) + 1
                floor = scan_for_kth(x, vocab, k, bottom, peak, LOGITS, SCAN)
                mass_kept = scan_weight(x, vocab, shift, floor, LOGITS, SCAN)
    return floor, mass_kept, held


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
    x, vocab, weight, offs_group, random, sample, NUM: tl.constexpr, LOGITS: tl.constexpr, cut: tl.constexpr
):
    """Independent draws from groups of that weight, draws 0 to NUM - 1: (tokens, their numbers), `[NUM]`."""
    keys, seed_low, seed_high, offset_low, offset_high = random
    draw = tl.arange(0, NUM)
    a, b, c, _d = random_words(keys, seed_low, seed_high, offset_low, offset_high, sample, draw)
    wide = uniform_wide(a, b)
    total = tl.sum(weight, 0)
    last = tl.max(tl.where(weight > 0, offs_group, 0), 0)
    # A group without weight is below every target: so the weights themselves are not held on.
    running = tl.where(weight > 0, tl.cumsum(weight, 0), -1.0)
    group = draw * 0
    for i in range(NUM):
        u = tl.sum(tl.where(draw == i, wide, 0.0), 0)
        first = tl.min(tl.where(running > u * total, offs_group, TOP_KEY), 0)
        group = tl.where(draw == i, tl.where(first == TOP_KEY, last, first), group)
    offs = group_offsets(group, cut)
    v = read(x, offs, vocab, LOGITS)
    w = weight_of(v, tl.max(v, 1)[:, None], LOGITS)
    element = tl.arange(0, cut.group)[None, :]
    target = uniform_narrow(c) * tl.sum(w, 1)
    first = tl.min(tl.where((tl.cumsum(w, 1) > target[:, None]) & (w > 0), element, TOP_KEY), 1)
    last = tl.max(tl.where(w > 0, element, 0), 1)
    at = element == tl.where(first == TOP_KEY, last, first)[:, None]
    return tl.sum(tl.where(at, offs, 0), 1), tl.max(tl.where(at, v, NEG_INF), 1)


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
    SCAN: tl.constexpr,
):
    """Grid: samples. One draw each from the row's tokens that pass; see `resolve_kernel` for those left open.

    KIND: which filters: "k", "p", "kp" (top_p of what top_k keeps), "joint". top_k, top_p: `[rows]` or None for the
    values. group_tail: None, or what the tokens above their group's mean weigh. scratch: group list, candidates'
    numbers and tokens, floats and ints of the state.
    """
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
    limit = tl.full((), float("inf"), tl.float32)
    held = tl.full((), -1, tl.int32)
    if usable:
        unlimited = p >= 1.0
        if (k < vocab) | (unlimited == 0):
            TOP_K: tl.constexpr = KIND != "p"
            mass = (p * total).to(tl.float32)
            stats = (group_max, group_sum, offs_stats, mask)
            floor, share, held = hold(
                x, vocab, shift, group_key, k, mass, lowest, slots, stats, TOP_K, KIND != "k", LOGITS, cut, SCAN
            )
            if unlimited == 0:
                limit = tl.where(k < vocab, p * share, mass) if KIND == "kp" else mass
    token = tl.full((), 0, tl.int32)
    is_open = tl.full((), 0, tl.int32)
    if held >= 0:
        key, share = candidates(slots, held, shift, LOGITS, cut)
        token = draw_candidate(slots, key, tl.where(key >= floor, share, 0.0), limit, random, sample, cut)
    elif usable:
        # Read again rather than held in registers all the while.
        weight, shift = group_weights(group_max, group_sum, offs_stats, mask, LOGITS)
        pivot_tokens, pivots = draw_pivots(x, vocab, weight, offs_group, random, sample, NUM_PIVOTS, LOGITS, cut)
        order = tl.arange(0, NUM_PIVOTS)
        # The first pivot that passes is the answer, unless one before it may pass as well.
        is_open = tl.full((), 1, tl.int32)
        searching = tl.full((), 1, tl.int32)
        for i in range(NUM_PIVOTS):
            if searching != 0:
                pivot = tl.max(tl.where(order == i, pivots, NEG_INF), 0)
                in_reach = sort_key(pivot) >= floor
                least, most = weight_above(pivot, group_max, group_tail, offs_stats, mask, weight, shift, LOGITS, cut)
                if in_reach & ((most < limit) | (most <= 0)):
                    token = tl.sum(tl.where(order == i, pivot_tokens, 0), 0)
                    is_open = tl.full((), 0, tl.int32)
                    searching = tl.full((), 0, tl.int32)
                elif in_reach & (least < limit * 1.0001):
                    searching = tl.full((), 0, tl.int32)
        floats = scratch[3] + wide_sample * 8
        ints = scratch[4] + wide_sample * 8
        tl.store(floats + order, pivots)
        tl.store(ints + order, pivot_tokens)
        tl.store(floats + 4, limit)
        tl.store(floats + 5, shift)
        tl.store(floats + 6, tl.max(group_high, 0))
        tl.store(ints + 4, floor)
        tl.store(ints + 6, 0)
    tl.store(scratch[4] + wide_sample * 8 + 5, is_open)
    tl.store(tokens + sample, token.to(tokens.dtype.element_ty))
    if valid is not None:
        tl.store(valid + sample, usable.to(tl.int8))
