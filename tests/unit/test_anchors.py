"""The comparison with figures to beat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import anchors
from bench.rows import sampling


def results(scale: float, device: str = "NVIDIA H200", without: str = "") -> dict[str, Any]:
    """A results file in which every row takes `scale` times its target."""
    times: dict[str, float] = {}
    for goal in anchors.goals({}):
        if goal.anchor_ms is not None:
            times[goal.row] = scale * goal.target * goal.anchor_ms
    for op, common in anchors.WORST_CASES.items():
        for batch_size in anchors.WORST_BATCHES:
            times[f"sampling_{op}_b{batch_size}"] = scale * 3.0 * times[f"sampling_{common}_b{batch_size}"]
    rows = [
        {"name": name, "status": "ok", "ms": ms, "run_enqueue_us": 20.0, "peers": {"torch": {"ms": 1.0}}}
        for name, ms in times.items()
        if name != without
    ]
    return {"environment": {"device": device}, "rows": rows}


@pytest.mark.parametrize(("scale", "word"), [(0.99, "met"), (1.01, "MISSED")])
def test_verdicts(scale: float, word: str) -> None:
    table, fine = anchors.compare(results(scale))
    lines = table.splitlines()[1:]
    assert all(word in line for line in lines)
    assert fine == (scale < 1)


def test_another_gpu_has_no_verdict() -> None:
    table, fine = anchors.compare(results(2.0, "NVIDIA H100"))
    assert fine and "MISSED" not in table and "met" not in table


def test_a_missing_row_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results(0.5, without="sampling_top_p_b64")))
    table, _ = anchors.compare(json.loads(file.read_text()))
    assert sum("no result" in line for line in table.splitlines()) == 4  # itself and its three worst cases
    assert anchors.main([str(file)]) == 1


def test_every_goal_has_a_row() -> None:
    names = {row.name for row in sampling.ROWS}
    assert {goal.row for goal in anchors.goals({})} <= names
