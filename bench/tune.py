"""Measures the schedules of the Hopper prefill and writes the fastest ones to its configuration file.

`python -m bench.tune --out flashinfer/ops/attention/tuned/sm90.json`. A schedule that gives wrong results, or breaks,
is left out. Exit code 0: every schedule was right and timed; 1: one was not, or one of the file's entries has none;
2: no GPU of this kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.clock import Settings, times_in_turn
from bench.record import Call, short_error
from bench.rows.attention import PROMPTS, AttentionShape, prefill_row, prompts
from bench.run import check_call, describe, find_commit
from flashinfer.core.arch import arch_of
from flashinfer.ops.attention.gluon_sm90.configs import Schedule, imposed

SCHEMA = 1
PROVENANCE = ("date", "device", "driver", "torch", "triton", "cuda", "commit", "timer")
CANDIDATES = tuple(Schedule(*choice) for choice in product((True, False), repeat=len(Schedule._fields)))


@dataclass(frozen=True)
class Trial:
    """A schedule on a problem; tflop_per_s is None where it did not run, or not right, and `reason` says why."""

    head_dim: int
    masks: bool
    problem: str
    schedule: Schedule
    tflop_per_s: float | None
    reason: str | None = None


def problems() -> tuple[AttentionShape, ...]:
    """Ragged prompts of the benchmark: causal ones stand for variants with masks, full ones for those without."""
    return tuple(prompts(*size, causal) for causal in (True, False) for size in PROMPTS)


def measure(shape: AttentionShape, settings: Settings, seed: int) -> list[Trial]:
    """Every candidate on one problem: judged first, then timed in turn."""
    row = prefill_row(shape, "fa3")
    generator = torch.Generator(settings.device).manual_seed(seed)
    inputs = row.make(shape, generator)
    calls: dict[Schedule, Call] = {}
    reasons: dict[Schedule, str] = {}
    for schedule in CANDIDATES:
        try:
            with imposed(schedule):
                call = row.call(shape, inputs)
                verdict = check_call(row, inputs, call, generator)
        except Exception as error:  # one that does not compile must not hide the others; the exit code tells
            verdict = {"ok": False, "reason": short_error(error)}
        if verdict["ok"]:
            calls[schedule] = call
        else:
            reasons[schedule] = verdict["reason"]
    times = times_in_turn([call.run for call in calls.values()], settings)
    rates = {s: shape.num_flops / t["ms"] / 1e9 for s, t in zip(calls, times, strict=True)}
    return [Trial(shape.head_dim, shape.causal, row.name, s, rates.get(s), reasons.get(s)) for s in CANDIDATES]


def label(schedule: Schedule) -> str:
    """What is on, for people: "persistent, turns"; "plain" when nothing is."""
    return ", ".join(name for name, on in schedule._asdict().items() if on) or "plain"


def scores(trials: Sequence[Trial]) -> dict[Schedule, float]:
    """Geometric mean of the rates of each schedule that did every problem of one entry, best first."""
    problems_of_all = {t.problem for t in trials}
    rates: dict[Schedule, dict[str, float]] = {}
    for t in trials:
        if t.tflop_per_s is not None:
            rates.setdefault(t.schedule, {})[t.problem] = t.tflop_per_s
    complete = {s: statistics.geometric_mean(r.values()) for s, r in rates.items() if set(r) == problems_of_all}
    return dict(sorted(complete.items(), key=lambda item: -item[1]))


def _entry(head_dim: int, masks: bool, trials: Sequence[Trial]) -> dict[str, Any]:
    ranking = scores(trials)
    if not ranking:
        raise RuntimeError(f"head_dim {head_dim}, masks {masks}: no schedule ran every problem")
    measured: dict[str, dict[str, float | str | None]] = {}
    for t in trials:
        rate = t.reason if t.tflop_per_s is None else round(t.tflop_per_s, 1)
        measured.setdefault(t.problem, {})[label(t.schedule)] = rate
    best = next(iter(ranking))
    return {"head_dim": head_dim, "masks": masks, "schedule": best._asdict(), "tflop_per_s": measured}


def document(trials: Sequence[Trial], environment: dict[str, Any]) -> dict[str, Any]:
    """What the file holds: where and when it was measured, and the winner of each (head_dim, masks) with all rates."""
    keys = sorted({(t.head_dim, t.masks) for t in trials})
    entries = [_entry(*key, [t for t in trials if (t.head_dim, t.masks) == key]) for key in keys]
    return {"schema": SCHEMA, "provenance": {name: environment[name] for name in PROVENANCE}, "entries": entries}


def write(path: Path, trials: Sequence[Trial], environment: dict[str, Any]) -> None:
    """Write the configuration file that `gluon_sm90.configs.tuned` reads."""
    text = json.dumps(document(trials, environment), indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def _lines(trials: Sequence[Trial]) -> Iterator[str]:
    for t in trials:
        rate = t.reason if t.tflop_per_s is None else f"{t.tflop_per_s:.0f} TFLOP/s"
        yield f"{t.problem}  {label(t.schedule)}: {rate}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="the commit measured, where there is no git")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() or not arch_of(torch.device("cuda")).has_wgmma:
        print("no Hopper GPU: these schedules are its own", file=sys.stderr)
        return 2
    settings = Settings(torch.device("cuda"))
    trials: list[Trial] = []
    for shape in problems():
        measured = measure(shape, settings, args.seed)
        print("\n".join(_lines(measured)), flush=True)
        trials += measured
    write(args.out, trials, describe(settings, args.commit or find_commit(), args.seed))
    return 0 if all(t.tflop_per_s is not None for t in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
