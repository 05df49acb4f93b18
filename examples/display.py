"""Showing a running engine: a live table on a terminal that has rich, plain lines otherwise."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine import Engine, Request

if TYPE_CHECKING:
    from rich.table import Table

Decode = Callable[[Sequence[int]], str]
PLAIN_INTERVAL = 2.0  # seconds between progress lines
LIVE_INTERVAL = 0.1  # seconds between redraws


def one_line(text: str) -> str:
    """`text` with line breaks and control characters shown as spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def status_line(engine: Engine) -> str:
    """One line on where the engine stands."""
    stats, pool = engine.stats, engine.pool
    rate = stats.generated_tokens / stats.seconds if stats.seconds else 0.0
    return (
        f"step {stats.steps}: {len(engine.running)} running, {len(engine.waiting)} waiting, "
        f"{pool.num_used}/{pool.num_pages} pages, {stats.generated_tokens} tokens, {rate:.1f} tok/s"
    )


class PlainDisplay:
    """Each answer as a line when it is complete, and a progress line every two seconds."""

    def __init__(self, engine: Engine, prompts: Sequence[str], decode: Decode) -> None:
        self.engine, self.prompts, self.decode = engine, prompts, decode
        self._last = time.perf_counter()

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def _due(self, interval: float) -> bool:
        now = time.perf_counter()
        if now - self._last < interval:
            return False
        self._last = now
        return True

    def answer(self, request: Request) -> str:
        """The finished request, as text."""
        return (
            f"[{request.index}] {one_line(self.prompts[request.index])[:72]}\n"
            f"    -> {one_line(self.decode(request.output))}  ({len(request.output)} tokens)"
        )

    def update(self, finished: Sequence[Request]) -> None:
        """Show what the last step changed."""
        for request in finished:
            print(self.answer(request), flush=True)
        if self._due(PLAIN_INTERVAL):
            print("  " + status_line(self.engine), flush=True)


class LiveDisplay(PlainDisplay):
    """Finished answers scroll by above a table of the running and waiting requests, text streaming as it comes."""

    def __init__(self, engine: Engine, prompts: Sequence[str], decode: Decode) -> None:
        super().__init__(engine, prompts, decode)
        from rich.live import Live

        self._live = Live(self._table(), auto_refresh=False, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(caption=status_line(self.engine), expand=True)
        for header in ("#", "state", "tokens", "pages"):
            table.add_column(header, no_wrap=True, justify="right")
        table.add_column("text", no_wrap=True, ratio=1)
        for request in [*self.engine.running, *self.engine.waiting]:
            text = one_line(self.decode(request.output))
            table.add_row(
                str(request.index),
                request.state,
                f"{len(request.output)}" if request.output else f"{request.num_cached}/{len(request.prompt)}",
                str(len(request.pages)),
                "…" + text[-160:] if len(text) > 160 else text or one_line(self.prompts[request.index]),
                style="bold" if request.output else "dim",
            )
        return table

    def update(self, finished: Sequence[Request]) -> None:
        from rich.text import Text

        for request in finished:
            self._live.console.print(Text(self.answer(request)))
        if self._due(LIVE_INTERVAL):
            self._live.update(self._table(), refresh=True)


def make_display(engine: Engine, prompts: Sequence[str], decode: Decode) -> PlainDisplay:
    """A live table where it can be drawn, else plain lines."""
    live = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
    return (LiveDisplay if live else PlainDisplay)(engine, prompts, decode)
