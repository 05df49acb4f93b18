"""Times of collectives on the GPUs of this machine, one rank a GPU, against torch.distributed's (NCCL).

`python -m bench.comm [--ranks 2] [--rows NAME] [--out FILE.json] [--device cuda|cpu] [--quick]`. Each problem is
checked on all ranks first. A time is that of the slowest rank, the median of rounds in which ours and the peer's are
called in turn: "graph": a call within a CUDA graph of many, "eager": a call from Python, many in a row. Exit code 0:
all were right; 1: one was wrong or broke; 2: nothing to run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from bench.comm_rows import PROBLEMS, Problem, Ranks, Run
from bench.run import find_commit

SCHEMA = 1
# Calls in a graph, of more than SLOW_BYTES and of less; rounds of a measurement.
SLOW_CALLS, CALLS, SLOW_BYTES, ROUNDS = 6, 30, 4 << 20, 7
Result = dict[str, Any]


def _graph(run: Run, count: int) -> Run:
    """A graph of `count` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    return graph.replay


def _repeated(run: Run, count: int) -> Run:
    def calls() -> None:
        for _ in range(count):
            run()

    return calls


def _seconds(run: Run, ranks: Ranks) -> float:
    """Of one run, from when all ranks are there."""
    if ranks.device.type == "cpu":
        dist.barrier()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    dist.barrier()
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3


def _microseconds(runs: list[Run], count: int, ranks: Ranks) -> list[float]:
    """Of a call of each, `count` of which a run makes, in turn; of the slowest rank."""
    for run in runs:
        run()
    rounds = [[_seconds(run, ranks) for run in runs] for _ in range(ROUNDS)]
    times = torch.tensor([statistics.median(t) * 1e6 / count for t in zip(*rounds, strict=True)], device=ranks.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    found: list[float] = times.tolist()
    return found


def measure(problem: Problem, ranks: Ranks) -> Result:
    """The check, then the times, in us."""
    problem.check()
    count = SLOW_CALLS if problem.num_bytes > SLOW_BYTES else CALLS
    count = 1 if ranks.device.type == "cpu" else count
    calls = [problem.ours, problem.peer]
    result: Result = {"name": problem.name, "bytes": problem.num_bytes, "peer": problem.peer_name}
    kinds = {"eager": lambda run: _repeated(run, count)}
    if ranks.device.type == "cuda":
        kinds["graph"] = lambda run: _graph(run, count)
    for kind, made in kinds.items():
        ours, peer = _microseconds([made(call) for call in calls], count, ranks)
        result[kind] = {"us": round(ours, 2), "peer_us": round(peer, 2), "speedup": round(peer / ours, 3)}
    return result


def _measured(ranks: Ranks, name: str) -> Iterator[Result]:
    """Ends with the first problem that is wrong: the ranks may be out of step then."""
    for row in (row for row in PROBLEMS if name in row):
        begin = time.perf_counter()
        try:
            for problem in PROBLEMS[row](ranks):
                yield measure(problem, ranks)
        except Exception:
            yield {"name": row, "error": traceback.format_exc()}
            return
        if ranks.rank == 0:
            print(f"{row}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)


def _rank(rank: int, folder: str, args: argparse.Namespace) -> None:
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(rank)
    store = dist.FileStore(f"{folder}/store", args.ranks)
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=60)
    options = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(backend, store=store, rank=rank, world_size=args.ranks, timeout=timeout, **options)
    results = []
    for result in _measured(Ranks(rank, args.ranks, device, args.quick), args.rows):
        results.append(result)
        Path(folder, f"{rank}.json").write_text(json.dumps(results))
    failed = any("error" in result for result in results)
    if not failed:
        dist.destroy_process_group()
    os._exit(int(failed))  # what a failed rank left behind must not be waited for


def _run(args: argparse.Namespace) -> list[Result]:
    """The results of rank 0, and the errors of all."""
    with tempfile.TemporaryDirectory() as folder:
        with suppress(multiprocessing.ProcessExitedException):
            multiprocessing.spawn(_rank, (folder, args), nprocs=args.ranks)
        found = []
        for rank in range(args.ranks):
            path = Path(folder, f"{rank}.json")
            mine = json.loads(path.read_text()) if path.exists() else [{"name": f"rank {rank}", "error": "died"}]
            found += [result for result in mine if rank == 0 or "error" in result]
        return found


def _record(args: argparse.Namespace, results: list[Result]) -> Result:
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if args.device == "cuda":
        import triton

        versions |= {"triton": triton.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts = {"schema": SCHEMA, "when": now, "commit": args.commit or find_commit(), "device": name, "ranks": args.ranks}
    return {**facts, "versions": versions, "rows": results}


def table(results: list[Result]) -> str:
    """A line for each problem: us of ours, of the peer, how many times faster ours is; eager, in a graph."""
    lines = [f"{'problem':<44}{'bytes':>10}  {'eager us':>9}{'peer':>9}{'x':>7}  {'graph us':>9}{'peer':>9}{'x':>7}"]
    for result in results:
        if "error" in result:
            lines.append(f"{result['name']}: {result['error']}")
            continue
        cells = ""
        for kind in ("eager", "graph"):
            if kind in result:
                times = result[kind]
                cells += f"  {times['us']:>9.1f}{times['peer_us']:>9.1f}{times['speedup']:>7.2f}"
        lines.append(f"{result['name']:<44}{result['bytes']:>10}{cells}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", default="", help=f"part of a name: {', '.join(PROBLEMS)}")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="the commit measured, where there is no git")
    parser.add_argument("--quick", action="store_true", help="the smallest problem of each kind only")
    args = parser.parse_args(arguments)
    if not any(args.rows in row for row in PROBLEMS) or (
        args.device == "cuda" and torch.cuda.device_count() < args.ranks
    ):
        print(f"nothing to run: rows {args.rows!r}, {torch.cuda.device_count()} GPUs", file=sys.stderr)
        return 2
    results = _run(args)
    record = _record(args, results)
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['device']}, {args.ranks} ranks, {record['versions']}, commit {record['commit']}")
    print(table(results))
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
