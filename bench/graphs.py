"""Times of calls inside CUDA graphs, as engines replay them: no launch from the host, no event around each call.

A graph holds many calls. They go over copies of the inputs in turn, so many that the L2 cache holds little of a copy
when its turn comes again; the graphs of a row and of its peers are replayed in turn.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench.clock import Settings, times_in_turn
from bench.record import Call, Peer, Row, short_error

# Of one graph: long against the launch of a graph, and short enough for many rounds.
GRAPH_MS = 4.0
# What all copies move together, in sizes of L2. Of a cyclic walk, a cache that replaces at random still holds 2 %.
ROTATED_L2 = 4
# A problem that moves as much, and twice L2, evicts itself.
LARGE_BYTES = 128 << 20
# Memory of further copies, of ours and of each peer.
EXTRA_BYTES = 4 << 30

Entry = dict[str, Any]
Judge = Callable[[Any, torch.Tensor], Entry]
# Graphs whose capture broke off: torch's allocator keeps asking them whether it allocates for them.
_broken: list[torch.cuda.CUDAGraph] = []


class Plan(NamedTuple):
    """calls: in a graph, a multiple of copies. cold: there are enough copies that L2 holds little of the next one."""

    calls: int
    copies: int
    cold: bool


class Bound(NamedTuple):
    """A row's inputs, the bytes of device memory they take, and the call bound to them."""

    inputs: Any
    nbytes: int
    call: Call


@dataclass(frozen=True)
class Captured:
    """A graph to time. work: the row's flops over those of one of its calls."""

    plan: Plan
    replay: Callable[[], object]
    work: float = 1.0

    def entry(self, times: dict[str, float]) -> Entry:
        """Times of a call, from those of a replay."""
        return {**{name: ms / self.plan.calls for name, ms in times.items()}, **self.plan._asdict()}


