"""What the ranks of an all-to-all hold between calls: memory that all of them write to, and how far each has come.

Each rank's memory is a head, which tells of what has arrived, and two halves, each with the rows of one dispatch and of
its combine. Rows of dispatches begin where their half begins, rows of combines end where it ends, and the two never
overlap, whatever their shapes.

Why nobody writes over what a slower rank still reads, with no barrier besides the calls themselves: every call ends, on
any rank, only when all ranks have said that their rows of it are sent, which they say after whatever they launched
before it. A dispatch takes the other half than the one before it. So when a rank writes to a half again, either
- a combine of that half lies between: the rank has heard from all others in that combine, or in a dispatch after it,
  that they had done with the received rows; or
- the rows were given up: it has heard from all in the dispatch to the other half, which they launched after that.
Between a dispatch and its combine nobody writes to the other half, unless there is another dispatch: results may lie
there before combine sends them. Rows that come back are read inside of combine; between two combines of a half lies a
dispatch to it, which says that the first one has ended. So up to two dispatches may be under way before the combine of
the first. A captured graph writes to the halves it was captured with: each of its dispatches needs its combine in the
same graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from flashinfer.core import check, replay
from flashinfer.core.peers import PeerError, Peers
from flashinfer.core.shared import Report, Shared
from flashinfer.ops.alltoall.spec import ALIGNMENT, Call, region_bytes

# Programs of a launch at most, and words of the head that each tells of itself (`triton/kernel.py`).
MAX_PROGRAMS, HEAD_WORDS = 1024, 8
PLACES = 4  # a dispatch and a combine in each half
# Seconds that asking for the others' rows once takes, at least; through the interpreter on a CPU.
POLL_SECONDS = {"cuda": 4e-7, "cpu": 1e-4}
# Payloads of a dispatch that `room_bytes` leaves room for.
PAYLOADS = 16
KINDS = ("dispatch", "combine")
# Kinds of dispatches whose views of the memory are kept.
CAPACITY = 1024
_layout = attrgetter("shape", "dtype")
_numbers = itertools.count()
_rooms: WeakValueDictionary[int, Room] = WeakValueDictionary()


def head_bytes(world_size: int) -> int:
    """Arrivals at each place, then what each rank's programs tell of their rows there."""
    return 4 * PLACES * MAX_PROGRAMS * (1 + HEAD_WORDS * world_size)


def room_bytes(world_size: int, max_tokens: int, dispatch_bytes: int, combine_bytes: int) -> int:
    """Bytes of memory a rank needs for tokens of `dispatch_bytes` in all payloads and results of `combine_bytes`."""
    half = region_bytes(dispatch_bytes, world_size, max_tokens) + region_bytes(combine_bytes, world_size, max_tokens)
    return head_bytes(world_size) + 2 * (half + PAYLOADS * ALIGNMENT)


class CallReport(Report):
    """int32 `[16]` that kernels write to and the host reads without waiting for them.

    [0] not 0: something went wrong; [1] the rank it went wrong with; [2] the kind of call; [3] whether that rank came,
    with another call; [4] to [11] what it told of itself (`triton/kernel.py`), [12] to [15] what this rank's call is
    like, as in [8] to [11].
    """

    NUM_WORDS = 16

    def problem(self, peers: Peers) -> PeerError:
        """The error that was reported."""
        rank, kind, came, *words = (int(x) for x in self._seen[1:])
        if not came:
            text = f"rank {rank} sent nothing within about {peers.timeout:g} s: it died, hangs or made no such call"
        else:
            names = ("tokens_per_rank", "bytes of a token", "num_experts or hidden_size", "top_k or dtype")
            pairs = zip(names, words[8:], words[4:8], strict=True)
            differences = "; ".join(f"{name}: {a} here, {b} there" for name, a, b in pairs if a != b)
            text = f"rank {rank} made another call: {differences or 'other payloads, or not the same number of calls'}"
        return PeerError(f"{KINDS[kind]} on rank {peers.rank}: {text}. Results are not valid; make a new room.")


class Landing(NamedTuple):
    """What of a room's memory a dispatch writes to here, see `Dispatched`."""

    received: tuple[torch.Tensor, ...]
    counts: torch.Tensor
    slots: torch.Tensor
    call: Call


