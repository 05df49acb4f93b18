"""docs/support.md is what the tables say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_support_matrix_is_current():
    pytest.importorskip("triton")
    # Without the interpreter, as a user has it.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tools.support_matrix", "--check"]
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=120, check=False).returncode == 0
