"""Rows handed from rank to rank through mailboxes: memory that every rank writes to, and only its owner reads.

Data is its own signal, as in NCCL's LL protocol and TensorRT-LLM's "Lamport" kernels: a mailbox is full of a mark,
-0.0, that no sender sends, and a receiver reads until no mark is left. One trip through the link brings the data and
the news of it. A place of a mailbox is used in three turns. In each use the receiver empties the place of the use
before. Nobody writes there before the use after the next: that begins, on any rank, when the next one has ended there,
so with this rank's data of the next use, which this rank sent after this use had ended.

Programs wait for those of the same number on other ranks only. All of a launch must be resident, or start in the order
of their numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Mailbox(NamedTuple):
    """A region of the ranks' mailboxes, as a kernel sees it (`ops/collectives/workspace.py`).

    peers: the mailboxes of all ranks, own: this rank's; of one dtype. first: elements before the region, turn: elements
    of one of its turns. uses: int32, the turn that each place of the region is at. broken: int32, not 0 once a rank was
    missed. report: address of int32 `[8]` on the host (`workspace.MailboxReport`). limit: how often a mailbox is read
    in vain before its sender counts as missing.
    """

    peers: tuple[torch.Tensor, ...]
    own: torch.Tensor
    first: int
    turn: int
    uses: torch.Tensor
    broken: torch.Tensor
    report: int
    rank: int
    limit: int


class Greeting(NamedTuple):
    """What each rank says it is about to do: int64 `[3, world_size]` on every rank, zeros where nothing was said.

    peers, own: as in Mailbox. uses: int32, the turn this rank is at. word: this rank's, not 0.
    """

    peers: tuple[torch.Tensor, ...]
    own: torch.Tensor
    uses: torch.Tensor
    word: int


@triton.jit
def _bits(x):
    if x.dtype.primitive_bitwidth == 32:
        return x.to(tl.int32, bitcast=True)
    elif x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True)
    else:
        return x.to(tl.int8, bitcast=True)


@triton.jit
def marks(SHAPE: tl.constexpr, dtype: tl.constexpr):
    """A tile of -0.0; made of bits, since a compiler may take 0.0 for it."""
    WIDTH: tl.constexpr = dtype.primitive_bitwidth
    kind: tl.constexpr = tl.int32 if WIDTH == 32 else (tl.int16 if WIDTH == 16 else tl.int8)
    return tl.full(SHAPE, -(2 ** (WIDTH - 1)), kind).to(dtype, bitcast=True)


@triton.jit
def is_mark(x):
    """Where `x` holds the bits of -0.0."""
    return _bits(x) == -(2 ** (x.dtype.primitive_bitwidth - 1))


@triton.jit
def sendable(x):
    """`x` with 0.0 in place of -0.0."""
    return tl.where(is_mark(x), 0, _bits(x)).to(x.dtype, bitcast=True)


@triton.jit
def turns(box, place):
    """(use, begin of its turn, begin of the turn of the use before): of a place, begins in elements, 64-bit."""
    use = tl.load(box.uses + place)
    begin = tl.cast(box.first, tl.int64)
    return use, begin + (use % 3) * tl.cast(box.turn, tl.int64), begin + ((use + 2) % 3) * tl.cast(box.turn, tl.int64)


@triton.jit
def used(box, place, use):
    """The place was used once more; every thread must have read `use` by now."""
    tl.debug_barrier()
    tl.store(box.uses + place, (use + 1) % 3)


@triton.jit
def patience(box):
    """How often to read in vain: never after a rank was missed, so that what is queued ends soon."""
    return tl.where(tl.load(box.broken, volatile=True) != 0, 0, box.limit)


@triton.jit
def _store_word(words, word):
    tl.store(words, (word & 0xFFFFFFFF).to(tl.int32))
    tl.store(words + 1, (word >> 32).to(tl.int32))


@triton.jit
def complain(box, rank, place, word, own_word):
    """Tell the host of the rank that was missed at a place, or came with another word (place -1), which says more."""
    words = tl.cast(box.report, tl.int64).to(tl.pointer_type(tl.int32))
    first = tl.load(box.broken, volatile=True) == 0
    tl.debug_barrier()
    if first | (place < 0):
        tl.store(box.broken, 1)
        tl.store(words + 1, rank)
        tl.store(words + 2, place)
        _store_word(words + 3, word)
        _store_word(words + 5, own_word)
        tl.debug_barrier()
        tl.store(words, 1)


@triton.jit
def greet(box, greeting, W: tl.constexpr):
    """Tell the other ranks what this one does, and complain of those that do something else."""
    use = tl.load(greeting.uses)
    now, before = (use % 3) * W, ((use + 2) % 3) * W
    for rank in tl.static_range(W):
        if rank != box.rank:
            tl.store(greeting.peers[rank] + now + box.rank, greeting.word)
    limit = patience(box)
    for rank in tl.static_range(W):
        if rank != box.rank:
            word, polls = tl.load(greeting.own + now + rank, volatile=True), 0
            while (word == 0) & (polls < limit):
                word = tl.load(greeting.own + now + rank, volatile=True)
                polls += 1
            if word != greeting.word:
                complain(box, rank, -1, word, tl.cast(greeting.word, tl.int64))
            tl.store(greeting.own + before + rank, tl.zeros([], tl.int64))
    tl.debug_barrier()
    tl.store(greeting.uses, (use + 1) % 3)


@triton.jit
def receive(box, offsets, mask, rank, place):
    """What `rank` put at `offsets` of this rank's mailbox, a tile; NaN (in bytes that of e4m3) if it does not come."""
    limit, polls = patience(box), 0
    x = tl.load(box.own + offsets, mask=mask, other=0, volatile=True)
    late = tl.max(is_mark(x).to(tl.int32), None)
    while (late > 0) & (polls < limit):
        x = tl.load(box.own + offsets, mask=mask, other=0, volatile=True)
        late = tl.max(is_mark(x).to(tl.int32), None)
        polls += 1
    if late > 0:
        complain(box, rank, place, tl.zeros([], tl.int64), tl.zeros([], tl.int64))
        if x.dtype.is_floating():
            x = tl.full(x.shape, float("nan"), x.dtype)
        else:
            x = tl.full(x.shape, 0x7F, x.dtype)
    return x


