"""Rows to the ranks of their experts and back: each rank writes to the others' memory, then says so.

A place is a kind of call in one half of the memory (`alltoall/room.py`). Arrivals at a place are counted by the number
of the program: a program sends its rows, adds a word to the count of the same number on every other rank, and waits
until its own count has grown by as many words as there are others. It never waits for programs of other numbers, so it
does not matter how many of them a GPU runs at once, as long as it starts them in order; and adding up the first rows
goes on while the last ones are on their way. The word tells what the call is like: ranks that make different calls
never see the sum they wait for. Counts are never set back, and what they should be lies on the device: a captured graph
replays.

What a program tells of itself, HEAD_WORDS words beside the count (`head`): its rows' begin and end, the rank's number
of rows, the sum it waits for, and what the call is like (`spec.Call`), for messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.ops.alltoall.room import HEAD_WORDS, MAX_PROGRAMS, PLACES
from flashinfer.ops.alltoall.spec import ALIGNMENT, Row

PROGRAMS, HEAD, NUM_PLACES, UNIT = map(tl.constexpr, (MAX_PROGRAMS, HEAD_WORDS, PLACES, ALIGNMENT))


class Ranks(NamedTuple):
    """The ranks' memory as a kernel sees it, and what this rank keeps (`alltoall/room.py`).

    peers: uint8, own first, then that of the ranks after this one. report: address of int32 `[16]` on the host.
    limit: how often to look for the others' rows.
    """

    peers: tuple[torch.Tensor, ...]
    states: torch.Tensor
    report: int
    limit: int


class Begun(NamedTuple):
    """A call under way, in a kernel.

    place: of the head. word, tokens_per_rank, active: of the call. before, awaited: this program's count when it began,
    and when all have come.
    """

    place: int
    rank: int
    active: int
    word: int
    tokens_per_rank: int
    before: int
    awaited: int


class Payload(NamedTuple):
    """Words `[tokens, ...]`; stride: words between tokens."""

    data: torch.Tensor
    stride: int


@dataclass(frozen=True)
class DispatchConfig:
    """What a compiled form depends on.

    ranks, block_k: world_size and top_k rounded up to 2^n. scan: tokens looked at in one go for what lies before a
    program's own. rows, blocks: of the payloads, and their words rounded up to 2^n.
    """

    world_size: int
    num_experts: int
    top_k: int
    ranks: int
    block_k: int
    scan: int
    rows: tuple[Row, ...]
    blocks: tuple[int, ...]
    ids: int

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.world_size

    @property
    def told(self) -> tuple[int, int, int]:
        """What is told of such a call, for messages."""
        return sum(row.num_bytes for row in self.rows), self.num_experts, self.top_k


@dataclass(frozen=True)
class CombineConfig:
    """What a compiled form depends on. block: of the hidden_size elements, taken in one go; 2^n."""

    world_size: int
    hidden_size: int
    itemsize: int
    block: int

    @property
    def parts(self) -> int:
        return -(-self.hidden_size // self.block)

    @property
    def told(self) -> tuple[int, int, int]:
        """What is told of such a call, for messages."""
        return self.hidden_size * self.itemsize, self.hidden_size, self.itemsize


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def words_at(memory):
    """A rank's head as int32."""
    return memory.to(tl.pointer_type(tl.int32))


@triton.jit
def head(memory, place, rank, program, W: tl.constexpr):
    """Where `rank` tells what `program` has sent to the owner of `memory`."""
    return words_at(memory) + NUM_PLACES * PROGRAMS + ((place * W + rank) * PROGRAMS + program) * HEAD


@triton.jit
def share(num_tokens):
    """(begin, end) of a program's tokens."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    return pid * num_tokens // programs, (pid + 1) * num_tokens // programs


@triton.jit
def tell(ranks, k: tl.constexpr, call, begin, end, total, cfg: tl.constexpr):
    """Write this program's head to the rank `k` after this one."""
    i = tl.arange(0, HEAD)
    rows = tl.where(i == 0, begin, tl.where(i == 1, end, tl.where(i == 2, total, call.awaited)))
    shape = tl.where(i == 5, cfg.told[0], tl.where(i == 6, cfg.told[1], cfg.told[2]))
    words = tl.where(i < 4, rows, tl.where(i == 4, call.tokens_per_rank, shape))
    tl.store(head(ranks.peers[k], call.place, call.rank, tl.program_id(0), cfg.world_size) + i, words)


