"""The GPU test run: the ops tests, then compute-sanitizer over a few small calls, on a machine without network.

`python3 -m tools.gpu_test [-n WORKERS] [--limit-s S] [-k EXPR] [--no-sanitizer]`. Logs, junit.xml and gpu_test.json go
to --out ($OUT by default). Exit code 0: tests passed and the sanitizer is clean; 1: a failure, a time limit, or
nothing ran; 2: no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SANITIZER_CASES = "tools.gpu_sanitize_cases"
TIMED_OUT = 124
SANITIZER_FOUND = 97
SHOWN_FAILURES = 25


@dataclass(frozen=True)
class Step:
    """One finished command. seconds: wall time. log: its output. problem: why it counts as failed; None when clean."""

    name: str
    returncode: int
    seconds: float
    log: str
    problem: str | None


def run_logged(command: Sequence[str], log: Path, limit_s: float, env: Mapping[str, str] | None = None) -> int:
    """Run `command` in the repository root, output to `log`; its exit code, or 124 when it ran past `limit_s`.

    At the limit the command and all it started are killed (it runs in a process group of its own).
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=max(limit_s, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return TIMED_OUT


def output_folder(given: Path | None) -> Path:
    """Where results go: the option, else $OUT (the lent machine sets it), else `gpu-out` here."""
    folder = given or Path(os.environ.get("OUT") or "gpu-out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def tail(log: Path, lines: int) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of a junit file, and the names of the tests that failed; zeros when pytest never wrote it."""
    counts: dict[str, Any] = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, "failed_names": []}
    if not path.exists():
        return {**counts, "passed": 0}
    for suite in xml.etree.ElementTree.parse(path).iter("testsuite"):
        for key in ("tests", "failures", "errors", "skipped"):
            counts[key] += int(suite.get(key, 0))
        for case in suite.iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                counts["failed_names"].append(f"{case.get('classname')}::{case.get('name')}")
    return {**counts, "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]}


def run_tests(args: argparse.Namespace, out: Path, limit_s: float) -> tuple[Step, dict[str, Any]]:
    """pytest over `args.tests`; failed also when no test passed at all."""
    junit, log = out / "junit.xml", out / "pytest.log"
    junit.unlink(missing_ok=True)  # an old file must not speak for this run
    command = [
        sys.executable,
        "-m",
        "pytest",
        *args.tests,
        "-v",
        "--tb=short",
        "-ra",
        "--durations=15",
        f"--junitxml={junit}",
    ]
    command += ["-n", str(args.workers)] if args.workers > 1 else []
    command += ["-k", args.select] if args.select else []
    begin = time.monotonic()
    code = run_logged(command, log, limit_s)
    counts = read_junit(junit)
    problem = None
    if code == TIMED_OUT:
        problem = f"stopped at the limit of {limit_s:.0f} s"
    elif code != 0:
        problem = f"pytest exit code {code}: {counts['failures']} failed, {counts['errors']} errors"
    elif counts["passed"] == 0:
        problem = "no test passed: all were skipped or none was collected"
    return Step("pytest", code, time.monotonic() - begin, log.name, problem), counts


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH or in the CUDA toolkit."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def run_sanitizer(tool: str, out: Path, deadline: float) -> list[Step]:
    """The cases plainly first (compiles kernels, shows ordinary failures), then under compute-sanitizer's `tool`."""
    log = out / f"sanitize_{tool}.log"  # the second run writes over the first: few files come back from a lent machine
    program = [sys.executable, "-m", SANITIZER_CASES]
    begin = time.monotonic()
    code = run_logged(program, log, deadline - begin)
    steps = [Step("cases", code, time.monotonic() - begin, log.name, f"exit code {code}" if code else None)]
    if code:
        return steps
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return [*steps, Step(tool, 127, 0.0, "", "compute-sanitizer not found; --no-sanitizer leaves it out")]
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), *program]
    begin = time.monotonic()
    # Without torch's caching allocator every tensor is an allocation of its own, so a read past its end is seen.
    code = run_logged(command, log, deadline - begin, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    problem = f"exit code {code}" if code else None
    if code == SANITIZER_FOUND:
        problem = "it found errors"
    elif code == TIMED_OUT:
        problem = "stopped at the time limit"
    elif "ERROR SUMMARY: 0 errors" not in log.read_text(errors="replace") and code == 0:
        problem = "no clean summary in its output: the tool did not attach"
    return [*steps, Step(tool, code, time.monotonic() - begin, log.name, problem)]


def print_summary(steps: Sequence[Step], counts: Mapping[str, Any], out: Path) -> None:
    """Failing tests and the ends of failing logs, then one line a step."""
    for name in counts["failed_names"][:SHOWN_FAILURES]:
        print(f"FAILED {name}")
    hidden = len(counts["failed_names"]) - SHOWN_FAILURES
    if hidden > 0:
        print(f"... and {hidden} more in junit.xml")
    for step in steps:
        if step.problem and step.log:
            print(f"--- end of {step.log}\n{tail(out / step.log, 30)}")
    print(" ".join(f"{key}={counts[key]}" for key in ("tests", "passed", "failures", "errors", "skipped")))
    for step in steps:
        print(f"{step.name:10} {step.seconds:7.1f} s  {step.problem or 'ok'}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", default=["tests/ops"], help="what pytest runs; default tests/ops")
    parser.add_argument("-n", "--workers", type=int, default=4, help="pytest-xdist workers; they share the GPU")
    parser.add_argument("-k", "--select", help="pytest's -k")
    parser.add_argument("--limit-s", type=float, default=560.0, help="for everything, sanitizer included")
    parser.add_argument("--sanitizer-s", type=float, default=150.0, help="of that, kept for the sanitizer")
    parser.add_argument("--tool", default="memcheck", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for logs and JSON; default $OUT")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    import torch

    args = parse(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: this is the GPU test run; on a CPU run `make test`", file=sys.stderr)
        return 2
    out = output_folder(args.out)
    deadline = time.monotonic() + args.limit_s
    reserve = 0.0 if args.no_sanitizer else args.sanitizer_s
    step, counts = run_tests(args, out, args.limit_s - reserve)
    steps = [step] if args.no_sanitizer else [step, *run_sanitizer(args.tool, out, deadline)]
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tests": counts,
        "steps": [asdict(step) for step in steps],
    }
    (out / "gpu_test.json").write_text(json.dumps(report, indent=1) + "\n")
    print_summary(steps, counts, out)
    return 1 if any(step.problem for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