class Room(Shared):
    """The memory of one rank of an all-to-all, and of the others as it sees them. All ranks make it together.

    own: uint8 `[num_bytes]` of this rank. peers_memory: that of all ranks, the next rank's after each rank's, its own
    first; own alone where kernels cannot reach the others'. slots: int32 `[2, max_tokens or more, world_size]`
    (`spec.Dispatch`), for each half. states: int32, what has arrived here so far at each place; the last one is not 0
    once a rank was missed. backend: asked for in every call. number: no other room of the process has it. Raises
    PeerError where ranks disagree.
    """

    ENDED = ("room", "a closed one", "Make a new one.")

    def __init__(self, peers: Peers, max_tokens: int, num_bytes: int, backend: str = "auto") -> None:
        check.positive("max_tokens", max_tokens)
        least = head_bytes(peers.world_size) + 4 * ALIGNMENT
        if num_bytes < least:
            raise ValueError(check.problem("num_bytes", num_bytes, f"at least {least}", "Ask room_bytes(...)."))
        peers.exchange("all-to-all", max_tokens=max_tokens, num_bytes=num_bytes, backend=backend)
        super().__init__(peers, CallReport(peers.device))
        self.max_tokens, self.backend = max_tokens, backend
        self.unreachable = peers.unreachable()
        rank, size, device = peers.rank, peers.world_size, peers.device
        self.half_bytes = (num_bytes - head_bytes(size)) // 2 // ALIGNMENT * ALIGNMENT
        if self.unreachable is None:
            buffers = peers.allocate(num_bytes)
            self.own = buffers[rank]
            self.peers_memory = buffers[rank:] + buffers[:rank]
        else:
            self.own = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            self.peers_memory = (self.own,)
        self.head = self.own[: head_bytes(size)].view(torch.int32)
        slots = -(-max_tokens // 4) * 4  # so that those of both halves begin on 16 bytes
        self.slots = torch.full((2, slots, size), -1, dtype=torch.int32, device=device)
        self.states = torch.zeros(PLACES * MAX_PROGRAMS + 1, dtype=torch.int32, device=device)
        self.limit = min(int(peers.timeout / POLL_SECONDS[device.type]), 2**30) // 16 * 16
        # Kernels are launched again with these addresses (`core/replay.py`); slots of a half begin where it begins.
        self._permanent += map(replay.permanent, (*self.peers_memory, self.states, *self.slots))
        self.number = next(_numbers)
        _rooms[self.number] = self
        self._number = 0
        self._halves: list[int | None] = [None, None]  # the dispatch whose rows are in each half
        self._highest, self._lowest = 0, self.half_bytes  # where dispatches have ended, and combines begun
        self._known: set[Any] = set()
        self._views: dict[Any, torch.Tensor] = {}
        self._landings: dict[Any, Landing] = {}
        self.everyone = (1 << size) - 1  # the mask of all ranks

    def counts(self, half: int) -> torch.Tensor:
        """int32 `[world_size]`: how many rows each rank has sent to a half."""
        heads = self.head[PLACES * MAX_PROGRAMS :].view(PLACES, self.peers.world_size, MAX_PROGRAMS, HEAD_WORDS)
        return heads[half, :, 0, 2]

    def view(self, half: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Own memory of a half as a tensor; offset: in bytes, from where the half begins."""
        key = (half, offset, shape, dtype)
        found = self._views.get(key)
        if found is None:
            begin = self.half_begin(half) + offset
            num_bytes = dtype.itemsize
            for n in shape:
                num_bytes *= n
            found = self._views[key] = self.own[begin : begin + num_bytes].view(dtype).view(shape)
        return found

    def landing(self, half: int, active: int, tokens_per_rank: int, payloads: Sequence[torch.Tensor]) -> Landing:
        """Where the rows of a dispatch come in, for payloads like these; raises ValueError where they do not fit."""
        key = (half, active, tokens_per_rank, *map(_layout, payloads))
        found = self._landings.get(key)
        return self._landed(key, payloads) if found is None else found

    def _landed(self, key: Any, payloads: Sequence[torch.Tensor]) -> Landing:
        half, active, rows, *_ = key
        size = self.peers.world_size
        sizes = [region_bytes(prod(x.shape[1:]) * x.element_size(), size, rows) for x in payloads]
        self._fit(max(self._highest, sum(sizes)), self._lowest)
        received = []
        for x, offset in zip(payloads, accumulate(sizes, initial=0), strict=False):
            received.append(self.view(half, offset, (size, rows, *x.shape[1:]), x.dtype))
        if len(self._landings) >= CAPACITY:
            self._landings.clear()
            self._views.clear()
        slots = self.slots[half, : len(payloads[0])]
        found = self._landings[key] = Landing(tuple(received), self.counts(half), slots, Call(rows, half, active))
        return found

    def half_begin(self, half: int) -> int:
        """Bytes before a half; a multiple of ALIGNMENT."""
        return head_bytes(self.peers.world_size) + half * self.half_bytes

    def reserve_results(self, row_bytes: int, tokens_per_rank: int) -> int:
        """See that the rows of a combine fit; the offset at which they begin in a half."""
        begin = self.half_bytes - region_bytes(row_bytes, self.peers.world_size, tokens_per_rank)
        self._fit(self._highest, min(self._lowest, begin))
        return begin

    def _fit(self, highest: int, lowest: int) -> None:
        if highest > lowest:
            needed = head_bytes(self.peers.world_size) + 2 * (highest + self.half_bytes - lowest)
            got = f"room of {self.own.numel()} bytes"
            raise ValueError(check.problem("payloads", got, f"{needed} bytes", "Make a larger room (room_bytes)."))
        self._highest, self._lowest = highest, lowest

    def next(self) -> tuple[int, int]:
        """(number, half) of the next dispatch."""
        return self._number, self._number % 2

    def begin(self, number: int) -> None:
        """Dispatch `number` was made; its rows take the place of those of the dispatch before last."""
        self._halves[number % 2] = number
        self._number = number + 1

    def expect(self, number: int) -> None:
        """Raise RuntimeError if the rows of dispatch `number` are gone, or went back."""
        if self._halves[number % 2] != number:
            expected = "one of the last two dispatches, not combined yet"
            raise RuntimeError(check.problem("dispatched", f"dispatch {number}", expected, "Combine it earlier, once."))

    def end(self, number: int) -> None:
        """The rows of dispatch `number` went back."""
        self._halves[number % 2] = None

    def agree(self, kind: int, call: Call, **values: Any) -> None:
        """See that all ranks make the same call.

        On GPUs ranks compare words the first time that a call of its kind is made; kernels compare the others.
        """
        key = (kind, call.tokens_per_rank, call.active, tuple(values.values()))
        if key in self._known:
            return
        if call.active == self.everyone:
            self.peers.exchange(KINDS[kind], tokens_per_rank=call.tokens_per_rank, half=call.half, **values)
        if self.peers.device.type == "cuda":
            self._known.add(key)

    def _forget(self) -> None:
        self._views.clear()
        self._landings.clear()
        del self.own, self.peers_memory, self.head


def room_of(number: int) -> Room:
    """The room of this number, which calls that may be repeated know it by."""
    return _rooms[number]