@triton.jit
def begun(ranks, place, rank, active, word, tokens_per_rank, W: tl.constexpr):
    """The call as the functions below take it."""
    before = tl.load(ranks.states + place * PROGRAMS + tl.program_id(0))
    others = tl.zeros([], tl.int32)
    for k in tl.static_range(1, W):
        others += (active >> ((rank + k) % W)) & 1
    return Begun(place, rank, active, word, tokens_per_rank, before, before + others * word)


@triton.jit
def meet(ranks, call, cfg: tl.constexpr):
    """Say that this program's rows are sent, and wait for those of the same program of the other ranks."""
    W: tl.constexpr = cfg.world_size
    pid = tl.program_id(0)
    tl.debug_barrier()  # the rows of all threads lie before what the one thread says below
    for k in tl.static_range(1, W):
        if (call.active >> ((call.rank + k) % W)) & 1 != 0:
            tl.atomic_add(words_at(ranks.peers[k]) + call.place * PROGRAMS + pid, call.word, sem="release", scope="sys")
    broken = ranks.states + NUM_PLACES * PROGRAMS
    # Once a rank was missed nothing is waited for, so that what is queued ends soon.
    limit, polls = tl.where(tl.load(broken, volatile=True) != 0, 0, ranks.limit), 0
    own = words_at(ranks.peers[0]) + call.place * PROGRAMS + pid
    count = tl.atomic_add(own, 0, sem="acquire", scope="sys")
    while (count != call.awaited) & (polls < limit):
        count = tl.atomic_add(own, 0, sem="acquire", scope="sys")
        polls += 1
    if count != call.awaited:
        complain(ranks, call, cfg)
    tl.debug_barrier()
    tl.store(ranks.states + call.place * PROGRAMS + pid, call.awaited)


