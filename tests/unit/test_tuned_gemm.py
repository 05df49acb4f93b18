"""Tiles of grouped products: what is chosen, the command that measures them, and the file between the two."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from bench import tune_gemm
from bench.clock import Settings
from bench.rows import gemm as rows
from bench.tune_gemm import GLUON, TRITON, Trial, candidates
from flashinfer.core.arch import SMEM_BYTES, Arch
from flashinfer.ops.gemm.gluon_sm90 import configs as hopper
from flashinfer.ops.gemm.triton import configs, launch
from flashinfer.ops.gemm.triton.configs import HEIGHTS, HOPPER, OTHERS, Tile
from flashinfer.ops.gemm.triton.gate import BASE, BLOCK

H200 = Arch("sm90", 132, SMEM_BYTES["sm90"], "3.6.0")
ENVIRONMENT = {name: f"this {name}" for name in tune_gemm.PROVENANCE}
KEYS = list(product(("half", "fp8", "fp4"), (False, True), HEIGHTS))


def test_every_height_has_a_tile() -> None:
    assert set(HOPPER) == set(OTHERS) == {(operands, height) for operands, _, height in KEYS}


@pytest.mark.parametrize(("num_rows", "height"), [(8, 16), (16 * 8, 16), (17 * 8, 32), (60 * 8, 64), (4096, 128)])
def test_the_height_follows_the_rows_of_a_group(num_rows: int, height: int) -> None:
    assert configs.choose(BASE, H200, num_rows, 8).kernel.block_m == height
    assert configs.choose(BASE, H200, 4096, 8, num_rows // 8).kernel.block_m == height


def test_few_rows_get_narrow_tiles() -> None:
    dense = BASE._replace(layout="one", n=7168, k=2048)
    assert configs.choose(dense, H200, 64, 1).kernel.block_n == 64
    assert configs.choose(dense, H200, 64 * 200, 200).kernel.block_n == 128


@pytest.mark.parametrize("n", [1, 17, 64, 100])
def test_tiles_are_no_wider_than_the_result(n: int) -> None:
    for spec in (BASE._replace(n=n), BLOCK._replace(n=n), BASE._replace(n=2 * n, activation="swiglu")):
        width = configs.choose(spec, H200, 512 * 200, 200).kernel.block_n
        assert width == max(16, 1 << (n - 1).bit_length())


def test_gates_that_begin_inside_of_a_block_of_scales() -> None:
    even = configs.choose(BLOCK._replace(activation="swiglu", n=512), H200, 4096, 8).kernel
    odd = configs.choose(BLOCK._replace(activation="swiglu", n=400), H200, 4096, 8).kernel
    assert even.one_scale and not odd.one_scale


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 9000), st.integers(0, 2**32))
@settings(deadline=None)
def test_the_grid_holds_all_tiles_or_fills_the_gpu(num_rows: int, groups: int, n: int, seed: int) -> None:
    """Never fewer programs than tiles, unless the GPU is full, however the rows fall into groups."""
    spec = BASE._replace(n=n)
    chosen = configs.choose(spec, H200, num_rows, groups)
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(num_rows + 1) for _ in range(groups - 1))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, num_rows], strict=True)]
    m, width = chosen.kernel.block_m, chosen.kernel.block_n
    tiles = sum(-(-size // m) for size in sizes) * -(-n // width)
    grid = launch.grid_of(chosen, spec, H200, num_rows, groups)
    assert grid >= min(tiles, H200.num_sms * chosen.per_sm) and grid <= H200.num_sms * chosen.per_sm


@pytest.mark.parametrize("key", KEYS)
def test_candidates_begin_with_the_default_and_do_not_repeat(key: tuple[str, bool, int]) -> None:
    found = list(candidates(key))
    assert found[0] == HOPPER[key[0], key[2]] and len(found) == len(set(found)) > 5


HOPPER_KEYS = list(GLUON.keys(("half", "fp8", "fp4"), hopper.HEIGHTS, (False, True)))


@pytest.mark.parametrize("key", HOPPER_KEYS)
def test_what_is_measured_for_hopper_is_what_the_rules_ask_for(key: tuple[int, int, bool, bool]) -> None:
    """Every problem of a key is one that its entry will be chosen for, and the rules' tile is the first candidate."""
    bits, height, gated, few = key
    found = list(GLUON.candidates(key))
    assert found[0] == hopper.TILES[hopper.RULES[height, bits][few], bits] and len(found) == len(set(found)) > 5
    assert len({GLUON.label(tile) for tile in found}) == len(found)
    for shape in GLUON.problems(key):
        base = {16: BASE, 8: BLOCK, 4: BASE._replace(kind="mxfp4", weight_dtype=torch.uint8)}[bits]
        spec = base._replace(n=shape.n, k=shape.k, activation="swiglu" if gated else "")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper, "tuned", lambda: {key: hopper.Tile(64, 128, 3)})
            hopper._tile_of.cache_clear()
            assert hopper.choose(spec, H200, shape.total, shape.groups, False).kernel.stages == 3, shape
    hopper._tile_of.cache_clear()


def test_each_backend_has_keys_for_all_its_operands() -> None:
    assert len(HOPPER_KEYS) == len(hopper.RULES) * 2 * 2 and {key[0] for key in HOPPER_KEYS} == {16, 8, 4}
    assert list(TRITON.keys(("half", "fp8", "fp4"), hopper.HEIGHTS, (False, True))) == KEYS


