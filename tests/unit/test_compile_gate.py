"""The compile gate itself, on a small ops package of the test's own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashinfer.testing.gate import GateCase
from tools.compile_gate import amd_usage, nvidia_usage, over_limit, spills_in_loops

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None

KERNEL = """
import triton
import triton.language as tl

@triton.jit
def twice(x):
    return x * 2

@triton.jit
def scale(x_ptr, pair, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    x = pair[1](x, pair[0])
    tl.store(x_ptr + offs, twice(x), mask=offs < n)
"""

GATE = """
import triton
from flashinfer.testing.gate import GateCase
from {package}.triton.kernel import scale

@triton.jit
def hook(x, s):
    return x + s

def cases():
    signature = {{"x_ptr": "*bf16", "pair": ("fp32", "constexpr"), "n": "i32", "BLOCK": "constexpr"}}
    yield GateCase("scale", scale, signature, {{"BLOCK": 256, (1, 1): hook}}, archs={archs})
"""


def write_op(root: Path, op: str, kernel: str = KERNEL, archs: tuple[str, ...] = ("sm90",)) -> None:
    """An op folder with one kernel module and its gate, under the ops package `planted`."""
    folder = root / "planted" / op / "triton"
    folder.mkdir(parents=True)
    for package in (root / "planted", folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "kernel.py").write_text(kernel)
    (folder / "gate.py").write_text(GATE.format(package=f"planted.{op}", archs=archs))


def run_gate(root: Path, *options: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, output and JSON results of the gate over `root`'s ops package."""
    out = root / "gate.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "tools.compile_gate", "--package", "planted", "--json", str(out), *options]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    results = json.loads(out.read_text())["results"] if out.exists() else []
    return done.returncode, done.stdout + done.stderr, results


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
class TestGate:
    def test_good_kernel_passes_for_every_vendor(self, tmp_path: Path) -> None:
        write_op(tmp_path, "good", archs=("sm80", "sm90", "gfx942"))
        (tmp_path / "planted" / "no_kernels").mkdir()
        (tmp_path / "planted" / "no_kernels" / "__init__.py").touch()
        code, output, results = run_gate(tmp_path, "--jobs", "2")
        assert code == 0, output
        assert [(r["name"], r["arch"]) for r in results] == [("good/scale", a) for a in ("sm80", "sm90", "gfx942")]
        assert all(r["regs"] > 0 and r["spills"] == 0 and r["problem"] is None for r in results)

    def test_type_error_fails_and_the_others_are_still_compiled(self, tmp_path: Path) -> None:
        write_op(tmp_path, "bad", KERNEL.replace("twice(x), mask", 'twice(x) + "text", mask'))
        write_op(tmp_path, "good")
        code, output, results = run_gate(tmp_path, "--jobs", "1")
        assert code == 1, output
        assert [r["problem"] is None for r in results] == [False, True], output
        assert "FAILED" in output

    def test_forgotten_kernels_fail(self, tmp_path: Path) -> None:
        write_op(tmp_path, "good", KERNEL + "\n@triton.jit\ndef forgotten(x_ptr):\n    tl.store(x_ptr, 1)\n")
        write_op(tmp_path, "ungated")
        (tmp_path / "planted" / "ungated" / "triton" / "gate.py").unlink()
        code, output, results = run_gate(tmp_path, "--jobs", "1")
        assert code == 1
        assert len(results) == 1
        assert "forgotten is compiled by no case" in output
        assert "twice is compiled" not in output
        assert "planted.ungated.triton: kernels without a gate.py" in output

    def test_nothing_to_compile_fails(self, tmp_path: Path) -> None:
        write_op(tmp_path, "good")
        code, output, results = run_gate(tmp_path, "--filter", "no such case")
        assert (code, results) == (1, [])
        assert "nothing was compiled" in output

    def test_wrong_triton_fails(self, tmp_path: Path) -> None:
        write_op(tmp_path, "good")
        code, output, _ = run_gate(tmp_path, "--triton-version-check", "0.0.1")
        assert code == 1
        assert "asked for" in output


def test_pointers_are_aligned_by_default() -> None:
    signature = {"a": "*bf16", "pages": ("*i32", ("i64", "*fp32")), "n": "i32"}
    case = GateCase("case", None, signature)
    assert set(case.resolved_attrs()) == {(0,), (1, 0), (1, 1, 1)}
    assert GateCase("case", None, signature, attrs={}).resolved_attrs() == {}


def test_limits() -> None:
    """Spills and shared memory are refused past the limit, and only past it."""
    case = GateCase("case", None, {}, max_spill_bytes=8)
    assert over_limit(case, "sm89", spills=8, in_loop=3, smem=101_376) is None
    assert over_limit(case, "sm90", spills=0, in_loop=0, smem=101_377) is None
    assert "spills 12 bytes, 8 allowed" in str(over_limit(case, "sm89", spills=12, in_loop=0, smem=0))
    assert "sm89 has 101376" in str(over_limit(case, "sm89", spills=0, in_loop=0, smem=101_377))
    assert "gfx942 has 65536" in str(over_limit(case, "gfx942", spills=0, in_loop=0, smem=65_537))


def test_compiler_reports_are_read() -> None:
    """Stores and loads both count, over every function of the module; a silent compiler is an error."""
    spilling = (
        "    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads\nptxas info : Used 255 registers\n"
    )
    clean = "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nptxas info : Used 40 registers\n"
    assert nvidia_usage(clean + spilling) == (255, 32)
    with pytest.raises(RuntimeError, match="no register count"):
        nvidia_usage("")
    assert amd_usage("    .vgpr_count:     96\n    .vgpr_spill_count: 3\n") == (96, 12)


SASS = """
.L_x_1:
        /*0000*/                   LDL R1, [R2] ;
.L_x_2:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT ;
        /*0020*/                   {spill} ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   STL [R1], R3 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(("spill", "count"), [("STL [R1+0x8], R3", 1), ("FADD R1, R2, R3", 0)])
def test_spills_count_in_the_innermost_loop_that_multiplies(spill: str, count: int) -> None:
    assert spills_in_loops(SASS.replace("{spill}", spill)) == count
    case = GateCase("case", None, {}, max_spill_bytes=None)
    assert (over_limit(case, "sm90", 100, count, 0) is None) == (count == 0)