@triton.jit
def _sum(box, offsets, mask, stride, mine, W: tl.constexpr):
    """(sum in fp32, in the order of ranks; 1 if a part of it has not come yet, else 0)."""
    total, late = tl.zeros(mine.shape, tl.float32), tl.zeros(mine.shape, tl.int1)
    # Of many ranks, four rows at a time: more do not fit in the registers.
    for rank in tl.range(0, W, loop_unroll_factor=4 if W > 4 else W):
        own = tl.full(mine.shape, rank, tl.int32) == box.rank
        x = tl.load(box.own + offsets + rank * stride, mask=mask & ~own, other=0.0, volatile=True)
        late |= is_mark(x)
        total += tl.where(own, mine, x).to(tl.float32)
    return total, tl.max(late.to(tl.int32), 0)


@triton.jit
def receive_sum(box, offsets, mask, stride, mine, place, W: tl.constexpr):
    """`mine` and what the other ranks put at `offsets + rank * stride`: fp32, added in the order of ranks; else NaN."""
    limit, polls = patience(box), 0
    total, late = _sum(box, offsets, mask, stride, mine, W)
    while (late > 0) & (polls < limit):
        total, late = _sum(box, offsets, mask, stride, mine, W)
        polls += 1
    if late > 0:
        for rank in tl.static_range(W):
            if rank != box.rank:
                x = tl.load(box.own + offsets + rank * stride, mask=mask, other=0.0, volatile=True)
                if tl.max(is_mark(x).to(tl.int32), 0) > 0:
                    complain(box, rank, place, tl.zeros([], tl.int64), tl.zeros([], tl.int64))
        total = tl.full(total.shape, float("nan"), tl.float32)
    return total
