"""Measured configurations: kept in memory, loaded from and saved to a file; measured only inside of `tuning()`.

Nothing is measured while serving: a kernel asks for what is `chosen`, and only `measuring()` tells it to `measure`.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Generic, TypeVar

import torch

from flashinfer.core import replay
from flashinfer.core.arch import Arch

SCHEMA = 1
WARMUP, REPEATS = 3, 10
FLUSH_BYTES = (256 << 20, 64 << 20)

Numbers = tuple[int, ...]
Config = TypeVar("Config", bound=tuple[int, ...])
Choice = TypeVar("Choice")


class Imposed(Generic[Choice]):
    """What calls in this thread get instead of their own choice, inside of `with imposed(choice):`, for measuring.

    None outside. Inside, calls are neither repeated nor remembered.
    """

    def __init__(self) -> None:
        self._choice: ContextVar[Choice | None] = ContextVar("imposed", default=None)

    def get(self) -> Choice | None:
        return self._choice.get()

    @contextlib.contextmanager
    def __call__(self, choice: Choice) -> Iterator[None]:
        token = self._choice.set(choice)
        try:
            with replay.paused():
                yield
        finally:
            self._choice.reset(token)


class _Table:
    """What was measured; generation changes whenever an entry does."""

    def __init__(self) -> None:
        self.entries: dict[str, Numbers] = {}
        self.generation = 0

    def update(self, entries: dict[str, Numbers]) -> None:
        if any(self.entries.get(key) != numbers for key, numbers in entries.items()):
            self.entries.update(entries)
            self.change()

    def clear(self) -> None:
        self.entries.clear()
        self.change()

    def change(self) -> None:
        self.generation += 1
        replay.forget()


_table = _Table()


class _State(threading.local):
    """depth: of `tuning()` blocks around this thread. skipped: operations that are not measured in them."""

    depth: int = 0
    skipped: frozenset[str] = frozenset()
    timing: bool = False


_state = _State()


def _name(key: str, arch: Arch) -> str:
    return f"{arch.name}/{key}"


def tuned(key: str, arch: Arch) -> Numbers | None:
    """The configuration measured for `key` on GPUs of this kind, None if there is none."""
    return _table.entries.get(_name(key, arch))


def chosen(key: str, arch: Arch, candidates: Sequence[Config]) -> Config | None:
    """The one of the candidates that was measured to be the fastest for `key`, None if none was.

    A file of other rules may hold what is no candidate today, and would write past the results of today's kernels.
    """
    found = tuned(key, arch)
    return next((config for config in candidates if config == found), None)


def measure(
    key: str, arch: Arch, device: torch.device, candidates: Sequence[Config], run: Callable[[Config], object]
) -> None:
    """Keep the fastest candidate for `key` on `device`, unless one was chosen before; RuntimeError if none runs."""
    if chosen(key, arch, candidates) is None:
        with on(device):
            record(key, arch, fastest(candidates, run)[0])


def record(key: str, arch: Arch, config: Sequence[int]) -> None:
    """Keep `config` for `key`."""
    _table.update({_name(key, arch): tuple(int(n) for n in config)})


def generation() -> int:
    """A number that changes whenever a configuration does: who keeps a choice compares it."""
    return _table.generation


def forget() -> None:
    """Forget all configurations."""
    _table.clear()


def load(path: str | Path) -> int:
    """Take the configurations of a file; returns how many. Raises ValueError for a file of another kind."""
    content = json.loads(Path(path).read_text())
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "configs" not in content:
        raise ValueError(f"{path}: got another file, expected one written by autotune(cache=...). Delete or rename it.")
    _table.update({key: tuple(numbers) for key, numbers in content["configs"].items()})
    return len(content["configs"])


def save(path: str | Path) -> None:
    """Write all configurations to a file, in one step: of several processes that do so the last one stays."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "configs": {key: list(numbers) for key, numbers in sorted(_table.entries.items())}}
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=target.name, suffix=".new", delete=False) as new:
        new.write(json.dumps(content, indent=1) + "\n")
    Path(new.name).replace(target)


@contextlib.contextmanager
def tuning(skipped: frozenset[str] = frozenset()) -> Iterator[None]:
    """Within, operations measure what they have no configuration for; skipped: names of those that do not."""
    before = _state.depth, _state.skipped
    _state.depth, _state.skipped = _state.depth + 1, _state.skipped | skipped
    try:
        with replay.paused():
            yield
    finally:
        _state.depth, _state.skipped = before


def measuring(op: str, device: torch.device) -> bool:
    """Whether to measure now: inside of `tuning()`, on a GPU, not while a graph is captured or something is timed."""
    if not _state.depth or _state.timing or op in _state.skipped or device.type != "cuda":
        return False
    with on(device):
        return not torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within, `device` is the current one: streams, events and captures are its own."""
    return torch.cuda.device(device) if torch.cuda.is_available() else contextlib.nullcontext()


def in_measurement() -> bool:
    """Whether this thread is timing a configuration."""
    return _state.timing


def fastest(candidates: Sequence[Config], run: Callable[[Config], object]) -> tuple[Config, float]:
    """The candidate with the least median time on the GPU, and that time in ms; one that does not run is left out.

    Raises RuntimeError if none runs.
    """
    best: tuple[Config, float] | None = None
    failures = []
    _state.timing = True
    try:
        for candidate in candidates:
            try:
                ms = time_ms(lambda candidate=candidate: run(candidate))  # type: ignore[misc]
            except Exception as error:  # out of shared memory, for instance: another candidate will do
                failures.append(f"{candidate}: {error}")
                continue
            if best is None or ms < best[1]:
                best = candidate, ms
    finally:
        _state.timing = False
    if best is None:
        raise RuntimeError(f"no configuration ran: {'; '.join(failures)}")
    return best


def _flush() -> torch.Tensor:
    """Memory to write: more than any L2 cache holds, less where that is not free."""
    for size in FLUSH_BYTES:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            return torch.empty(size, dtype=torch.uint8, device="cuda")
    return torch.empty(0, dtype=torch.uint8, device="cuda")


def time_ms(run: Callable[[], object]) -> float:
    """Median time of `run` on the current stream, its data not in the L2 cache if there is memory to flush it with."""
    flush = _flush()
    for _ in range(WARMUP):
        run()
    marks = []
    for _ in range(REPEATS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    times: list[float] = sorted(begin.elapsed_time(end) for begin, end in marks)
    return times[len(times) // 2]
