"""The k largest numbers of each row with their indices: groups bound the smallest of them, candidates settle it."""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.ops.sampling.triton.filter import gather
from flashinfer.ops.sampling.triton.rows import (
    NEG_INF,
    NEG_INF_KEY,
    NO_KEY,
    TOP_KEY,
    kth_largest_key,
    read,
    sort_key,
)
from flashinfer.ops.sampling.triton.search import COLLECT_STAGES, floor_by_scans, scan_count


@triton.jit
def window_of(x, row, stride, vocab, starts, lengths):
    """(where the row's window begins, how many numbers it has)."""
    x += row * stride
    if starts is not None:
        x += tl.load(starts + row)
    if lengths is not None:
        vocab = tl.maximum(tl.minimum(tl.load(lengths + row).to(tl.int32), vocab), 0)
    return x, vocab


@triton.jit
def window_max_kernel(x, group_max, starts, lengths, stride, vocab, num_tiles, cut: tl.constexpr):
    """Grid: rows * num_tiles. Largest number of each group of the row's window, fp32 `[rows, cut.groups]`."""
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    x, length = window_of(x, row, stride, vocab, starts, lengths)
    offs = tile * cut.tile + tl.arange(0, cut.depth)[:, None] * cut.cols + tl.arange(0, cut.cols)[None, :]
    col_max = tl.max(read(x, offs, length, True), 0)
    high = tl.max(tl.reshape(col_max, [cut.tile_groups, cut.width]), 1)
    tl.store(group_max + row * cut.groups + tile * cut.tile_groups + tl.arange(0, cut.tile_groups), high)


@triton.jit
def last_kept_tie(tie, index, room, vocab, HIGH: tl.constexpr):
    """The index up to which (HIGH: from which on) ties are kept, so that `room` of them are: at most 33 rounds."""
    low = tl.full((), -1, tl.int32)
    high = vocab - 1
    while high - low > 1:
        middle = (low + high) // 2
        if HIGH:
            enough = tl.sum((tie & (vocab - 1 - index <= middle)).to(tl.int32), 0) >= room
        else:
            enough = tl.sum((tie & (index <= middle)).to(tl.int32), 0) >= room
        if enough:
            high = middle
        else:
            low = middle
    if HIGH:
        high = vocab - 1 - high
    return high


@triton.jit
def write_by_scan(x, vocab, floor, room, k, out_values, out_indices, HIGH: tl.constexpr, SCAN: tl.constexpr):
    """Write all numbers above `floor` and `room` that equal it, in row order (HIGH: from the row's end)."""
    written = tl.full((), 0, tl.int32)
    ties = tl.full((), 0, tl.int32)
    for begin in range(0, vocab, SCAN):
        offs = begin + tl.arange(0, SCAN)
        if HIGH:
            offs = vocab - 1 - offs
        inside = (offs < vocab) & (offs >= 0)
        v = read(x, tl.where(inside, offs, vocab), vocab, True)
        key = tl.where(inside, sort_key(v), NO_KEY)
        tie = key == floor
        keep = (key > floor) | (tie & (ties + tl.cumsum(tie.to(tl.int32), 0) <= room))
        position = written + tl.cumsum(keep.to(tl.int32), 0) - 1
        keep &= position < k
        tl.store(out_values + position, v.to(out_values.dtype.element_ty), mask=keep)
        tl.store(out_indices + position, offs.to(out_indices.dtype.element_ty), mask=keep)
        written += tl.sum(keep.to(tl.int32), 0)
        ties += tl.sum(tie.to(tl.int32), 0)


