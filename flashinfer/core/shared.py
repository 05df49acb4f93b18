"""What ranks that work on each other's memory hold between calls: reports of kernels, permanent memory, its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from weakref import finalize

import torch

from flashinfer.core import check, replay
from flashinfer.core.peers import PeerError, Peers


class Report(ABC):
    """int32 words that kernels write to and the host reads without waiting; [0] is not 0 once something went wrong."""

    NUM_WORDS: int

    def __init__(self, device: torch.device) -> None:
        self.words = torch.zeros(self.NUM_WORDS, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._seen = self.words.numpy()

    @property
    def address(self) -> int:
        return self.words.data_ptr()

    def broken(self) -> bool:
        return bool(self._seen[0])

    @abstractmethod
    def problem(self, peers: Peers) -> PeerError:
        """The error that was reported."""


class Shared(ABC):
    """Memory of the ranks of `peers`, with what was reported of calls that use it.

    ENDED: how an error calls it and its state once it is closed, and what mends that.
    """

    ENDED: tuple[str, str, str]

    def __init__(self, peers: Peers, report: Report) -> None:
        self.peers, self.report, self.closed = peers, report, False
        self._permanent: list[torch.Tensor] = []
        self._release = finalize(self, replay.release, self._permanent)

    def check(self) -> None:
        """Raise PeerError for what went wrong with an earlier call, as far as it is known by now; waits for nothing."""
        self._check_open()
        if self.report.broken():
            raise self.report.problem(self.peers)

    def _check_open(self) -> None:
        if self.closed:
            name, state, fix = self.ENDED
            raise RuntimeError(check.problem(name, state, "one in use", fix))

    def close(self) -> None:
        """Free the memory once nobody uses it any more; every rank calls it."""
        if self.closed:
            return
        if self.peers.device.type == "cuda":
            torch.cuda.synchronize(self.peers.device)
        self.closed = True
        try:
            if not self.report.broken():
                self.peers.gather("close", None)
        finally:
            self._release()
            self._permanent.clear()
            self._forget()
            self.peers.close()

    @abstractmethod
    def _forget(self) -> None:
        """Let go of every view of the memory."""
