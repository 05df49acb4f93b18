"""How time is taken: calls in turn, so that clocks, heat and whatever else the machine does fall on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# More than any L2 cache holds; and to write it takes longer than a host needs to enqueue a call, so that the GPU never
# waits for the host between two events.
FLUSH_BYTES = 512 << 20
FEWEST_ROUNDS, MOST_ROUNDS = 5, 400

Times = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """How a run measures. Times in ms; copy_mib: size of the ceiling's copy; matmul_n: its square product."""

    device: torch.device
    warmup_ms: float = 25.0
    rep_ms: float = 100.0
    copy_mib: int = 4096
    matmul_n: int = 8192

    @property
    def timer(self) -> str:
        return "CUDA events, L2 flushed, calls in turn" if self.device.type == "cuda" else "perf_counter"


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(fn: Callable[[], object], settings: Settings) -> Times:
    """Median, 20th and 80th percentile of the time of `fn`, in ms."""
    return times_in_turn([fn], settings)[0]


def times_in_turn(fns: Sequence[Callable[[], object]], settings: Settings, flushed: bool = True) -> list[Times]:
    """As `time_ms` for each of `fns`, which are called in turn; flushed: on a GPU, with nothing of theirs in L2."""
    if not fns:
        return []
    times = _by_events(fns, settings, flushed) if settings.device.type == "cuda" else _by_host_clock(fns, settings)
    return [{"ms": statistics.median(t), **_p20_p80(t)} for t in times]


def _p20_p80(times: Sequence[float]) -> Times:
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20_ms": cuts[1], "p80_ms": cuts[7]}


def _by_host_clock(fns: Sequence[Callable[[], object]], settings: Settings) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in fns]
    warm_until = time.perf_counter() + 1e-3 * settings.warmup_ms
    until = warm_until + 1e-3 * settings.rep_ms * len(fns)
    for fn in fns:
        fn()
    while time.perf_counter() < until or len(times[0]) < FEWEST_ROUNDS:
        for fn, mine in zip(fns, times, strict=True):
            begin = time.perf_counter()
            fn()
            if begin >= warm_until:
                mine.append(1e3 * (time.perf_counter() - begin))
    return times


def _by_events(fns: Sequence[Callable[[], object]], settings: Settings, flushed: bool) -> list[list[float]]:
    flush = torch.empty(FLUSH_BYTES if flushed else 0, dtype=torch.uint8, device=settings.device)

    def rounds(count: int) -> list[list[float]]:
        """All is enqueued before anything is waited for."""
        marks = [[_marked(fn, flush) for fn in fns] for _ in range(count)]
        synchronize(settings.device)
        return [[begin.elapsed_time(end) for begin, end in column] for column in zip(*marks, strict=True)]

    per_round = sum(map(min, rounds(3)))
    rounds(_count(settings.warmup_ms, per_round))
    return rounds(_count(settings.rep_ms * len(fns), per_round))


def _marked(fn: Callable[[], object], flush: torch.Tensor) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    begin.record()
    fn()
    end.record()
    return begin, end


def _count(budget_ms: float, per_round: float) -> int:
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(budget_ms / per_round)))