@triton.jit
def write_window(x, length, k, out_values, out_indices, BLOCK: tl.constexpr):
    """Write a window of at most k numbers in its own order, 0 and -1 after it."""
    for begin in range(0, k, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        v = tl.where(offs < length, read(x, offs, length, True), 0.0)
        index = tl.where(offs < length, offs, -1)
        tl.store(out_values + offs, v.to(out_values.dtype.element_ty), mask=offs < k)
        tl.store(out_indices + offs, index.to(out_indices.dtype.element_ty), mask=offs < k)


@triton.jit
def bound_of(group_max, row, num_groups, k, cut: tl.constexpr):
    """(keys of a row's groups, a key that the k largest numbers reach: that of the k-th largest group)."""
    offs_group = tl.arange(0, cut.groups)
    mask = offs_group < num_groups
    group_high = tl.load(group_max + row * cut.groups + offs_group, mask=mask, other=NEG_INF)
    group_key = tl.where(mask, sort_key(group_high), NO_KEY)
    low = tl.full((), NEG_INF_KEY, tl.int32)
    if k <= num_groups:
        bottom = tl.full((), NO_KEY, tl.int32)
        low = tl.maximum(kth_largest_key(group_key, k, bottom, tl.full((), TOP_KEY, tl.int32)), low)
    return group_key, low


@triton.jit
def write_kept(v, index, there, low, k, length, out_values, out_indices, HIGH: tl.constexpr):
    """Write the k largest of the candidates that are `there`, none of which lies below `low`."""
    key = tl.where(there, sort_key(v), NO_KEY)
    floor = kth_largest_key(key, k, low, tl.full((), TOP_KEY, tl.int32))
    # The search may end between two keys: then k are larger and nothing ties.
    keep = key > floor
    tie = key == floor
    room = k - tl.sum(keep.to(tl.int32), 0)
    if tl.sum(tie.to(tl.int32), 0) > room:
        edge = last_kept_tie(tie, index, room, length, HIGH)
        if HIGH:
            tie &= index >= edge
        else:
            tie &= index <= edge
    keep |= tie
    position = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(out_values + position, v.to(out_values.dtype.element_ty), mask=keep)
    tl.store(out_indices + position, index.to(out_indices.dtype.element_ty), mask=keep)


@triton.jit
def select_by_scans(x, length, k, low, peak, out_values, out_indices, HIGH: tl.constexpr, SCAN: tl.constexpr):
    """`write_kept` of the whole row, where candidates are too many: at most 35 reads."""
    floor = floor_by_scans(x, length, 0.0, k, 0.0, low - 1, peak, False, True, SCAN)
    room = k - scan_count(x, length, floor + 1, True, SCAN)
    write_by_scan(x, length, floor, room, k, out_values, out_indices, HIGH, SCAN)


@triton.jit(do_not_specialize=["k"])
def select_kernel(
    x,
    group_max,
    starts,
    lengths,
    scratch,
    out_values,
    out_indices,
    k,
    stride,
    vocab,
    num_groups,
    HIGH: tl.constexpr,
    cut: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: rows. Writes `out_values` and `out_indices` `[rows, k]`.

    HIGH: which of the numbers that equal the smallest one kept stay: those of high index, not of low. A window of at
    most k numbers is written in its own order, 0 and -1 after it.
    """
    row = tl.program_id(0).to(tl.int64)
    x, length = window_of(x, row, stride, vocab, starts, lengths)
    out_indices += row * k
    out_values += row * k
    if length <= k:
        write_window(x, length, k, out_values, out_indices, BLOCK)
    else:
        group_key, low = bound_of(group_max, row, num_groups, k, cut)
        slots = (
            scratch[0] + row * cut.groups,
            scratch[1] + row * cut.candidates,
            scratch[2] + row * cut.candidates,
        )
        count = gather(x, length, group_key, low, slots, True, cut)
        if count <= cut.candidates:
            offs = tl.arange(0, cut.candidates)
            v = tl.load(slots[1] + offs, mask=offs < count, other=NEG_INF)
            index = tl.load(slots[2] + offs, mask=offs < count, other=0)
            write_kept(v, index, offs < count, low, k, length, out_values, out_indices, HIGH)
        else:
            peak = tl.max(group_key, 0)
            select_by_scans(x, length, k, low, peak, out_values, out_indices, HIGH, SCAN)


@triton.jit(do_not_specialize=["k", "num_splits", "tiles_per_split"])
def candidates_kernel(
    x,
    group_max,
    starts,
    lengths,
    scratch,
    k,
    stride,
    vocab,
    num_groups,
    num_splits,
    tiles_per_split,
    cut: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Grid: rows * num_splits. Each split writes its part's numbers at or above the row's bound, in order.

    scratch: numbers and indices `[rows, num_splits, cut.candidates]`; int32 `[rows, num_splits]`: how many there are,
    even if there was no room; `[rows, 2]`: keys of the bound and of the largest number.
    """
    row = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    x, length = window_of(x, row, stride, vocab, starts, lengths)
    part = row * num_splits + split
    if length > k:
        group_key, low = bound_of(group_max, row, num_groups, k, cut)
        if split == 0:
            tl.store(scratch[3] + row * 2, low)
            tl.store(scratch[3] + row * 2 + 1, tl.max(group_key, 0))
        values = scratch[0] + part * cut.candidates
        indices = scratch[1] + part * cut.candidates
        count = tl.full((), 0, tl.int32)
        for i in tl.range(tiles_per_split, num_stages=COLLECT_STAGES):
            offs = (split * tiles_per_split + i) * SCAN + tl.arange(0, SCAN)
            v = read(x, offs, length, True)
            keep = (offs < length) & (sort_key(v) >= low)
            position = count + tl.cumsum(keep.to(tl.int32), 0) - 1
            count += tl.sum(keep.to(tl.int32), 0)
            keep &= position < cut.candidates
            tl.store(values + position, v, mask=keep)
            tl.store(indices + position, offs, mask=keep)
        tl.store(scratch[2] + part, count)


@triton.jit(do_not_specialize=["k", "num_splits"])
def choose_kernel(
    x,
    starts,
    lengths,
    scratch,
    out_values,
    out_indices,
    k,
    stride,
    vocab,
    num_splits,
    HIGH: tl.constexpr,
    cut: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: rows. `select_kernel` of what `candidates_kernel` found."""
    row = tl.program_id(0).to(tl.int64)
    x, length = window_of(x, row, stride, vocab, starts, lengths)
    out_indices += row * k
    out_values += row * k
    if length <= k:
        write_window(x, length, k, out_values, out_indices, BLOCK)
    else:
        low = tl.load(scratch[3] + row * 2)
        offs = tl.arange(0, cut.candidates)
        place = offs
        count = tl.full((), 0, tl.int32)
        for split in range(num_splits):
            inside = tl.load(scratch[2] + row * num_splits + split)
            place = tl.where(offs >= count, split * cut.candidates + offs - count, place)
            count += inside
        if count <= cut.candidates:
            there = offs < count
            first = row * num_splits * cut.candidates
            v = tl.load(scratch[0] + first + place, mask=there, other=NEG_INF)
            index = tl.load(scratch[1] + first + place, mask=there, other=0)
            write_kept(v, index, there, low, k, length, out_values, out_indices, HIGH)
        else:
            peak = tl.load(scratch[3] + row * 2 + 1)
            select_by_scans(x, length, k, low, peak, out_values, out_indices, HIGH, SCAN)
