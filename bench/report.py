"""Turns a results file of `bench.run` into markdown: `python -m bench.report FILE.json [--out FILE.md]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.run import figure, graph_entries

MEMORY_BOUND_OPS = ("decode", "append")


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]


def _peer(entry: dict[str, Any] | None) -> str:
    """Times the peer takes of ours, e.g. "1.20×"; a dash where it was not asked or could not run."""
    return f"{entry['speedup']:.2f}×" if entry is not None and "ms" in entry else "–"


def _graph_table(op: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The op's rows that were timed inside CUDA graphs too, with the same peers; no lines where none was."""
    timed = [row for row in rows if "ms" in row.get("graph", {})]
    if not timed:
        return []
    peers = list(dict.fromkeys(name for row in timed for name, p in row["peers"].items() if "ms" in p.get("graph", {})))
    lines = []
    for row in timed:
        entries = [row["peers"].get(name, {}).get("graph") for name in peers]
        ours = f"{figure(1e3 * row['graph']['ms'])}{_warm(row['graph'])}"
        lines.append([f"`{row['name']}`", ours, *(_peer(entry) + _warm(entry or {}) for entry in entries)])
    said = "Time of a call inside a CUDA graph of many; graphs of ours and of the peers were replayed in turn."
    copies = (
        "Calls go over copies of the inputs, so that these come from memory, except where `L2` marks too few copies."
    )
    table = _markdown(("row", "µs", *(f"{name} ÷ ours" for name in peers)), lines)
    return [f"### {op} in CUDA graphs", "", f"{said} {copies}", "", *table, ""]


def _warm(entry: dict[str, Any]) -> str:
    return "" if entry.get("cold", True) else " L2"


def _op_table(op: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """One op's rows: rate and share of the ceiling that binds it, then each peer's time over ours."""
    memory_bound = op in MEMORY_BOUND_OPS or not any(row.get("flops") for row in rows)
    rate, share = ("gb_per_s", "copy_share") if memory_bound else ("tflop_per_s", "matmul_share")
    peers = list(dict.fromkeys(name for row in rows for name in row.get("peers", {})))
    unit = ("GB/s", "of copy") if memory_bound else ("TFLOP/s", "of matmul")
    lines = []
    for row in rows:
        if row["status"] != "ok":
            lines.append([f"`{row['name']}`", f"**{row['status']}**", *[""] * (len(peers) + 4)])
            continue
        enqueue = row["run_enqueue_us"]
        lines.append(
            [
                f"`{row['name']}`",
                f"{1e3 * row['ms']:.1f}",
                figure(row[rate]),
                f"{row[share]:.2f}",
                *(_peer(row["peers"].get(name)) for name in peers),
                f"{row['plan_us']:.0f}",
                "–" if enqueue is None else f"{enqueue:.1f}",
            ]
        )
    header = ("row", "µs", *unit, *(f"{name} ÷ ours" for name in peers), "`plan()` host µs", "`run()` host µs")
    return [f"### {op}", "", *_markdown(header, lines), ""]


def _head(results: dict[str, Any]) -> list[str]:
    environment, ceilings = results["environment"], results["ceilings"]
    versions = [f"{name} {environment[name]}" for name in ("driver", "torch", "triton", "cuda") if environment[name]]
    return [
        f"{environment['device']}; {', '.join(versions)}; {environment['date'][:10]}; "
        f"commit `{environment['commit']}`. "
        f"Ceilings of the same run: copy {figure(ceilings['copy_gb_per_s'])} GB/s (read plus written), "
        f"{ceilings['matmul_dtype'].removeprefix('torch.')} matmul {figure(ceilings['matmul_tflop_per_s'])} TFLOP/s. "
        f"Median times ({environment['timer']}); a peer above 1× is slower than this package.",
        "",
    ]


def _cold_table(cold: Sequence[dict[str, Any]]) -> list[str]:
    if not cold:
        return []
    lines = [
        [f"`{c['name']}`", *(f"{c[key]:.2f}" for key in ("first_plan_s", "first_run_s"))]
        if c["status"] == "ok"
        else [f"`{c['name']}`", f"**{c['status']}**", ""]
        for c in cold
    ]
    return ["### first call, kernel cache empty", "", *_markdown(("row", "`plan()` s", "`run()` s"), lines), ""]


def _problems(results: dict[str, Any]) -> list[str]:
    """What is missing from the tables, and why."""
    lines = []
    for entry in [*results["rows"], *results["cold"]]:
        if entry["status"] != "ok":
            lines.append(f"- `{entry['name']}` {entry['status']}: {entry['reason']}")
        for name, peer in entry.get("peers", {}).items():
            if "reason" in peer:
                lines.append(f"- `{entry['name']}`, peer {name} not timed: {peer['reason']}")
        for name, graph in graph_entries(entry):
            if "reason" in graph:
                lines.append(f"- `{entry['name']}`, {name} not timed in CUDA graphs: {graph['reason']}")
    return ["### not measured", "", *lines, ""] if lines else []


def to_markdown(results: dict[str, Any]) -> str:
    """The whole report: where it was measured, a table for each op, first calls, and what is missing."""
    lines = _head(results)
    for op in dict.fromkeys(row["op"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["op"] == op]
        lines += _op_table(op, rows) + _graph_table(op, rows)
    return "\n".join([*lines, *_cold_table(results["cold"]), *_problems(results)]).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="default: print it")
    args = parser.parse_args(argv)
    text = to_markdown(json.loads(args.results.read_text()))
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
