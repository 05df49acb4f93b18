"""Compile every kernel for every architecture on a machine without a GPU, and hold it to its limits.

`python -m tools.compile_gate [--triton-version-check 3.6.0] [--filter TEXT] [--jobs 2] [--json OUT]`. The cases come
from the `gate.py` of each kernel folder (see `flashinfer/testing/gate.py`). Fails on a compile error, on more spilled
bytes than the case allows, on more shared memory than the architecture has, on a kernel that no case compiles, on a
kernel folder without `gate.py`, and when there was nothing to compile. It runs no kernel and needs no driver.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from flashinfer.core.arch import SMEM_BYTES
from flashinfer.testing.gate import GateCase

# Local memory (LDS) of one workgroup, AMD CDNA 3 and CDNA 4 instruction set guides.
LDS_BYTES = {"gfx942": 65_536, "gfx950": 163_840}
LIMITS = {**SMEM_BYTES, **LDS_BYTES}


@dataclass(frozen=True)
class Task:
    """One compilation: case `case` of the gate module `module`, for `arch`. Strings only: a worker can take it."""

    module: str
    case: str
    arch: str


@dataclass(frozen=True)
class Result:
    """What a compilation gave. regs: registers a thread; spills, smem: bytes; in_loop: spilling instructions in loops
    that multiply matrices; problem: None, or why the gate fails."""

    name: str
    arch: str
    regs: int = 0
    spills: int = 0
    in_loop: int = 0
    smem: int = 0
    seconds: float = 0.0
    problem: str | None = None


# --- which kernels there are ------------------------------------------------------------------------------------------


def kernel_folders(package: str) -> list[list[str]]:
    """For each op that has kernels, the dotted names of its folders of them; `device` is what the others share."""
    ops = importlib.import_module(package)
    found = []
    for op in pkgutil.iter_modules(ops.__path__):
        name = f"{package}.{op.name}"
        if op.ispkg:
            inside = pkgutil.iter_modules(importlib.import_module(name).__path__)
            found.append(
                [f"{name}.{m.name}" for m in inside if m.name in ("triton", "device") or m.name[:6] == "gluon_"]
            )
    return [folders for folders in found if folders]


@cache
def cases_of(module: str) -> dict[str, GateCase]:
    """The cases of one gate module by name. Raises ValueError for a name that comes twice."""
    found: dict[str, GateCase] = {}
    for case in importlib.import_module(module).cases():
        if case.name in found:
            raise ValueError(f"{module}: two cases are named {case.name!r}. Give each a name of its own.")
        found[case.name] = case
    return found


def modules_of(folder: str) -> list[ModuleType]:
    """Every module of a folder of kernels, imported."""
    package = importlib.import_module(folder)
    infos = pkgutil.walk_packages(package.__path__, f"{folder}.")
    return [package, *(importlib.import_module(info.name) for info in infos)]


def uncompiled_kernels(folders: Sequence[str], cases: Iterable[GateCase]) -> list[str]:
    """Jitted functions of an op that no case compiles, neither as its kernel nor as something a kernel calls."""
    jitted = {
        value.__name__: value
        for folder in folders
        for module in modules_of(folder)
        for value in vars(module).values()
        if is_jitted(value) and value.__module__ == module.__name__
    }
    reached: set[str] = set()
    queue = [fn.__name__ for case in cases for fn in (case.kernel, *case.constexprs.values()) if is_jitted(fn)]
    while queue:
        name = queue.pop()
        if name in jitted and name not in reached:
            reached.add(name)
            queue.extend(names_in(jitted[name]))
    return sorted(set(jitted) - reached)


def is_jitted(value: object) -> bool:
    from triton.runtime.jit import JITFunction

    return isinstance(value, JITFunction)


def names_in(function: Any) -> set[str]:
    """Every name that the source of a jitted function mentions."""
    tree = ast.parse(textwrap.dedent(function.src))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


# --- one compilation --------------------------------------------------------------------------------------------------


def compile_task(task: Task) -> Result:
    """Compile one case for one architecture; every exception becomes the result's problem."""
    name = f"{task.module.split('.')[-3]}/{task.case}"
    case = cases_of(task.module)[task.case]
    start = time.perf_counter()
    try:
        regs, spills, in_loop, smem = measure(case, task.arch)
    except Exception as error:
        return Result(name, task.arch, problem=f"{type(error).__name__}: {innermost(error)}")
    seconds = round(time.perf_counter() - start, 2)
    problem = over_limit(case, task.arch, spills, in_loop, smem)
    return Result(name, task.arch, regs, spills, in_loop, smem, seconds, problem)