def test_hoppers_file_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, tile = (8, 64, False, True), hopper.Tile(64, 64, 8, consumers=1, split_rows=True, turns=True)
    best = tune_gemm.entry(GLUON, key, [Trial(key, "a", tile, 3.0)])
    assert best is not None
    tune_gemm.write(GLUON, tmp_path / "tuned" / "gluon_sm90.json", [best], ENVIRONMENT)
    monkeypatch.setattr(hopper, "files", lambda package: tmp_path)
    assert hopper.tuned.__wrapped__() == {key: tile}


# ---- the file


def trial(tile: Tile, rate: float | None, problem: str = "a") -> Trial:
    return Trial(("half", False, 64), problem, tile, rate, None if rate else "it broke")


def test_the_fastest_over_all_problems_wins_and_a_failure_cannot() -> None:
    steady, uneven, broken = list(candidates(("half", False, 64)))[:3]
    trials = [trial(steady, 10.0), trial(steady, 10.0, "b"), trial(uneven, 16.0), trial(uneven, 6.0, "b")]
    trials += [trial(broken, 90.0), trial(broken, None, "b")]
    found = tune_gemm.entry(TRITON, ("half", False, 64), trials)
    assert found is not None and found["tile"] == steady._asdict()
    assert found["tflop_per_s"]["b"][tune_gemm.label(broken)] == "it broke"
    assert tune_gemm.entry(TRITON, ("half", False, 64), trials[4:]) is None


def test_what_is_written_is_what_is_read_and_old_entries_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned" / "sm90.json"
    other = tune_gemm.entry(
        TRITON, ("fp8", True, 16), [replace(trial(Tile(1, 1, 1, 1, 1), 1.0), key=("fp8", True, 16))]
    )
    first = tune_gemm.entry(TRITON, ("half", False, 64), [trial(Tile(2, 2, 2, 2, 2), 1.0)])
    second = tune_gemm.entry(TRITON, ("half", False, 64), [trial(Tile(64, 64, 64, 4, 3, 2, True, 4), 1.0)])
    for entries in ([other, first], [second]):
        tune_gemm.write(TRITON, path, entries, {**ENVIRONMENT, "host": "not of interest"})
    monkeypatch.setattr(configs, "files", lambda package: tmp_path)
    read = configs.tuned.__wrapped__("sm90")
    assert read == {("fp8", True, 16): Tile(1, 1, 1, 1, 1), ("half", False, 64): Tile(64, 64, 64, 4, 3, 2, True, 4)}
    assert json.loads(path.read_text())["provenance"] == ENVIRONMENT
    monkeypatch.setattr(configs, "tuned", lambda arch: read)
    configs._tile_of.cache_clear()
    assert configs.choose(BASE, H200, 64 * 200, 200).kernel.band == 4
    configs._tile_of.cache_clear()


def test_no_file_means_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "files", lambda package: tmp_path)
    assert configs.tuned.__wrapped__("sm90") == {}


# ---- measuring


@pytest.mark.parametrize("kind", ["plain", "fp8_block", "mxfp4"])
def test_every_candidate_is_judged_then_timed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """On the CPU the tile means nothing to the call, so that a stand-in breaks or errs for two of them."""
    key = ("half", False, 16)
    shape = rows.GemmShape(3, 5, 32, 128, uneven=True, kind=kind, gated=True)
    tiles = list(candidates(key))[:4]
    broken, wrong = tiles[1], tiles[2]

    def call(shape: Any, inputs: Any, backend: str) -> Any:
        made = rows.call_op(shape, inputs)

        def run() -> None:
            made.run()
            if configs.imposed.get() == broken:
                raise RuntimeError("out of registers")
            if configs.imposed.get() == wrong:
                made.out[-1].mul_(1.1)

        return replace(made, run=run)

    monkeypatch.setattr(tune_gemm, "call_op", call)
    kernel = replace(TRITON, candidates=lambda key: iter(tiles))
    trials = tune_gemm.measure(kernel, key, shape, Settings(torch.device("cpu"), 0.0, 1.0), 0)
    reasons = {t.tile: t.reason or "" for t in trials}
    assert set(reasons) == set(tiles)
    assert {t.tile for t in trials if t.tflop_per_s is None} == {broken, wrong}
    assert "out of registers" in reasons[broken] and "relative error" in reasons[wrong]


@pytest.mark.parametrize("row", rows.ROWS, ids=lambda row: row.name)
def test_rows_are_right_at_a_small_size(row: Any) -> None:
    """Every row of the benchmark, its own check and its peers that run here, on a small problem."""
    from bench.run import check_call, gate

    shape = replace(row.shape, groups=min(row.shape.groups, 9), rows=min(row.shape.rows, 5), n=256, k=256)
    assert sum(shape.sizes) == shape.total and len(shape.sizes) == shape.groups
    assert (0 in shape.sizes) == shape.uneven
    small = replace(row, shape=shape)
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    inputs = row.make(shape, generator)
    call = row.call(shape, inputs)
    assert check_call(small, inputs, call, generator)["ok"]
    call.out.view(-1)[0] += 1000
    assert check_call(small, inputs, replace(call, run=partial(int)), generator)["ok"] is False
    for peer in (p for p in row.peers if p.layout is not None and "scaled" not in p.name):
        with peer.open(shape, inputs) as run:
            assert gate(small, inputs, peer.layout(run()), generator)["ok"], peer.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_tune_refuses_to_run_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_gemm.main(["--out", str(tmp_path / "a.json")]) == 2
    assert "GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())
