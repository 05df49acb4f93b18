"""The benchmark run on a GPU machine: `bench.run` with first-call times, its markdown report, and the tuning sweep.

`python3 -m tools.gpu_bench [--rows GLOB] [--no-cold] [--sweep] [--commit HASH]`. bench.json, bench.md, bench.log and
sweep.json go to --out ($OUT by default). Exit code 0: all rows right and timed; 1: a row or the sweep failed;
2: --sweep asked for where there is none, or no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.gpu_test import TIMED_OUT, output_folder, run_logged, tail

SWEEP_MODULE = "flashinfer.ops.attention.triton.tuning"
TABLE_LINES = 60


def find_sweep() -> Callable[[Path], object]:
    """`sweep(out_path)` of the tuning module; ImportError or AttributeError where this checkout has none."""
    sweep: Callable[[Path], object] = importlib.import_module(SWEEP_MODULE).sweep
    return sweep


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
    parser.add_argument("--sweep", action="store_true", help=f"then also run {SWEEP_MODULE}.sweep")
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
    sweep = None
    if args.sweep:
        try:
            sweep = find_sweep()
        except (ImportError, AttributeError) as error:
            print(f"--sweep: {SWEEP_MODULE} has no sweep(out_path) here ({error})", file=sys.stderr)
            return 2
    out = output_folder(args.out)
    code = run_bench(args, out)
    if sweep is not None:
        begin = time.monotonic()
        sweep(out / "sweep.json")
        print(f"sweep took {time.monotonic() - begin:.0f} s: sweep.json")
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