def measure(case: GateCase, arch: str) -> tuple[int, int, int, int]:
    """Registers a thread, spilled bytes, spilling instructions in loops that multiply, bytes of shared memory."""
    import triton
    from triton import knobs
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    source_type = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = source_type(case.kernel, dict(case.signature), dict(case.constexprs), case.resolved_attrs())
    log = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as cache_dir,
        knobs.nvidia.scope(),
        knobs.cache.scope(),
        contextlib.ExitStack() as on,
    ):
        knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = cache_dir  # a cache hit would print no ptxas log
        on.enter_context(contextlib.redirect_stdout(log))
        # Triton 3.10 will change this default; 3.9 warns of it.
        options = {"enable_fp_fusion": True, **case.options}
        compiled = triton.compile(source, target=target_of(arch), options=options)
    regs, spills = amd_usage(compiled.asm["amdgcn"]) if arch.startswith("gfx") else nvidia_usage(log.getvalue())
    in_loop = spills_in_loops(disassemble(compiled.asm["cubin"])) if spills and "cubin" in compiled.asm else 0
    return regs, spills, in_loop, int(compiled.metadata.shared)


def disassemble(cubin: bytes) -> str:
    """SASS by the nvdisasm that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def spills_in_loops(sass: str) -> int:
    """Loads and stores of local memory inside of innermost loops with matrix products.

    A loop goes from the target of a conditional backward branch to the branch; an unconditional one comes back from the
    waits, which the compiler puts behind the code proper.
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction.group(1))
    loops = []
    for end, text in enumerate(code):
        branch = re.match(r"@!?U?P\d+ BRA.*(\.L_x_\d+)", text)
        begin = labels.get(branch.group(1), end) if branch else end
        if begin < end and any("MMA" in t for t in code[begin:end]):
            loops.append((begin, end))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return sum(bool(re.search(r"\b(STL|LDL)\b", t)) for begin, end in innermost for t in code[begin:end])


def target_of(arch: str) -> Any:
    """Triton's name for an architecture: "sm90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(arch[2:]), 32) if arch.startswith("sm") else GPUTarget("hip", arch, 64)


def nvidia_usage(log: str) -> tuple[int, int]:
    """Registers and spilled bytes (stores plus loads) from ptxas' own report."""
    regs = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    if not regs:
        raise RuntimeError("ptxas printed no register count; its log format or Triton's switch for it has changed")
    return max(regs), sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled bytes (4 a register) from the kernel metadata in the assembly."""
    fields = {key: int(n) for key, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly)}
    return fields["vgpr_count"], 4 * fields["vgpr_spill_count"]


def over_limit(case: GateCase, arch: str, spills: int, in_loop: int, smem: int) -> str | None:
    """Why the compiled kernel is refused; None if it is within its limits."""
    if case.max_spill_bytes is None and in_loop:
        return f"{in_loop} spilling instructions in a loop that multiplies matrices"
    if case.max_spill_bytes is not None and spills > case.max_spill_bytes:
        return f"spills {spills} bytes, {case.max_spill_bytes} allowed"
    if smem > LIMITS[arch]:
        return f"takes {smem} bytes of shared memory, {arch} has {LIMITS[arch]}"
    return None


def innermost(error: BaseException) -> str:
    """The message that says most: Triton wraps the cause once for every call between the kernel and the fault."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip() or type(error).__name__


# --- the run ----------------------------------------------------------------------------------------------------------


