"""The tuned configuration of the Hopper prefill, the command that writes it, and its only reader."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench import tune
from bench.run import Settings
from flashinfer.ops.attention import variants
from flashinfer.ops.attention.device.hooks import traits_of
from flashinfer.ops.attention.gluon_sm90 import configs
from flashinfer.ops.attention.gluon_sm90.configs import Schedule
from flashinfer.ops.attention.spec import AttentionSpec
from flashinfer.ops.attention.support import HOPPER_HEAD_DIMS
from flashinfer.ops.attention.variant import Variant

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
ENVIRONMENT = {name: f"this {name}" for name in tune.PROVENANCE}
KEYS = set(product(HOPPER_HEAD_DIMS, (False, True)))


def spec_of(head_dim: int) -> AttentionSpec:
    bf16 = torch.bfloat16
    return AttentionSpec(32, 8, head_dim, head_dim, 1, False, bf16, bf16, bf16)


def trial(
    schedule: tuple[bool, bool], rate: float | None, problem: str = "a", key: tuple[int, bool] = (64, True)
) -> Any:
    return tune.Trial(*key, problem, Schedule(*schedule), rate, None if rate else "it broke")


# ---- the file


def test_the_file_has_every_key_that_the_code_can_ask_for() -> None:
    assert set(configs.tuned()) == KEYS
    assert {(shape.head_dim, shape.causal) for shape in tune.problems()} == KEYS


def test_the_file_says_where_it_comes_from_and_holds_the_fastest() -> None:
    content = json.loads(files("flashinfer.ops.attention").joinpath("tuned", "sm90.json").read_text())
    assert set(content) == {"schema", "provenance", "entries"} and content["schema"] == tune.SCHEMA
    provenance = content["provenance"]
    assert tuple(provenance) == tune.PROVENANCE
    for name in ("date", "device", "torch", "triton", "commit", "timer"):
        assert provenance[name], name
    assert len(content["entries"]) == len(KEYS)
    for entry in content["entries"]:
        rates: dict[str, float] = {}
        for of_problem in entry["tflop_per_s"].values():
            for name, rate in of_problem.items():
                rates[name] = rates.get(name, 1.0) * (rate if isinstance(rate, float) else 0.0)
        assert tune.label(Schedule(**entry["schedule"])) == max(rates, key=lambda name: rates[name])


def test_the_wheel_contains_the_file() -> None:
    root = PYPROJECT.parent
    (listed,) = re.findall(r"^\[tool\.setuptools\.package-data\]\nflashinfer = \[(.*)\]$", PYPROJECT.read_text(), re.M)
    shipped = {path for pattern in re.findall(r'"(.+?)"', listed) for path in (root / "flashinfer").glob(pattern)}
    assert root / "flashinfer/ops/attention/tuned/sm90.json" in shipped


# ---- its reader


@pytest.mark.parametrize("head_dim", HOPPER_HEAD_DIMS)
@pytest.mark.parametrize("variant", [Variant(), variants.causal(), variants.soft_cap(30.0, False)])
def test_a_plan_gets_the_tuned_schedule(head_dim: int, variant: Variant) -> None:
    traits = traits_of(variant)
    assert traits.masks == any(part.mask is not None for part in variant.parts)
    config = configs.choose(spec_of(head_dim), traits)
    assert (config.persistent, config.turns) == configs.tuned()[head_dim, traits.masks]


@pytest.mark.parametrize("head_dim", HOPPER_HEAD_DIMS)
def test_an_imposed_schedule_holds_inside_its_context_only(head_dim: int) -> None:
    spec, traits = spec_of(head_dim), traits_of(variants.causal())
    before = configs.choose(spec, traits)
    for schedule in tune.CANDIDATES:
        with configs.imposed(schedule):
            inside = configs.choose(spec, traits)
        assert (inside.persistent, inside.turns) == schedule
        assert inside.q_stages == (2 if schedule.persistent and head_dim <= 128 else 1)
        assert configs.choose(spec, traits) == before
    with pytest.raises(KeyError, match="mine"), configs.imposed(Schedule(True, True)):
        raise KeyError("mine")
    assert configs.choose(spec, traits) == before


# ---- its writer


def test_what_is_written_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [
        trial(schedule, 100.0 + i * (1 if masks else -1), key=(dim, masks))
        for dim, masks in KEYS
        for i, schedule in enumerate(tune.CANDIDATES)
    ]
    tune.write(tmp_path / "tuned" / "sm90.json", trials, {**ENVIRONMENT, "host": "not of interest"})
    monkeypatch.setattr(configs, "files", lambda package: tmp_path)
    read = configs.tuned.__wrapped__()
    assert read == {(dim, masks): tune.CANDIDATES[-1 if masks else 0] for dim, masks in KEYS}
    assert json.loads((tmp_path / "tuned" / "sm90.json").read_text())["provenance"] == ENVIRONMENT


def test_the_fastest_over_all_problems_wins() -> None:
    steady, uneven = (True, False), (False, True)
    trials = [trial(steady, 10.0), trial(steady, 10.0, "b"), trial(uneven, 16.0), trial(uneven, 6.0, "b")]
    assert list(tune.scores(trials)) == [steady, uneven], "by the geometric mean: 10 and 9.8"


def test_a_schedule_that_failed_once_cannot_win() -> None:
    trials = [trial((True, True), 90.0), trial((True, True), None, "b"), trial((False, True), 1.0)]
    trials.append(trial((False, True), 1.0, "b"))
    (entry,) = tune.document(trials, ENVIRONMENT)["entries"]
    assert entry["schedule"] == {"persistent": False, "turns": True}
    assert entry["tflop_per_s"]["b"]["persistent, turns"] == "it broke"
    with pytest.raises(RuntimeError, match="head_dim 64"):
        tune.document(trials[:2], ENVIRONMENT)


def test_every_candidate_is_judged_under_its_schedule_then_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the schedule means nothing to the call, so that a stand-in breaks or errs for two of them."""
    shape = replace(tune.problems()[0], qo_lens=(9, 9), kv_lens=(9, 9), num_qo_heads=4, num_kv_heads=2)
    shape = replace(shape, head_dim=16, dtype=torch.float32)
    plain_row = tune.prefill_row(shape, "fa3")
    broken, wrong = Schedule(True, True), Schedule(False, False)

    def call(shape: Any, inputs: Any) -> Any:
        schedule = configs.imposed.get()
        made = plain_row.call(shape, inputs)
        if schedule == broken:
            raise RuntimeError("out of registers")
        if schedule == wrong:
            return replace(made, run=lambda: (made.run(), made.out[-1].mul_(1.01)))
        return made

    monkeypatch.setattr(tune, "prefill_row", lambda shape, backend: replace(plain_row, call=call))
    trials = tune.measure(shape, Settings(torch.device("cpu"), 0.0, 1.0), 0)
    assert [t.schedule for t in trials] == list(tune.CANDIDATES)
    for t in trials:
        assert (t.head_dim, t.masks, t.problem) == (16, True, plain_row.name)
        assert (t.tflop_per_s is None) == (t.schedule in (broken, wrong)) == (t.reason is not None)
    reasons = {t.schedule: t.reason or "" for t in trials}
    assert "out of registers" in reasons[broken] and "relative error" in reasons[wrong]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_tune_refuses_to_run_without_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--out", str(tmp_path / "a.json")]) == 2
    assert "Hopper" in capsys.readouterr().err and not list(tmp_path.iterdir())
