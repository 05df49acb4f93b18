"""Measured configurations: kept, saved, loaded, and measured only where asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashinfer.autotuner import AutoTuner, autotune, is_in_profile_measurement
from flashinfer.core import tuning
from flashinfer.core.arch import CPU, Arch

GPU = Arch("sm90", 132, 232_448)


@pytest.fixture(autouse=True)
def empty() -> None:
    tuning.forget()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "configs.json"
    tuning.record("moe/a", GPU, (64, 128, True))
    AutoTuner.get().save_configs(path)
    tuning.forget()
    assert tuning.tuned("moe/a", GPU) is None
    before = tuning.generation()
    assert AutoTuner.get().load_configs(path)
    assert tuning.tuned("moe/a", GPU) == (64, 128, 1)
    assert tuning.tuned("moe/a", CPU) is None  # of another architecture
    assert tuning.generation() != before
    assert [p.name for p in path.parent.iterdir()] == ["configs.json"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="expected one written by autotune"), autotune(cache=path):
        pass


def test_autotune_writes_its_file_and_reads_it_first(tmp_path: Path) -> None:
    path = tmp_path / "configs.json"
    with autotune(cache=path):
        tuning.record("moe/b", GPU, (1,))
    tuning.forget()
    with autotune(tune_mode=False, cache=path):
        assert tuning.tuned("moe/b", GPU) == (1,)


def test_what_is_known_already_changes_nothing(tmp_path: Path) -> None:
    """A file that is read around every call forgets no launches."""
    path = tmp_path / "configs.json"
    with autotune(cache=path):
        tuning.record("moe/e", GPU, (1,))
    before = tuning.generation()
    with autotune(tune_mode=False, cache=path):
        assert tuning.generation() == before
    tuning.record("moe/e", GPU, (2,))
    assert tuning.generation() > before


def test_processes_may_write_one_file(tmp_path: Path) -> None:
    """Whoever reads finds a whole file, and nobody's half of it is left."""
    path = tmp_path / "configs.json"
    write = "import sys; from flashinfer.core import tuning; [tuning.save(sys.argv[1]) for _ in range(100)]"
    writers = [subprocess.Popen([sys.executable, "-c", write, str(path)]) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            tuning.load(path)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [found.name for found in tmp_path.iterdir()] == ["configs.json"]


def test_measures_only_inside_and_never_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device = torch.device("cuda")
    assert not tuning.measuring("moe", device)
    with autotune(skip_ops={"gemm"}):
        assert tuning.measuring("moe", device)
        assert not tuning.measuring("gemm", device)
        assert not tuning.measuring("moe", torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not tuning.measuring("moe", device)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        nested = []
        monkeypatch.setattr(tuning, "time_ms", lambda run: run() or 1.0)
        tuning.measure("moe/c", GPU, device, [(1,)], lambda config: nested.append(tuning.measuring("gemm2", device)))
        assert nested == [False] and tuning.measuring("gemm2", device), "what is timed measures nothing itself"
    with autotune(tune_mode=False):
        assert not tuning.measuring("moe", device)


def test_what_counts_is_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file of other rules nothing does, and it is measured anew."""
    monkeypatch.setattr(tuning, "time_ms", lambda run: run()[0])
    device = torch.device("cuda")
    tuning.record("moe/d", GPU, (9, 9))
    assert tuning.chosen("moe/d", GPU, [(1, 2), (0, 3)]) is None
    tuning.measure("moe/d", GPU, device, [(1, 2), (0, 3)], lambda config: config)
    assert tuning.chosen("moe/d", GPU, [(1, 2), (0, 3)]) == (0, 3)
    tuning.measure("moe/d", GPU, device, [(0, 3), (-1, 2)], lambda config: config)
    assert tuning.chosen("moe/d", GPU, [(0, 3), (-1, 2)]) == (0, 3), "known: not measured"


def test_the_fastest_that_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {(1,): 3.0, (2,): 1.0, (3,): 2.0}
    seen = []

    def time_ms(run: object) -> float:
        assert is_in_profile_measurement()
        return times[run()]  # type: ignore[operator]

    def run(candidate: tuple[int, ...]) -> tuple[int, ...]:
        seen.append(candidate)
        if candidate == (4,):
            raise RuntimeError("out of shared memory")
        return candidate

    monkeypatch.setattr(tuning, "time_ms", time_ms)
    assert tuning.fastest([(1,), (4,), (2,), (3,)], run) == ((2,), 1.0)
    assert seen == [(1,), (4,), (2,), (3,)]
    assert not is_in_profile_measurement()
    with pytest.raises(RuntimeError, match="no configuration ran"):
        tuning.fastest([(4,)], run)