@triton.jit
def complain(ranks, call, cfg: tl.constexpr):
    """Tell the host of the first rank that did not come, or rather of one that came with another call."""
    W: tl.constexpr = cfg.world_size
    pid = tl.program_id(0)
    missing, came = call.rank, 0
    for k in tl.static_range(1, W):
        other = (call.rank + k) % W
        said = tl.load(head(ranks.peers[0], call.place, other, pid, W) + 3, volatile=True)
        absent = ((call.active >> other) & 1 != 0) & (said != call.awaited)
        new = absent & ((missing == call.rank) | ((said != call.before) & (came == 0)))
        came = tl.where(new, (said != call.before).to(tl.int32), came)
        missing = tl.where(new, other, missing)
    tl.store(ranks.states + NUM_PLACES * PROGRAMS, 1)
    report = tl.cast(ranks.report, tl.int64).to(tl.pointer_type(tl.int32))
    # Programs that find what a rank came with are not written over by those that find nothing.
    if (came != 0) | (tl.load(report, volatile=True) == 0):
        i = tl.arange(0, HEAD)
        tl.store(report + 4 + i, tl.load(head(ranks.peers[0], call.place, missing, pid, W) + i, volatile=True))
        tl.store(report + 4 + HEAD, call.tokens_per_rank)
        for k in tl.static_range(3):
            tl.store(report + 5 + HEAD + k, cfg.told[k])
        tl.store(report + 1, missing)
        tl.store(report + 2, call.place // 2)
        tl.store(report + 3, came)
        tl.debug_barrier()
        tl.store(report, 1)


@triton.jit
def ranks_of(experts, tokens, mask, cfg: tl.constexpr):
    """The ranks of tokens' experts, as bits of int32."""
    offs_k = tl.arange(0, cfg.block_k)
    mask = mask[:, None] & (offs_k < cfg.top_k)[None, :]
    ids = tl.load(experts + tokens[:, None] * cfg.top_k + offs_k[None, :], mask=mask, other=-1)
    known = (ids >= 0) & (ids < cfg.num_experts)
    rank = tl.where(known, ids, 0) // cfg.experts_per_rank
    return tl.reduce(tl.where(known, 1 << rank, 0), 1, _either)


@triton.jit
def rows_before(experts, begin, num_tokens, active, cfg: tl.constexpr):
    """int32 `[cfg.ranks]`, twice: how many tokens before `begin`, and how many in all, go to each rank."""
    SCAN: tl.constexpr = cfg.scan
    RANKS: tl.constexpr = cfg.ranks
    offs_rank = tl.arange(0, RANKS)
    # Both counts in one number, so that they are added up over threads at once.
    sums = tl.zeros([SCAN, RANKS], tl.int64)
    for first in range(0, num_tokens, SCAN):
        tokens = first + tl.arange(0, SCAN)
        bits = ranks_of(experts, tokens, tokens < num_tokens, cfg) & active
        sent = ((bits[:, None] >> offs_rank[None, :]) & 1).to(tl.int64)
        sums += sent << 32 | tl.where((tokens < begin)[:, None], sent, 0)
    total = tl.sum(sums, 0)
    return (total & 0xFFFFFFFF).to(tl.int32), (total >> 32).to(tl.int32)


@triton.jit
def pick(x, i):
    """Element i of a short vector."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == i, x, 0), 0)


@triton.jit
def received_row(memory, half_begin, tokens_per_rank, row, kind: tl.constexpr, p: tl.constexpr, cfg: tl.constexpr):
    """Where row `row` of payload `p` lies in a rank's memory; words of type `kind`."""
    unit = half_begin
    for q in tl.static_range(p):  # `spec.region_bytes`
        num_bytes = tokens_per_rank * tl.cast(cfg.rows[q].num_bytes * cfg.world_size, tl.int64)
        unit += ((num_bytes + UNIT - 1) // UNIT).to(tl.int32)
    offset = tl.cast(unit, tl.int64) * UNIT + tl.cast(row, tl.int64) * cfg.rows[p].num_bytes
    return (memory + offset).to(tl.pointer_type(kind))


@triton.jit
def load_token(payloads, token, cfg: tl.constexpr):
    """The token's words of all payloads, so that one wait is for all."""
    tiles = ()
    for p in tl.static_range(len(cfg.rows)):
        offs = tl.arange(0, cfg.blocks[p])
        data = payloads[p].data + tl.cast(token, tl.int64) * payloads[p].stride
        tiles = tiles + (tl.load(data + offs, mask=offs < cfg.rows[p].words),)
    return tiles


@triton.jit
def send_token(tiles, memory, half_begin, tokens_per_rank, row, cfg: tl.constexpr):
    """Write a token's words to row `row` of each payload on a rank."""
    for p in tl.static_range(len(cfg.rows)):
        offs = tl.arange(0, cfg.blocks[p])
        into = received_row(memory, half_begin, tokens_per_rank, row, tiles[p].dtype, p, cfg)
        tl.store(into + offs, tiles[p], mask=offs < cfg.rows[p].words)


@triton.jit
def fill_rows(memory, half_begin, tokens_per_rank, first_row, num_rows, invalid_id, cfg: tl.constexpr):
    """Write invalid_id to this program's share of the rows that no token fills.

    The sender does it, since the receiver would have to wait for their number first.
    """
    BLOCK: tl.constexpr = cfg.blocks[cfg.ids]
    offs = tl.arange(0, BLOCK)
    invalid = tl.zeros([BLOCK], tl.int32) + invalid_id
    for row in range(num_rows + tl.program_id(0), tokens_per_rank, tl.num_programs(0)):
        into = received_row(memory, half_begin, tokens_per_rank, first_row + row, tl.int32, cfg.ids, cfg)
        tl.store(into + offs, invalid, mask=offs < cfg.rows[cfg.ids].words)


@triton.jit(
    do_not_specialize=["word", "tokens_per_rank", "num_tokens", "half_begin", "half", "rank", "active", "invalid_id"]
)
def dispatch_kernel(
    ranks,
    experts,
    payloads,
    slots,
    word,
    tokens_per_rank,
    num_tokens,
    half_begin,
    half,
    rank,
    active,
    invalid_id,
    cfg: tl.constexpr,
):
    """Grid: any number of programs up to MAX_PROGRAMS, the same on all ranks.

    ranks: Ranks. experts, slots: of `spec.Dispatch`. payloads: Payload of each. word: odd, the same for like calls.
    half_begin: ALIGNMENT bytes before the half. active: bits of the ranks that take part.
    """
    W: tl.constexpr = cfg.world_size
    call = begun(ranks, half, rank, active, word, tokens_per_rank, W)
    begin, end = share(num_tokens)
    offs_rank = tl.arange(0, cfg.ranks)
    before, total = rows_before(experts, begin, num_tokens, active, cfg)
    after = before
    first_row = rank * tokens_per_rank
    for token in range(begin, end):
        tiles = load_token(payloads, token, cfg)
        bits = ranks_of(experts, token + tl.arange(0, 1), tl.full([1], 1, tl.int1), cfg) & active
        sent = (bits >> offs_rank) & 1
        slot = tl.where(sent != 0, after, -1)
        tl.store(slots + token * W + offs_rank, slot, mask=offs_rank < W)
        after += sent
        for k in tl.static_range(W):
            row = pick(slot, (rank + k) % W)
            if row >= 0:
                send_token(tiles, ranks.peers[k], half_begin, tokens_per_rank, first_row + row, cfg)
    for k in tl.static_range(W):
        other = (rank + k) % W
        if (active >> other) & 1 != 0:
            num_rows = pick(total, other)
            if cfg.ids >= 0:
                fill_rows(ranks.peers[k], half_begin, tokens_per_rank, first_row, num_rows, invalid_id, cfg)
            tell(ranks, k, call, pick(before, other), pick(after, other), num_rows, cfg)
    meet(ranks, call, cfg)
    for k in range(1, W):
        other = (rank + k) % W
        if (active >> other) & 1 == 0:
            # Nobody writes this rank's part of what is here: it must not be that of an earlier call.
            if cfg.ids >= 0:
                fill_rows(ranks.peers[0], half_begin, tokens_per_rank, other * tokens_per_rank, 0, invalid_id, cfg)
            i = tl.arange(0, HEAD)
            tl.store(head(ranks.peers[0], call.place, other, tl.program_id(0), W) + i, tl.zeros([HEAD], tl.int32))


@triton.jit
def back_row(memory, row, payload, cfg: tl.constexpr):
    """Where row `row` of those that come back lies, as a pointer of payload's type."""
    offset = tl.cast(row, tl.int64) * (cfg.hidden_size * cfg.itemsize)
    return (memory + offset).to(tl.pointer_type(payload.dtype.element_ty))


@triton.jit
def copy_row(memory, row, source, cfg: tl.constexpr):
    """Write a row to where it comes back."""
    PARTS: tl.constexpr = cfg.parts
    into = back_row(memory, row, source, cfg)
    for part in tl.static_range(PARTS):
        offs = part * cfg.block + tl.arange(0, cfg.block)
        mask = offs < cfg.hidden_size
        tl.store(into + offs, tl.load(source + offs, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["word", "tokens_per_rank", "num_tokens", "begins", "half", "rank", "active"])
def combine_kernel(
    ranks,
    out,
    payload,
    slots,
    strides,
    word,
    tokens_per_rank,
    num_tokens,
    begins,
    half,
    rank,
    active,
    cfg: tl.constexpr,
):
    """Grid: as many programs as its dispatch had; each sends back the rows its namesakes sent, and adds up its tokens'.

    ranks, word, active: as in dispatch. out, payload, slots: of `spec.Combine`. strides: elements between rows of out,
    ranks of payload, rows of payload. begins: ALIGNMENT bytes before the rows that come back.
    """
    W: tl.constexpr = cfg.world_size
    PARTS: tl.constexpr = cfg.parts
    BLOCK: tl.constexpr = cfg.block
    call = begun(ranks, 2 + half, rank, active, word, tokens_per_rank, W)
    first_byte = tl.cast(begins, tl.int64) * UNIT
    # This rank's rows take the same way: what payload holds is done with when all have been told.
    for k in tl.static_range(W):
        other = (rank + k) % W
        if (active >> other) & 1 != 0:
            rows = head(ranks.peers[0], half, other, tl.program_id(0), W)
            # No further than the memory goes, whatever a rank that failed left there.
            first, last = tl.maximum(tl.load(rows), 0), tl.minimum(tl.load(rows + 1), tokens_per_rank)
            source = payload + tl.cast(other, tl.int64) * strides[1]
            into = ranks.peers[k] + first_byte
            for row in range(first, last):
                copy_row(into, rank * tokens_per_rank + row, source + tl.cast(row, tl.int64) * strides[2], cfg)
            tell(ranks, k, call, first, last, 0, cfg)
    meet(ranks, call, cfg)
    begin, end = share(num_tokens)
    for token in range(begin, end):
        line = out + tl.cast(token, tl.int64) * strides[0]
        for part in tl.static_range(PARTS):
            offs = part * cfg.block + tl.arange(0, cfg.block)
            mask = offs < cfg.hidden_size
            total = tl.zeros([BLOCK], tl.float32)
            for other_rank in tl.static_range(W):
                row = tl.load(slots + token * W + other_rank)
                source = back_row(ranks.peers[0] + first_byte, other_rank * tokens_per_rank + row, payload, cfg)
                # Not from the first-level cache, which does not see what other ranks write.
                x = tl.load(source + offs, mask=tl.where(mask, row, -1) >= 0, other=0.0, cache_modifier=".cg")
                total += x.to(tl.float32)
            tl.store(line + offs, total.to(out.dtype.element_ty), mask=mask)
