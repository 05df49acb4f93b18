"""The search for the threshold of a row's nucleus (top_p) among its own numbers, probs, in two launches.

Several programs collect what lies in a guessed interval of keys and weigh what lies above; one a row settles it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.ops.sampling.triton.rows import read, sort_key
from flashinfer.ops.sampling.triton.search import floor_by_scans, scan_weight

# Of a row's search: the interval (LOW, HIGH] its floor is guessed to lie in, and (BOTTOM, PEAK] that is sure; whether
# there is one. Of top_k's also how many tokens are kept, and how many splits have done their part.
SEARCH_FIELDS = tl.constexpr(8)
LOW = tl.constexpr(0)
HIGH = tl.constexpr(1)
BOTTOM = tl.constexpr(2)
PEAK = tl.constexpr(3)
OPEN = tl.constexpr(4)
WANTED = tl.constexpr(5)
ARRIVED = tl.constexpr(6)


@triton.jit
def nucleus_floor(key, weight, limit, low, high):
    """The smallest t in (low, high] such that less than `limit` weighs more, which holds at `high`: 33 rounds."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        if tl.sum(tl.where(key > middle.to(tl.int32), weight, 0.0), 0) < limit:
            high = middle
        else:
            low = middle
    return high.to(tl.int32)


@triton.jit(do_not_specialize=["num_splits", "tiles_per_split"])
def collect_kernel(
    x,
    search,
    found,
    sums,
    stride,
    vocab,
    num_splits,
    tiles_per_split,
    SPLITS: tl.constexpr,
    FOUND: tl.constexpr,
    LISTS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Grid: rows * num_splits. The tokens of open rows that lie in the interval of their search, for `settle_kernel`.

    Each thread has a list of its own, so that none waits for another. found: fp32 `[rows, SPLITS, room, LISTS]`, FOUND
    a row; sums: fp32 `[rows, 3, SPLITS, LISTS]`: weight above the interval, in it, tokens in it.
    """
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    ints = search[0] + row * SEARCH_FIELDS
    if tl.load(ints + OPEN) != 0:
        low = tl.load(ints + LOW)
        high = tl.load(ints + HIGH)
        COLS: tl.constexpr = SCAN // LISTS
        ROOM: tl.constexpr = FOUND // (SPLITS * LISTS)
        number = tl.arange(0, LISTS)
        # One number a load: so neighbouring threads read neighbours, and a thread's column is the same throughout.
        offs_tile = tl.max_contiguous(number[:, None] + tl.arange(0, COLS)[None, :] * LISTS, [1, 1])
        mine = found + row * FOUND + split * (ROOM * LISTS) + number[:, None]
        above = tl.zeros([LISTS, COLS], tl.float32)
        within = tl.zeros([LISTS, COLS], tl.float32)
        count = tl.zeros([LISTS], tl.int32)
        for i in range(tiles_per_split):
            offs = tl.max_contiguous((split * tiles_per_split + i) * SCAN + offs_tile, [1, 1])
            v = read(x + row * stride, offs, vocab, False)
            key = sort_key(v)
            inside = (key > low) & (key <= high)
            above += tl.where(key > high, v, 0.0)
            within += tl.where(inside, v, 0.0)
            position = count[:, None] + tl.cumsum(inside.to(tl.int32), 1) - 1
            tl.store(mine + position * LISTS, v, mask=inside & (position < ROOM))
            count += tl.sum(inside.to(tl.int32), 1)
        target = sums + row * 3 * SPLITS * LISTS + split * LISTS + number
        tl.store(target, tl.sum(above, 1))
        tl.store(target + SPLITS * LISTS, tl.sum(within, 1))
        tl.store(target + 2 * SPLITS * LISTS, count.to(tl.float32))


@triton.jit(do_not_specialize=["num_splits"])
def settle_kernel(
    x,
    floors,
    weights,
    search,
    found,
    sums,
    stride,
    vocab,
    num_splits,
    SPLITS: tl.constexpr,
    FOUND: tl.constexpr,
    LISTS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Grid: rows. The threshold of open rows, among what `collect_kernel` found.

    Where the guess was wrong or too many tokens lay in the interval: by halving what is left, at most 33 reads.
    """
    row = tl.program_id(0).to(tl.int64)
    ints = search[0] + row * SEARCH_FIELDS
    if tl.load(ints + OPEN) != 0:
        x += row * stride
        found += row * FOUND
        sums += row * 3 * SPLITS * LISTS
        limit = tl.load(search[1] + row)
        low = tl.load(ints + LOW)
        high = tl.load(ints + HIGH)
        lists = tl.arange(0, SPLITS * LISTS)
        here = lists < num_splits * LISTS
        above = tl.sum(tl.load(sums + lists, mask=here, other=0.0), 0)
        within = tl.sum(tl.load(sums + SPLITS * LISTS + lists, mask=here, other=0.0), 0)
        most = tl.max(tl.load(sums + 2 * SPLITS * LISTS + lists, mask=here, other=0.0), 0)
        ROOM: tl.constexpr = FOUND // (SPLITS * LISTS)
        if (above < limit) & (above + within >= limit) & (most <= ROOM):
            offs = tl.arange(0, FOUND)
            owner = offs // (ROOM * LISTS) * LISTS + offs % LISTS
            count = tl.load(sums + 2 * SPLITS * LISTS + owner, mask=owner < num_splits * LISTS, other=0.0)
            v = tl.load(found + offs, mask=(offs // LISTS) % ROOM < count.to(tl.int32), other=0.0)
            # The bits of positive numbers are their keys, and no key of the interval is 0.
            key = v.to(tl.int32, bitcast=True)
            floor = nucleus_floor(key, v, limit - above, low, high)
            tl.store(weights + row, above + tl.sum(tl.where(key >= floor, v, 0.0), 0))
        else:
            left = low
            right = high
            if above >= limit:
                left = high
                right = tl.load(ints + PEAK)
            elif above + within < limit:
                left = tl.load(ints + BOTTOM)
                right = low
            floor = floor_by_scans(x, vocab, 0.0, 0, limit, left, right, True, False, SCAN)
            tl.store(weights + row, scan_weight(x, vocab, 0.0, floor, False, SCAN))
        tl.store(floors + row, floor)