def make_plan(ms: float, num_bytes: int, copy_bytes: int, l2_bytes: int) -> Plan:
    """For a call that takes about `ms` and moves `num_bytes`, of inputs that take `copy_bytes` of memory."""
    calls = max(1, math.ceil(GRAPH_MS / ms))
    large = num_bytes >= max(LARGE_BYTES, 2 * l2_bytes)
    wanted = 1 if large else math.ceil(ROTATED_L2 * l2_bytes / num_bytes)
    copies = min(wanted, calls, 1 + EXTRA_BYTES // max(1, copy_bytes))
    return Plan(-(-calls // copies) * copies, copies, copies == wanted)


def l2_bytes(device: torch.device) -> int | None:
    """Size of the L2 cache; None where there are no CUDA graphs."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else None


# ---- capture


def capture(calls: Sequence[Callable[[], object]], count: int, device: torch.device) -> Callable[[], object]:
    """The replay of a graph of `count` calls, `calls` in turn, each called twice before on the capture's stream.

    Raises what a call raised; torch can capture, and draw random numbers, afterwards.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in (*calls, *calls):
            call()

    def all_calls() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    graph = torch.cuda.CUDAGraph()
    try:
        _record(graph, stream, all_calls)
    except Exception:
        _broken.append(graph)
        # Torch's generator takes a capture that broke off for one still under way, until another one has ended.
        _record(torch.cuda.CUDAGraph(), torch.cuda.Stream(device), lambda: torch.zeros(1, device=device))
        raise
    return graph.replay


def _record(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, body: Callable[[], object]) -> None:
    """Capture `body`. Raises its error, not that of the capture's end, which only says that there was one before."""
    first: Exception | None = None
    with torch.cuda.stream(stream):  # so that the caller's stream comes back even if the capture's end raises
        try:
            with torch.cuda.graph(graph, stream=stream):
                try:
                    body()
                except Exception as error:
                    first = error
                    raise
        except Exception as error:
            raise (first or error) from None
        finally:
            first = None  # its traceback holds this frame, and with it the row's tensors


# ---- a row


def time_in_graphs(
    row: Row, first: Bound, eager: Entry, judge: Judge, generator: torch.Generator, settings: Settings
) -> tuple[Entry, dict[str, Entry]]:
    """Times, `calls`, `copies`, `cold` and `gate` of ours; times, counts and `speedup` of each peer that eager ran.

    eager: the row's entry, with `ms` and `peers`. judge: `(inputs, output)` -> is it right? What could not be captured,
    or was wrong, has a `reason` and no times; where that is ours, no peer has an entry.
    """
    l2 = l2_bytes(settings.device)
    if l2 is None:
        return {"reason": f"no CUDA graphs on device {settings.device.type!r}"}, {}
    gc.collect()  # so that no older graph is destroyed during a capture
    with ExitStack() as stack:
        try:
            plan = make_plan(eager["ms"], row.shape.num_bytes, first.nbytes, l2)
            copies = _copies(row, first, plan.copies, generator)
            ours = Captured(plan, capture([copy.call.run for copy in copies], plan.calls, settings.device))
        except Exception as error:  # the times of eager calls are not lost with it
            return {"reason": short_error(error)}, {}
        peers: dict[str, Captured] = {}
        entries: dict[str, Entry] = {}
        for peer in (peer for peer in row.peers if "ms" in eager["peers"][peer.name]):
            try:
                inputs = [copy.inputs for copy in copies]
                ms = eager["peers"][peer.name]["ms"]
                peers[peer.name] = _capture_peer(peer, row, inputs, ms, l2, settings.device, stack)
            except Exception as error:  # nor is the row with one of its peers
                entries[peer.name] = {"reason": short_error(error)}
        times = times_in_turn([ours.replay, *(p.replay for p in peers.values())], settings, flushed=False)
        verdict = check_replay(copies, ours.replay, judge)
    if not verdict["ok"]:
        return {"gate": verdict, "reason": f"in a CUDA graph: {verdict['reason']}"}, {}
    mine = ours.entry(times[0])
    for (name, peer_graph), taken in zip(peers.items(), times[1:], strict=True):
        entry = peer_graph.entry(taken)
        entries[name] = {**entry, "speedup": entry["ms"] / mine["ms"] * peer_graph.work}
    return {**mine, "gate": verdict}, entries


def _copies(row: Row, first: Bound, count: int, generator: torch.Generator) -> list[Bound]:
    copies = [first]
    for _ in range(count - 1):
        inputs = row.make(row.shape, generator)
        copies.append(Bound(inputs, first.nbytes, row.call(row.shape, inputs)))
    for copy in copies:
        copy.call.plan()
    return copies


def _capture_peer(
    peer: Peer, row: Row, inputs: Sequence[Any], ms: float, l2: int, device: torch.device, stack: ExitStack
) -> Captured:
    """Its graph, open until `stack` ends. A peer that moves fewer bytes than the row is opened more often."""
    with ExitStack() as opened:
        before = torch.cuda.memory_allocated()
        calls = [opened.enter_context(peer.open(row.shape, inputs[0]))]
        own_bytes = torch.cuda.memory_allocated() - before
        plan = make_plan(ms, peer.computes(row.shape).num_bytes, own_bytes, l2)
        # What reads the row's inputs as they are has no more copies than there are of these.
        plan = plan._replace(cold=plan.cold and (own_bytes > 0 or plan.copies <= len(inputs)))
        for i in range(1, plan.copies):
            calls.append(opened.enter_context(peer.open(row.shape, inputs[i % len(inputs)])))
        replay = capture(calls, plan.calls, device)
        stack.enter_context(opened.pop_all())
    return Captured(plan, replay, peer.work(row.shape))


def check_replay(copies: Sequence[Bound], replay: Callable[[], object], judge: Judge) -> Entry:
    """Does a replay write every copy's output, with the bits of an eager call, or else right by `judge`?"""
    expected = []
    for copy in copies:
        copy.call.run()
        expected.append(copy.call.out.clone())
        copy.call.out.fill_(float("nan"))
    replay()
    differing = [copy for copy, out in zip(copies, expected, strict=True) if not torch.equal(copy.call.out, out)]
    for copy in differing:
        verdict = judge(copy.inputs, copy.call.out)
        if not verdict["ok"]:
            return verdict
    return {"ok": True, "same_bits": not differing}
