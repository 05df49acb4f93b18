"""Holds a results file of `bench.run` against the figures to beat: `python -m bench.anchors FILE.json`.

The figures are FlashInfer's (torch's for the selection of 2048) on an H200, vocabulary 128256, fp32 (the project's
`anchors.md`); they say nothing about results of another GPU, which are shown without a verdict. A worst case is held
against the common case of the same file. Exit code 0: no target was missed; 1: some was, or a row is missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.run import format_table

ANCHOR_GPU = "H200"
BATCHES = (1, 16, 64, 256, 512)
SOFTMAX = (0.0210, 0.0239, 0.0485, 0.1162, 0.2240)
FROM_LOGITS = (0.0486, 0.0486, 0.0499, 0.0974, 0.1861)
FROM_PROBS = (0.0289, 0.0426, 0.0453, 0.0775, 0.1173)
TOP_P = (0.0355, 0.0612, 0.0788, 0.1255, 0.1944)
TOP_K = (0.1008, 0.1874, 0.2266, 0.3784, 0.6212)
MIN_P = (0.0321, 0.0436, 0.0519, 0.1154, 0.1798)
TOP_P_RENORM = (0.0796, 0.1028, 0.1813, 0.4429, 0.8254)
TORCH_TOPK = (0.0978, 0.1189, 0.1922, 0.5110, 0.8997)


class Goal(NamedTuple):
    """What a row is held against: another time in ms, and the largest ratio of ours to it."""

    row: str
    anchor_ms: float | None
    target: float


# op -> (figures for each batch size, target)
ANCHORS: dict[str, tuple[tuple[float, ...], float]] = {
    "from_logits": (FROM_LOGITS, 0.5),
    "from_probs": (FROM_PROBS, 0.65),
    "top_k": (TOP_K, 0.2),
    "top_k_top_p_logits": (TOP_K, 0.2),
    "top_p": (TOP_P, 0.75),
    "min_p": (MIN_P, 0.5),
    "top_p_renorm": (TOP_P_RENORM, 0.4),
    "top_k_renorm": (TOP_P_RENORM, 0.4),
    "softmax": (SOFTMAX, 0.7),
    "select2048": (TORCH_TOPK, 0.4),
}
# op, batch size -> target, where it differs
SMALL_BATCHES = {("softmax", 1): 0.9, ("softmax", 16): 0.9}
# worst case -> common case
WORST_CASES = {
    "top_k_5000": "top_k",
    "both_5000": "top_k_top_p_logits",
    "top_p_flat": "top_p",
    "top_p_low": "top_p",
    "top_p_low_flat": "top_p",
}
WORST_BATCHES = (1, 64, 512)
WORST_TARGET = 3.0


def goals(times: Mapping[str, float]) -> Iterator[Goal]:
    """All goals; times: ms of the rows there are, by name."""
    for op, (figures, target) in ANCHORS.items():
        for batch_size, figure in zip(BATCHES, figures, strict=True):
            yield Goal(f"sampling_{op}_b{batch_size}", figure, SMALL_BATCHES.get((op, batch_size), target))
    for op, common in WORST_CASES.items():
        for batch_size in WORST_BATCHES:
            yield Goal(f"sampling_{op}_b{batch_size}", times.get(f"sampling_{common}_b{batch_size}"), WORST_TARGET)


def verdict(ms: float | None, goal: Goal, comparable: bool) -> str:
    """ "met", "MISSED", "-" where the figure is of another GPU, "no result" where one is missing."""
    if ms is None or goal.anchor_ms is None:
        return "no result"
    if not comparable:
        return "-"
    return "met" if ms <= goal.target * goal.anchor_ms else "MISSED"


def _peer(row: Mapping[str, Any] | None, name: str) -> str:
    ms = (row or {}).get("peers", {}).get(name, {}).get("ms")
    return "-" if ms is None else f"{ms:.4f}"


def compare(results: Mapping[str, Any]) -> tuple[str, bool]:
    """(the table as text, whether every goal was met or is not comparable)."""
    rows = {row["name"]: row for row in results["rows"] if row["status"] == "ok"}
    comparable = ANCHOR_GPU in results["environment"]["device"]
    lines, fine = [], True
    times = {name: row["ms"] for name, row in rows.items()}
    for goal in goals(times):
        row, ms = rows.get(goal.row), times.get(goal.row)
        said = verdict(ms, goal, comparable)
        fine = fine and said in ("met", "-")
        enqueue = (row or {}).get("run_enqueue_us")
        ratio = "-" if ms is None or goal.anchor_ms is None else f"{ms / goal.anchor_ms:.2f}"
        numbers = ("-" if n is None else f"{n:.4f}" for n in (ms, goal.anchor_ms))
        host = "-" if enqueue is None else f"{enqueue:.0f}"
        lines.append(
            [goal.row, *numbers, ratio, f"{goal.target:.2f}", said, _peer(row, "read_once"), _peer(row, "torch"), host]
        )
    header = ("row", "ms", "anchor ms", "ratio", "target", "verdict", "read once ms", "torch ms", "host us")
    return format_table(header, lines), fine


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        print("usage: python -m bench.anchors FILE.json", file=sys.stderr)
        return 2
    table, fine = compare(json.loads(Path(arguments[0]).read_text()))
    print(table)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