def plan_run(package: str, wanted: str) -> tuple[list[Task], list[str]]:
    """The compilations whose name or architecture contains `wanted`, and what is wrong before any of them."""
    tasks: list[Task] = []
    problems: list[str] = []
    for folders in kernel_folders(package):
        cases: dict[str, dict[str, GateCase]] = {}
        for folder in folders:
            gate = f"{folder}.gate"
            if importlib.util.find_spec(gate) is not None:
                cases[gate] = cases_of(gate)
            elif not folder.endswith(".device"):
                problems.append(f"{folder}: kernels without a gate.py. Add one with cases() -> Iterable[GateCase].")
        everything = [case for of_gate in cases.values() for case in of_gate.values()]
        problems += [
            f"{folders[0].rpartition('.')[0]}: {name} is compiled by no case. Add it to a gate.py, or delete it."
            for name in (uncompiled_kernels(folders, everything) if everything else ())
        ]
        unknown = {arch for case in everything for arch in case.archs} - LIMITS.keys()
        problems += [
            f"{folders}: unknown architecture {arch!r}; known: {', '.join(LIMITS)}" for arch in sorted(unknown)
        ]
        tasks += [
            Task(gate, case.name, arch)
            for gate, of_gate in cases.items()
            for case in of_gate.values()
            for arch in case.archs
            if arch in LIMITS and wanted in f"{gate.removesuffix('.gate')}/{case.name} {arch}"
        ]
    return tasks, problems


def compile_all(tasks: Sequence[Task], jobs: int) -> Iterator[Result]:
    """Results as soon as they are there, architecture by architecture.

    Each has processes of its own: Triton 3.6 keeps the conversions of fp8 for the first architecture that a process
    compiles them for, and sm89 then gets an instruction of sm90.
    """
    for arch in dict.fromkeys(task.arch for task in tasks):
        chosen = [task for task in tasks if task.arch == arch]
        with multiprocessing.get_context("spawn").Pool(min(jobs, len(chosen))) as pool:
            yield from pool.imap(compile_task, chosen)


def report(results: Iterable[Result]) -> list[Result]:
    """Print one line a result, as they come; return them all."""
    print(f"{'kernel':56} {'arch':7} {'regs':>5} {'spills':>7} {'in loop':>7} {'smem':>8} {'seconds':>8}")
    seen = []
    for r in results:
        seen.append(r)
        verdict = f"  FAILED: {r.problem}" if r.problem else ""
        print(
            f"{r.name:56} {r.arch:7} {r.regs:5} {r.spills:7} {r.in_loop:7} {r.smem:8} {r.seconds:8.2f}{verdict}",
            flush=True,
        )
    return seen


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compile_gate", description="Compile every kernel without a GPU.")
    parser.add_argument("--triton-version-check", nargs="+", metavar="VERSION", help="fail unless this is one of them")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at once")
    parser.add_argument("--filter", default="", help="only cases with this text in 'folder/name arch'")
    parser.add_argument("--json", metavar="OUT", help="write the results to this file")
    parser.add_argument("--package", default="flashinfer.ops", help="where the ops are")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("compile_gate: TRITON_INTERPRET is set, so Triton compiles nothing. Unset it.")
    import triton

    if args.triton_version_check and triton.__version__ not in args.triton_version_check:
        sys.exit(f"compile_gate: this is Triton {triton.__version__}, asked for {args.triton_version_check}")
    tasks, problems = plan_run(args.package, args.filter)
    start = time.perf_counter()
    results = report(compile_all(tasks, args.jobs))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"triton": triton.__version__, "results": [asdict(r) for r in results]}, file, indent=1)
    if not results:
        problems.append("nothing was compiled: no case found")
    for problem in problems:
        print(f"compile_gate: {problem}")
    failed = sum(r.problem is not None for r in results)
    seconds = time.perf_counter() - start
    print(f"compile_gate: Triton {triton.__version__}: {len(results)} compiled, {failed} failed, {seconds:.0f} s")
    return 1 if failed or problems else 0


if __name__ == "__main__":
    sys.exit(main())
