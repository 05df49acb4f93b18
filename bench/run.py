"""Runs rows of the registry: correctness gate first, then times, ceilings and peers of the same run.

`python -m bench.run [--rows GLOB] [--out FILE.json] [--device cuda|cpu] [--cold]`. Exit code 0: every row was right
and timed; 1: a row was wrong, broke, or was not reached in time; 2: nothing to run. Rows that ask for it are also timed
inside CUDA graphs (`bench.graphs`); what cannot be captured says why, and fails nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fnmatch
import importlib.metadata
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.clock import Settings, Times, synchronize, time_ms, times_in_turn
from bench.graphs import Bound, time_in_graphs
from bench.record import Call, Peer, Row, short_error
from bench.registry import COLD_ROWS, ROWS

SCHEMA = 1
COLD_TIMEOUT_S = 120
ROOT = Path(__file__).resolve().parents[1]


def time_against(fn: Callable[[], object], ours: Callable[[], object], settings: Settings, work: float = 1.0) -> Times:
    """Times of a peer's call, and its `speedup`: its time over ours in the same rounds, above 1 where ours is faster.

    work: ours over the peer's, so that a peer that computes another shape is compared by time per flop.
    """
    times, again = times_in_turn([fn, ours], settings)
    return {**times, "speedup": times["ms"] / again["ms"] * work}


def _copy_gb_per_s(settings: Settings) -> float:
    source = torch.empty(settings.copy_mib << 20, dtype=torch.uint8, device=settings.device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / time_ms(lambda: target.copy_(source), settings)["ms"] / 1e6


def _matmul_tflop_per_s(settings: Settings, dtype: torch.dtype) -> float:
    n = settings.matmul_n
    a, b = (torch.randn(n, n, dtype=dtype, device=settings.device) for _ in range(2))
    return 2 * n**3 / time_ms(lambda: a @ b, settings)["ms"] / 1e9


def measure_ceilings(settings: Settings) -> dict[str, Any]:
    """What this device does at best: GB/s of a large copy (read plus written), TFLOP/s of a square product."""
    dtype = torch.bfloat16 if settings.device.type == "cuda" else torch.float32
    return {
        "copy_gb_per_s": _copy_gb_per_s(settings),
        "matmul_tflop_per_s": _matmul_tflop_per_s(settings, dtype),
        "matmul_dtype": str(dtype),
    }


# ---- the correctness gate


def _row_errors(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Relative L2 error of each vector of the last dimension, in fp64."""
    return torch.linalg.vector_norm(out.double() - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)


