"""The house checks themselves: each rule catches a planted breach and lets its clean twin pass."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

from tools.check_house import RULES, breaches, main, sources

ROOT = Path(__file__).resolve().parents[2]


def lines(count: int, text: str = "    x = 1\n") -> str:
    return text * count


LONG_SIGNATURE = ", ".join(f"a{i}=0" for i in range(9))
LONG_DOCSTRING = '    """Meaning.\n' + lines(70, "    detail\n") + '    """\n'
LADDER = 'if k == "a":\n    x = 1\nelif k == "b":\n    x = 2\nelif k in ("c", "d"):\n    x = 3\n'

# rule: (path, text that breaks it, part of the message)
PLANTED = [
    ("file_length", "flashinfer/ops/norm/plan.py", lines(501, "x = 1\n"), "501 lines, 500 allowed"),
    ("file_length", "bench/run.py", lines(501, "x = 1\n"), "501 lines"),
    ("function_length", "flashinfer/core/a.py", "def f():\n" + lines(60), "f has 61 lines, 60 allowed"),
    ("function_length", "tests/unit/test_a.py", "def test_a():\n" + lines(60), "61 lines"),
    ("function_length", "flashinfer/decode.py", "def f(\n    a,\n):\n" + lines(61), "61 lines"),
    ("function_length", "flashinfer/device/a.py", "@triton.jit\ndef k():\n" + lines(150), "151 lines, 150 allowed"),
    ("parameter_count", "flashinfer/core/a.py", f"def f({LONG_SIGNATURE}): ...\n", "f has 9 parameters"),
    ("parameter_count", "flashinfer/core/a.py", f"def f(*, {LONG_SIGNATURE}): ...\n", "f has 9 parameters"),
    ("import_direction", "flashinfer/core/a.py", "from flashinfer.ops.norm import rmsnorm\n", "core may not import"),
    ("import_direction", "flashinfer/core/a.py", "def f():\n    from flashinfer import decode\n", "flashinfer.decode"),
    ("import_direction", "flashinfer/core/a.py", "from ..ops import norm\n", "flashinfer.ops.norm"),
    ("import_direction", "flashinfer/device/a.py", "import flashinfer.core.arch\n", "device may not import"),
    ("import_direction", "flashinfer/ops/norm/plan.py", "import flashinfer\n", "ops may not import flashinfer;"),
    ("import_direction", "flashinfer/ops/norm/plan.py", "from flashinfer import norm\n", "ops may not import"),
    (
        "import_direction",
        "flashinfer/ops/norm/plan.py",
        "from flashinfer.testing.gate import GateCase\n",
        "ops may not",
    ),
    ("other_ops", "flashinfer/ops/norm/a.py", "from flashinfer.ops.rope.plan import f\n", "inside of another op"),
    ("other_ops", "flashinfer/ops/norm/a.py", "from flashinfer.ops.rope import reference\n", "inside of another op"),
    ("other_ops", "flashinfer/ops/norm/a.py", "import flashinfer.ops.rope.gluon_sm90\n", "inside of another op"),
    ("separate_implementations", "flashinfer/ops/a/triton/k.py", "from flashinfer.ops.a import reference\n", "sibling"),
    ("separate_implementations", "flashinfer/ops/a/triton/k.py", "from ..reference import f\n", "sibling reference"),
    ("separate_implementations", "flashinfer/ops/a/gluon_sm90/k.py", "from ..triton.k import f\n", "sibling triton"),
    ("tests_stay_outside", "flashinfer/decode.py", "from flashinfer.integrations import vllm\n", "integrations.vllm"),
    ("tests_stay_outside", "flashinfer/core/a.py", "from flashinfer.testing import poisoned\n", "testing.poisoned"),
    ("tests_stay_outside", "flashinfer/ops/a/plan.py", "import bench.registry\n", "bench.registry"),
    ("triton_where_kernels_are", "flashinfer/decode.py", "import triton.language as tl\n", "imports Triton"),
    (
        "triton_where_kernels_are",
        "flashinfer/ops/a/plan.py",
        "def f():\n    from triton import jit\n",
        "imports Triton",
    ),
    ("environment_reader", "flashinfer/decode.py", 'import os\nx = os.environ["A"]\n', "uses os.environ;"),
    ("environment_reader", "flashinfer/core/launch.py", 'import os\nx = os.getenv("A")\n', "uses os.getenv;"),
    ("environment_reader", "flashinfer/ops/a/plan.py", "from os import environ\n", "uses os.environ;"),
    ("capability_reader", "flashinfer/core/a.py", "x = torch.cuda.get_device_capability()\n", "core/arch.py"),
    ("capability_reader", "flashinfer/ops/a/plan.py", "from torch.cuda import get_device_properties\n", "core/arch.py"),
    ("name_ladder", "flashinfer/core/a.py", LADDER, "3 branches compare k with strings"),
    ("name_ladder", "examples/a.py", "def f(k):\n" + textwrap.indent(LADDER, "    "), "make it a table"),
    ("name_ladder", "tools/a.py", 'match k:\n case "a": x = 1\n case "b": x = 2\n case "c": x = 3\n', "compare k"),
    (
        "no_autotune",
        "flashinfer/ops/a/triton/k.py",
        "@triton.autotune([])\n@triton.jit\ndef k(): ...\n",
        "tunes itself",
    ),
]

CLEAN = [
    ("flashinfer/core/a.py", lines(500, "x = 1\n")),
    ("flashinfer/core/a.py", "def f():\n" + LONG_DOCSTRING + lines(59)),
    ("flashinfer/core/a.py", f"class A:\n    def f(self, {LONG_SIGNATURE.removesuffix(', a8=0')}): ...\n"),
    ("flashinfer/core/a.py", "from flashinfer.core import check\nfrom .arch import CPU\n"),
    ("flashinfer/core/config.py", 'import os\nx = os.environ["A"]\n'),
    ("flashinfer/core/arch.py", "x = torch.cuda.get_device_capability()\n"),
    ("flashinfer/core/launch.py", "import triton\n"),
    ("flashinfer/decode.py", f"def f({LONG_SIGNATURE}): ...\n"),
    ("flashinfer/decode.py", "def f(\n" + lines(40, "    a,\n") + "):\n" + lines(60)),
    ("flashinfer/decode.py", "from flashinfer.ops.attention import IMPLS\nfrom flashinfer.core import check\n"),
    ("flashinfer/device/a.py", "import triton\n@triton.jit\ndef k():\n" + lines(149)),
    ("flashinfer/device/a.py", f"@jit(noinline=True)\ndef k({LONG_SIGNATURE}):\n" + lines(149)),
    ("flashinfer/ops/norm/reference.py", "from flashinfer.ops.rope import rotate\nfrom flashinfer.core import check\n"),
    ("flashinfer/ops/a/triton/__init__.py", "from flashinfer.ops.a.triton.k import k\nfrom ..plan import Plan\n"),
    ("flashinfer/ops/a/triton/gate.py", "from flashinfer.testing.gate import GateCase\nimport triton\n"),
    ("flashinfer/ops/a/triton/k.py", "import triton\nfrom flashinfer.device.softmax import f\n"),
    ("flashinfer/integrations/vllm.py", "import flashinfer\nfrom flashinfer.ops.a import f\n"),
    ("flashinfer/core/a.py", 'if k == "a":\n    x = 1\nelif k == "b":\n    x = 2\nelse:\n    x = 3\n'),
    ("flashinfer/core/a.py", 'if k == "a":\n    x = 1\nelif j == "b":\n    x = 2\nelif n > 3:\n    x = 3\n'),
    ("tests/unit/test_a.py", 'import os\nx = os.environ["A"]\n'),
]


def tree(root: Path, path: str, text: str) -> list[str]:
    """The findings in a repository that holds just this file."""
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    (source,) = sources(root)
    return breaches(source)


@pytest.mark.parametrize(("rule", "path", "text", "message"), PLANTED)
def test_planted_breach_is_found(rule: str, path: str, text: str, message: str, tmp_path: Path) -> None:
    assert all(re.match(re.escape(path) + r":\d+: ", line) for line in tree(tmp_path, path, text))
    (source,) = sources(tmp_path)
    (judge,) = (r for r in RULES if r.__name__ == rule)
    assert any(message in m for _, m in judge(source)), list(judge(source))
    assert main([str(tmp_path)]) == 1


def test_every_rule_has_a_planted_breach() -> None:
    assert {rule.__name__ for rule in RULES} == {row[0] for row in PLANTED}


@pytest.mark.parametrize(("path", "text"), CLEAN)
def test_clean_file_passes(path: str, text: str, tmp_path: Path) -> None:
    assert tree(tmp_path, path, text) == []
    assert main([str(tmp_path)]) == 0


def test_an_empty_repository_does_not_pass(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 1


def test_requirements_pin_each_package_once() -> None:
    """The layers share one environment: two versions of a package would replace each other at every `make`."""
    versions = defaultdict(set)
    for file in (ROOT / "requirements").glob("*.txt"):
        if file.stem == "triton-oldest":
            continue
        for line in file.read_text().splitlines():
            if line and not line.startswith("#"):
                match = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)(; python_version [<>]=? \"3\.11\")?", line)
                assert match, f"{file.name}: {line!r} is no exact pin"
                versions[match[1], match[3]].add(match[2])
    assert versions
    assert {key: found for key, found in versions.items() if len(found) > 1} == {}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


BLOCK = "import sys; sys.modules['triton'] = None\n"


def test_import_needs_torch_alone() -> None:
    """No Triton, and nothing but torch, numpy and what these two bring."""
    names = "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    bare = set(run_python(BLOCK + "import torch, numpy\n" + names).split())
    ours = set(run_python(BLOCK + "import flashinfer\nassert flashinfer.single_decode_with_kv_cache\n" + names).split())
    assert "flashinfer" in ours
    assert ours - bare - {"flashinfer"} - set(sys.stdlib_module_names) == set()


def test_import_does_not_import_triton() -> None:
    """Where Triton is installed it is imported by the first kernel, not by the package."""
    assert (
        run_python(
            "import sys, torch; before = 'triton' in sys.modules; import flashinfer\n"
            "print(before or 'triton' not in sys.modules)"
        ).strip()
        == "True"
    )


def test_import_is_quick() -> None:
    """Under a second beyond torch's own import, in processor time: this machine may be busy."""
    clock = "import time, torch; start = time.process_time(); import flashinfer; print(time.process_time() - start)"
    assert float(run_python(clock)) < 1.0
