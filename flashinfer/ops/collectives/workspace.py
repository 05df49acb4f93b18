"""What the collectives of one group of ranks hold between calls: mailboxes, their states, what went wrong."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from flashinfer.core import check, replay
from flashinfer.core.peers import PeerError, Peers
from flashinfer.core.shared import Report, Shared
from flashinfer.ops.collectives.plan import Region, one_shot_region, two_shot_region
from flashinfer.ops.collectives.spec import Word

# Seconds that reading a mailbox once takes, at least; through the interpreter on a CPU.
READ_SECONDS = {"cuda": 4e-7, "cpu": 3e-4}
_numbers = itertools.count()
_workspaces: WeakValueDictionary[int, Workspace] = WeakValueDictionary()


class MailboxReport(Report):
    """int32 `[8]` in memory that kernels write to and the host reads without waiting for them.

    [0] not 0: something went wrong; [1] the rank it went wrong with; [2] the place that was waited for, or -1; [3], [4]
    the lower and the upper half of the word that rank came with, [5], [6] those of this rank's own.
    """

    NUM_WORDS = 8

    def problem(self, peers: Peers) -> PeerError:
        rank, place, *halves = (int(x) for x in self._seen[1:7])
        word, own = ((high & 0xFFFFFFFF) << 32 | low & 0xFFFFFFFF for low, high in (halves[:2], halves[2:]))
        if place >= 0:
            text = f"rank {rank} sent nothing for row {place} within about {peers.timeout:g} s: it died or hangs"
        elif word == 0:
            text = f"rank {rank} made no call within about {peers.timeout:g} s"
        else:
            text = f"rank {rank} made another call; {Word.unpacked(own).differences(Word.unpacked(word))}"
        return PeerError(f"collective on rank {peers.rank}: {text}. Its results are not valid; make a new workspace.")


@dataclass(frozen=True, eq=False)
class Room:
    """Mailboxes for rows of one size and dtype, and their states.

    boxes: `[elements]` of each rank. greetings: int64 `[3 * world_size]` of each rank. regions: (one shot, two shots),
    in rows. number: no other room of the process has it. uses: int32 of the places of each region. greeted, broken:
    int32 `[1]` (`device/mailbox.py`).
    """

    number: int
    peers: Peers
    cols: int
    boxes: tuple[torch.Tensor, ...]
    greetings: tuple[torch.Tensor, ...]
    regions: tuple[Region, Region]
    uses: tuple[torch.Tensor, torch.Tensor]
    greeted: torch.Tensor
    broken: torch.Tensor
    report: Report
    limit: int

    @property
    def firsts(self) -> tuple[int, int]:
        """Elements before each region."""
        return 0, 3 * self.regions[0].turn * self.cols


class Workspace(Shared):
    """The rooms of one group of ranks, made when first needed: every rank makes the same calls in the same order.

    max_bytes: of the largest tensor that goes through the mailboxes without being cut.
    """

    ENDED = ("workspace", "a destroyed one", "Make a new workspace.")

    def __init__(self, peers: Peers, max_bytes: int) -> None:
        super().__init__(peers, MailboxReport(peers.device))
        self.max_bytes = max_bytes
        self.unreachable = peers.unreachable()
        self.number = next(_numbers)
        self._agreed: set[Word] = set()
        self._rooms: dict[tuple[torch.dtype, int], Room] = {}
        _workspaces[self.number] = self

    def room(self, dtype: torch.dtype, cols: int, max_bytes: int | None = None) -> Room:
        """Mailboxes for rows of `cols` elements; the first call for them allocates on all ranks.

        max_bytes: what goes through them at once, None for the workspace's.
        """
        found = self._rooms.get((dtype, cols))
        if found is None:
            self._check_open()
            if self.peers.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                got = f"the first call for rows of {cols} {dtype} in a CUDA graph's capture"
                raise RuntimeError(check.problem("workspace", got, "a call before the capture", "Warm up first."))
            found = self._rooms[dtype, cols] = self._made(dtype, cols, max_bytes or self.max_bytes)
        return found

    def _made(self, dtype: torch.dtype, cols: int, max_bytes: int) -> Room:
        peers, row_bytes = self.peers, cols * dtype.itemsize
        regions = (
            one_shot_region(row_bytes, max_bytes, peers.world_size),
            two_shot_region(row_bytes, max_bytes, peers.world_size),
        )
        head = 3 * peers.world_size * 8
        head += -head % 128
        size = 3 * sum(region.turn for region in regions) * row_bytes
        buffers = peers.allocate(head + size)
        boxes = tuple(buffer[head:].view(dtype) for buffer in buffers)
        greetings = tuple(buffer[: 3 * peers.world_size * 8].view(torch.int64) for buffer in buffers)
        boxes[peers.rank].fill_(-0.0)
        sizes = [4, 4, *(-(-region.places // 4) * 4 for region in regions)]  # each begins on 16 bytes
        state = torch.zeros(sum(sizes), dtype=torch.int32, device=peers.device)
        if peers.device.type == "cuda":
            torch.cuda.synchronize(peers.device)
        peers.gather("mailboxes are empty", None)
        greeted, broken, *uses = state.split(sizes)
        self._permanent += map(replay.permanent, (*boxes, *greetings, greeted, broken, *uses))
        limit = min(int(peers.timeout / READ_SECONDS[peers.device.type]), 2**30)
        uses_of = (uses[0], uses[1])
        return Room(
            next(_numbers), peers, cols, boxes, greetings, regions, uses_of, greeted, broken, self.report, limit
        )

    def agree(self, word: Word) -> None:
        """See that every rank makes this call: each time on the CPU, the first time on a GPU (it takes 0.1 ms a rank).

        Raises PeerError naming the rank and what differs.
        """
        if word in self._agreed:
            return
        if self.peers.device.type == "cuda":
            self._agreed.add(word)
        for rank, number in enumerate(self.peers.gather("collective", word.packed)):
            if number != word.packed:
                difference = word.differences(Word.unpacked(number))
                raise PeerError(f"collective on rank {self.peers.rank}: rank {rank} made another call; {difference}.")

    def _forget(self) -> None:
        self._rooms.clear()


def workspace_of(number: int) -> Workspace:
    """The workspace of this number, which torch ops know it by."""
    found = _workspaces.get(number)
    if found is None:
        raise RuntimeError(check.problem("workspace", "one that is gone", "one in use", "Keep it while it is used."))
    return found