def gate(row: Row, inputs: Any, out: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Is `out` right? The worst vector may err twice as much as torch's worst in the same dtype, plus rounding.

    Rounding: one unit of the output's dtype, and fp32 accumulation of `terms` products (grows with the square root).
    Every element must be finite, so one that was never written (NaN) fails.
    """
    unwritten = int((~torch.isfinite(out)).sum())
    if unwritten:
        return {"ok": False, "reason": f"{unwritten} of {out.numel()} elements are not finite"}
    worst: dict[str, Any] = {"ok": True, "error": 0.0, "limit": 0.0}
    for sample in row.samples(row.shape, inputs, generator):
        error = float(_row_errors(out[sample.rows], sample.exact).max())
        rounding = torch.finfo(out.dtype).eps + torch.finfo(torch.float32).eps * sample.terms**0.5
        limit = 2 * float(_row_errors(sample.same_dtype, sample.exact).max()) + rounding
        if not error <= limit:
            return {
                "ok": False,
                "error": error,
                "limit": limit,
                "reason": f"{sample.label}: relative error {error:.3g} over the limit {limit:.3g}",
            }
        if error / limit >= worst["error"] / (worst["limit"] or 1.0):
            worst = {"ok": True, "error": error, "limit": limit}
    return worst


def check_call(row: Row, inputs: Any, call: Call, generator: torch.Generator) -> dict[str, Any]:
    """Plan, run twice, and judge: both outputs equal bit for bit, and right."""
    call.plan()
    call.reset()
    call.run()
    first = call.out.clone()
    call.out.fill_(float("nan"))
    call.reset()
    call.run()
    verdict = gate(row, inputs, call.out, generator)
    if verdict["ok"] and not torch.equal(first, call.out):
        return {**verdict, "ok": False, "reason": "two runs on the same inputs gave different bits"}
    return verdict


# ---- one row


def time_host(call: Call, run_ms: float, device: torch.device) -> dict[str, float | None]:
    """Host time in µs: `plan()` from an idle device, and `run()` enqueued many times without waiting (CUDA only)."""
    plans = []
    for _ in range(30):
        synchronize(device)
        begin = time.perf_counter()
        call.plan()
        plans.append(time.perf_counter() - begin)
    plan_us = 1e6 * statistics.median(plans)
    if device.type != "cuda":
        return {"plan_us": plan_us, "run_enqueue_us": None}
    repeats = max(4, min(100, int(100 / run_ms)))  # few enough that the launch queue never fills
    enqueues = []
    for _ in range(5):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            call.run()
        enqueues.append((time.perf_counter() - begin) / repeats)
    synchronize(device)
    return {"plan_us": plan_us, "run_enqueue_us": 1e6 * statistics.median(enqueues)}


def time_peer(
    peer: Peer, row: Row, inputs: Any, generator: torch.Generator, ours: Callable[[], object], settings: Settings
) -> dict[str, Any]:
    """`time_against` it; one that cannot run this row, or computes something wrong, gives the reason."""
    try:
        with peer.open(row.shape, inputs) as call:
            result = call()
            verdict = {"ok": True} if peer.layout is None else gate(row, inputs, peer.layout(result), generator)
            if not verdict["ok"]:
                return {"reason": verdict["reason"]}
            return time_against(call, ours, settings, peer.work(row.shape))
    except Exception as error:  # a peer that is missing must not hide the row
        return {"reason": short_error(error)}


def run_row(row: Row, settings: Settings, ceilings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Everything measured about one row. status: "ok", "failed" (wrong result) or "error" (it broke)."""
    result: dict[str, Any] = {"device": row.device, "shape": row.shape.fields()}
    result |= {"bytes": row.shape.num_bytes, "flops": row.shape.num_flops}
    try:
        generator = torch.Generator(settings.device).manual_seed(seed)
        before = torch.cuda.memory_allocated()
        inputs = row.make(row.shape, generator)
        bound = Bound(inputs, torch.cuda.memory_allocated() - before, row.call(row.shape, inputs))
        call = bound.call
        result["gate"] = check_call(row, inputs, call, generator)
        if not result["gate"]["ok"]:
            return {**result, "status": "failed", "reason": result["gate"]["reason"]}
        times = time_ms(call.run, settings)
        result |= times | time_host(call, times["ms"], settings.device) | _shares(row, times["ms"], ceilings)
        result["peers"] = {p.name: time_peer(p, row, inputs, generator, call.run, settings) for p in row.peers}
        if row.graphs:
            _add_graphs(result, row, bound, generator, settings)
            if not result["graph"].get("gate", result["gate"])["ok"]:
                return {**result, "status": "failed", "reason": result["graph"]["reason"]}
    except Exception as error:  # one broken row must not hide the others; the exit code tells
        return {**result, "status": "error", "reason": short_error(error)}
    return {**result, "status": "ok"}


def _add_graphs(result: dict[str, Any], row: Row, bound: Bound, generator: torch.Generator, settings: Settings) -> None:
    """Put `graph` into the row's entry, and into those of the peers that were timed."""

    def judge(inputs: Any, out: torch.Tensor) -> dict[str, Any]:
        return gate(row, inputs, out, generator)

    result["graph"], peers = time_in_graphs(row, bound, result, judge, generator, settings)
    for name, entry in peers.items():
        result["peers"][name]["graph"] = entry


def _shares(row: Row, ms: float, ceilings: dict[str, Any]) -> dict[str, float]:
    gb_per_s, tflop_per_s = row.shape.num_bytes / ms / 1e6, row.shape.num_flops / ms / 1e9
    return {
        "gb_per_s": gb_per_s,
        "tflop_per_s": tflop_per_s,
        "copy_share": gb_per_s / ceilings["copy_gb_per_s"],
        "matmul_share": tflop_per_s / ceilings["matmul_tflop_per_s"],
    }


# ---- the first call, kernel cache empty


def cold_child(row: Row, settings: Settings) -> dict[str, Any]:
    """Seconds of the first plan and run in this process, and of the second; run it in a fresh process."""
    generator = torch.Generator(settings.device).manual_seed(0)
    inputs = row.make(row.shape, generator)
    seconds = []
    begin = time.perf_counter()
    call = row.call(row.shape, inputs)
    for action in (call.plan, call.run, call.plan, call.run):
        action()
        synchronize(settings.device)
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return {"first_plan_s": seconds[0], "first_run_s": seconds[1], "second_s": seconds[2] + seconds[3]}


def measure_cold(name: str, device: torch.device) -> dict[str, Any]:
    """`cold_child` of the row `name` in a subprocess whose Triton cache directory is new."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", "bench.run", "--cold-child", name, "--device", str(device)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=COLD_TIMEOUT_S, check=True
            )
        except subprocess.SubprocessError as error:
            stderr = getattr(error, "stderr", None) or ""
            tail = (stderr.decode() if isinstance(stderr, bytes) else stderr).strip().splitlines()[-1:]
            return {"status": "error", "reason": " ".join([short_error(error), *tail])}
    return {"status": "ok", **json.loads(done.stdout.strip().splitlines()[-1])}


# ---- the run


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _output_of(*command: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def find_commit() -> str:
    """The checkout's commit, with "-dirty" where tracked files differ from it; "unknown" without git."""
    commit = _output_of("git", "rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    return commit + ("-dirty" if _output_of("git", "status", "--porcelain", "--untracked-files=no") else "")


def describe(settings: Settings, commit: str, seed: int) -> dict[str, Any]:
    """Where, when and with what a run was made."""
    cuda = settings.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "commit": commit,
        "seed": seed,
        "device": torch.cuda.get_device_name(settings.device) if cuda else _cpu_name(),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu_threads": torch.get_num_threads(),
        "timer": settings.timer,
        "settings": {**asdict(settings), "device": str(settings.device)},
    }


def figure(value: float) -> str:
    """A rate with as many digits as it deserves."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Plain text in aligned columns: the first to the left, the others to the right."""
    table = [header, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    )


def _cells(row: dict[str, Any]) -> list[str]:
    peers = (f"{name} {p['speedup']:.2f}x" if "ms" in p else f"{name} n/a" for name, p in row["peers"].items())
    enqueue = row["run_enqueue_us"]
    return [
        row["name"],
        f"{row['ms']:.4f}",
        figure(row["gb_per_s"]),
        f"{row['copy_share']:.2f}",
        figure(row["tflop_per_s"]),
        f"{row['plan_us']:.0f}",
        "-" if enqueue is None else f"{enqueue:.1f}",
        ", ".join(peers),
    ]


def graph_entries(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A row's entries of CUDA graphs: "ours", then peers by name; none where none were wanted, as in older files."""
    holders = [("ours", row), *row.get("peers", {}).items()]
    return [(name, holder["graph"]) for name, holder in holders if "graph" in holder]


def _graph_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of rows timed in CUDA graphs, then what could not be."""
    lines, problems = [], []
    for row in rows:
        (_, ours), *peers = graph_entries(row) or [("", {})]
        timed = ", ".join(f"{name} {p['speedup']:.2f}x" for name, p in peers if "ms" in p)
        lines += [[row["name"], figure(1e3 * ours["ms"]), str(ours["copies"]), timed]] if "ms" in ours else []
        problems += [f"no graph {row['name']} {n}: {e['reason']}" for n, e in graph_entries(row) if "reason" in e]
    table = [format_table(("in CUDA graphs", "us", "copies", "peer time / ours"), lines)] if lines else []
    return [*table, *problems]


def summary(results: dict[str, Any]) -> str:
    """The short text printed at the end of a run."""
    environment, ceilings = results["environment"], results["ceilings"]
    names = ("device", "torch", "triton", "commit")
    head = ", ".join(f"{name} {environment[name]}" for name in names)
    copy, product = ceilings["copy_gb_per_s"], ceilings["matmul_tflop_per_s"]
    header = ("row", "ms", "GB/s", "of copy", "TFLOP/s", "plan us", "run us", "peer time / ours")
    cold = [
        f"cold {c['name']}: first plan {c['first_plan_s']:.2f} s, first run {c['first_run_s']:.2f} s"
        for c in results["cold"]
        if c["status"] == "ok"
    ]
    problems = [f"{e['status'].upper()} {e['name']}: {e['reason']}" for e in _entries(results) if e["status"] != "ok"]
    right = [row for row in results["rows"] if row["status"] == "ok"]
    table = format_table(header, [_cells(row) for row in right])
    ceiling = f"ceilings: copy {figure(copy)} GB/s, {ceilings['matmul_dtype']} matmul {figure(product)} TFLOP/s"
    return "\n".join([head, ceiling, table, *_graph_lines(right), *cold, *problems])


def _entries(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [*results["rows"], *results["cold"]]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="*", metavar="GLOB", help="rows to run, by name")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where the results go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--cold", action="store_true", help="also time first calls with an empty kernel cache")
    parser.add_argument("--cold-child", metavar="ROW", help=argparse.SUPPRESS)
    parser.add_argument("--commit", help="the commit measured, where there is no git")
    parser.add_argument("--seed", type=int, help="of the random inputs; default: a fresh one")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="start no row after so many seconds")
    parser.add_argument("--warmup-ms", type=float, default=Settings.warmup_ms)
    parser.add_argument("--rep-ms", type=float, default=Settings.rep_ms)
    parser.add_argument("--copy-mib", type=int, help="size of the copy ceiling; default 4096, 256 on the CPU")
    parser.add_argument("--matmul-n", type=int, help="size of the product ceiling; default 8192, 2048 on the CPU")
    return parser.parse_args(argv)


def _settings(args: argparse.Namespace) -> Settings:
    device = torch.device(args.device)
    copy_mib, matmul_n = (Settings.copy_mib, Settings.matmul_n) if device.type == "cuda" else (256, 2048)
    return Settings(device, args.warmup_ms, args.rep_ms, args.copy_mib or copy_mib, args.matmul_n or matmul_n)


def _save(results: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def run_rows(
    rows: Sequence[Row], cold_rows: Sequence[Row], settings: Settings, args: argparse.Namespace
) -> dict[str, Any]:
    """All results; saved to `args.out` after every row, so that a run cut short leaves what it had."""
    begin = time.perf_counter()
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    environment = describe(settings, args.commit or find_commit(), seed)
    ceilings = measure_ceilings(settings)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment,
        "ceilings": ceilings,
        "rows": [],
        "cold": [],
    }

    def add(kind: str, row: Row, measure: Callable[[], dict[str, Any]]) -> None:
        late = time.perf_counter() - begin > args.limit_s
        entry = {"status": "not run", "reason": f"over --limit-s {args.limit_s:g}"} if late else measure()
        results[kind].append({"name": row.name, "op": row.op, **entry})
        _save(results, args.out)
        print(f"{time.perf_counter() - begin:6.1f} s  {entry['status']}  {kind[:4]} {row.name}", flush=True)

    for row in cold_rows:
        add("cold", row, partial(measure_cold, row.name, settings.device))
    for row in rows:
        add("rows", row, partial(run_row, row, settings, ceilings, seed))
    return results


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] = ROWS) -> int:
    """The command; `rows` is the table to choose from. Returns the exit code."""
    args = _parse(argv)
    settings = _settings(args)
    if args.cold_child is not None:
        print(json.dumps(cold_child(next(row for row in rows if row.name == args.cold_child), settings)))
        return 0
    here = [row for row in rows if row.device == settings.device.type]
    chosen = [row for row in here if fnmatch.fnmatch(row.name, args.rows)]
    cold_rows = [row for row in here if args.cold and row.name in COLD_ROWS]
    if not chosen or (args.cold and not cold_rows):
        wanted = "has a cold start to time" if chosen else f"matches {args.rows!r}"
        print(f"no row for device {settings.device.type!r} {wanted}", file=sys.stderr)
        return 2
    results = run_rows(chosen, cold_rows, settings, args)
    print(f"\n{summary(results)}")
    return 0 if all(entry["status"] == "ok" for entry in _entries(results)) else 1


if __name__ == "__main__":
    sys.exit(main())
