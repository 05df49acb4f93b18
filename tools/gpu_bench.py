"""The benchmark run on a GPU machine: `bench.run` with first-call times, and its markdown report.

`python3 -m tools.gpu_bench [--rows GLOB] [--no-cold] [--commit HASH]`. bench.json, bench.md and bench.log go to --out
($OUT by default). Exit code 0: all rows right and timed; 1: a row failed; 2: no CUDA device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.gpu_test import TIMED_OUT, output_folder, run_logged, tail

TABLE_LINES = 60


def run_bench(args: argparse.Namespace, out: Path) -> int:
    """`bench.run` and its report; prints the end of the log, which is the table."""
    results, log = out / "bench.json", out / "bench.log"
    results.unlink(missing_ok=True)  # an old file must not speak for this run
    command = [sys.executable, "-m", "bench.run", "--device", "cuda", "--rows", args.rows, "--out", str(results)]
    command += ["--limit-s", str(args.limit_s)]
    command += [] if args.no_cold else ["--cold"]
    command += ["--commit", args.commit] if args.commit else []
    code = run_logged(command, log, args.limit_s + args.grace_s)
    print(tail(log, TABLE_LINES))
    if code == TIMED_OUT:
        print(f"bench.run stopped after {args.limit_s + args.grace_s:.0f} s; bench.json holds the rows until then")
    if results.exists():
        code = run_logged([sys.executable, "-m", "bench.report", str(results)], out / "bench.md", 60) or code
    return code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="*", metavar="GLOB")
    parser.add_argument("--no-cold", action="store_true", help="leave out the first calls with an empty kernel cache")
    parser.add_argument("--commit", help="the commit measured; the lent machine has no git history")
    parser.add_argument("--limit-s", type=float, default=480.0, help="start no row after so many seconds")
    parser.add_argument("--grace-s", type=float, default=60.0, help="for the row that runs at the limit")
    parser.add_argument("--out", type=Path, help="folder for results; default $OUT")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    import torch

    args = parse(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: on a CPU run `python -m bench.run`", file=sys.stderr)
        return 2
    return 1 if run_bench(args, output_folder(args.out)) else 0


if __name__ == "__main__":
    sys.exit(main())
