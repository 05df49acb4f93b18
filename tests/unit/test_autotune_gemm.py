"""Tiles of grouped products that `autotune` measures: when, which, under what name, and what goes before them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from flashinfer.autotuner import autotune
from flashinfer.core import tuning
from flashinfer.core.arch import CPU, SMEM_BYTES, Arch
from flashinfer.ops.gemm import Epilogue, Gemm, GemmSpec, Rows, Weights
from flashinfer.ops.gemm.gluon_sm90 import configs as hopper
from flashinfer.ops.gemm.gluon_sm90 import launch as hopper_launch
from flashinfer.ops.gemm.measured import size_of, tuning_key
from flashinfer.ops.gemm.triton import configs, launch
from flashinfer.ops.gemm.triton.gate import BASE, BLOCK

H200 = Arch("sm90", 132, SMEM_BYTES["sm90"], "3.6.0")
BACKENDS: dict[str, Any] = {
    "gluon_sm90": (hopper, hopper_launch, hopper_launch.grouped_kernel),
    "triton": (configs, launch, launch.grouped_gemm_kernel),
}
GROUPS, ROWS = 20, 20 * 60


class Bench:
    """Products of a backend whose kernels are not launched and whose times are made up: the third tile wins.

    tiles: what each launch was configured for. timed: launches that were measured. capturing: as if under a graph.
    """

    def __init__(self, backend: str, patch: pytest.MonkeyPatch) -> None:
        self.configs, self.launch, self.kernel = BACKENDS[backend]
        self.arguments: list[tuple[Any, ...]] = []
        self.timed: list[Any] = []
        self.capturing = False
        self.wanted = 2
        really = tuning.measuring  # which knows that nothing is to be measured on a CPU
        patch.setattr(tuning, "measuring", lambda op, device: really(op, torch.device("cuda")))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(tuning, "time_ms", self.time_ms)
        patch.setattr(self.launch, "_launch", lambda *args, **options: self.arguments.append(args))

    @property
    def tiles(self) -> list[Any]:
        """The kernel's configuration of each launch."""
        return self.given("cfg")

    def given(self, name: str) -> list[Any]:
        """The argument of this name of each launch."""
        place = self.kernel.arg_names.index(name)
        return [arguments[2][place] for arguments in self.arguments]

    def time_ms(self, run: Callable[[], object]) -> float:
        run()
        self.timed.append(self.configs.imposed.get())
        run()
        return 1.0 if len(self.timed) % 100 == self.wanted + 1 else 2.0

    def __call__(self, rows: int = ROWS) -> Any:
        """The configuration of a product of so many rows, measured or not."""
        x, w = torch.zeros(rows, 128, dtype=torch.float16), torch.zeros(GROUPS, 512, 128, dtype=torch.float16)
        indptr = torch.arange(GROUPS + 1, dtype=torch.int32) * (rows // GROUPS)
        tensors = Gemm(torch.zeros(rows, 512, dtype=torch.float16), Rows(x, indptr), Weights(w), Epilogue())
        self.spec = tensors.spec
        self.launch.bind(tensors.spec, H200)(tensors)
        return self.tiles[-1]

    def contenders(self, rows: int = ROWS) -> tuple[str, list[Any]]:
        found: tuple[str, list[Any]] = self.configs.contenders(self.spec, H200, rows, GROUPS, 0)
        return found


@pytest.fixture(params=BACKENDS)
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    tuning.forget()
    yield Bench(request.param, monkeypatch)
    tuning.forget()


def imposed(bench: Bench, tile: Any) -> Any:
    """The configuration that this tile comes to."""
    with bench.configs.imposed(tile):
        return bench()


def test_every_candidate_is_measured_once_and_the_fastest_kept(bench: Bench) -> None:
    rule = bench()
    assert not bench.timed
    with autotune():
        best = bench()
        _, tiles = bench.contenders()
        assert len(bench.timed) == len(tiles) > 3 and len(bench.tiles) == 1 + 2 * len(tiles) + 1
        assert bench() == best != rule
    assert bench() == best == imposed(bench, tiles[2]), "neither measured again nor forgotten outside"
    assert bench(ROWS - GROUPS) == best, "of the same class"
    assert bench(9 * ROWS) == bench.tiles[-1] and len(bench.timed) == len(tiles), "of another one: by rule"
    with autotune():
        bench(9 * ROWS)
    assert len(bench.timed) > len(tiles)


def test_what_is_measured_is_kept_in_a_file(bench: Bench, tmp_path: Path) -> None:
    path, rule = tmp_path / "tiles.json", bench()
    with autotune(cache=path):
        best = bench()
    assert f"sm90/{bench.contenders()[0]}" in path.read_text()
    tuning.forget()
    assert bench() == rule
    count = len(bench.timed)
    with autotune(tune_mode=False, cache=path):
        assert bench() == best
    with autotune(cache=path):
        assert bench() == best
    assert len(bench.timed) == count


def test_nothing_is_measured_where_nobody_wants_it(bench: Bench) -> None:
    rule = bench()
    with autotune(skip_ops={"grouped_gemm"}):
        assert bench() == rule
    with autotune(tune_mode=False):
        assert bench() == rule
    bench.capturing = True
    with autotune():
        assert bench() == rule
    assert not bench.timed
    bench.capturing = False
    with autotune(skip_ops={"moe"}):
        assert bench() != rule


@pytest.mark.parametrize("change", [lambda tile: (7, *tile[1:]), lambda tile: tile[:-1], lambda tile: ()])
def test_tiles_of_other_rules_do_not_count(bench: Bench, change: Callable[[Any], Any]) -> None:
    """They might write past the end of today's results: by rule, until they are measured again."""
    rule = bench()
    key, tiles = bench.contenders()
    tuning.record(key, H200, change(tiles[2]))
    assert bench() == rule
    with autotune():
        best = bench()
    assert best == imposed(bench, tiles[2]) and tuning.tuned(key, H200) == tiles[2]


def test_who_goes_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An imposed tile, then autotune's, then the file's, then the rule's."""
    rule = bench()
    by_file = bench.contenders()[1][1]
    entry = (16, 64, False, True) if bench.configs is hopper else ("half", False, 64)
    monkeypatch.setattr(bench.configs, "tuned", lambda *arch: {entry: by_file})
    tuning.forget()
    assert bench() == imposed(bench, by_file) != rule
    key, (first, by_autotune, by_hand, *_) = bench.contenders()
    assert first == by_file
    tuning.record(key, H200, by_autotune)
    assert bench() == imposed(bench, by_autotune) != imposed(bench, by_file)
    with bench.configs.imposed(by_hand):
        assert bench() == imposed(bench, by_hand) != imposed(bench, by_autotune)


def test_a_tile_that_does_not_run_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench()
    _, tiles = bench.contenders()

    def time_ms(run: Callable[[], object]) -> float:
        bench.time_ms(run)
        if len(bench.timed) == 1:
            raise RuntimeError("out of shared memory")
        return 10.0 - len(bench.timed) % len(tiles)

    monkeypatch.setattr(tuning, "time_ms", time_ms)
    with autotune():
        assert bench() == imposed(bench, tiles[-2])


def test_every_run_counts_its_own_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter at its end would leave the next run nothing to do: the fastest of all."""
    tuning.forget()
    bench = Bench("gluon_sm90", monkeypatch)
    rows = 2000 * GROUPS
    with autotune():
        bench(rows)
    shared = [groups.taken for groups in bench.given("groups") if groups.taken is not None]
    assert len(shared) >= 4 and len({x.data_ptr() for x in shared}) == len(shared)
    tuning.forget()


# ---- Names


def test_sizes_of_one_class() -> None:
    assert [size_of(rows, 8) for rows in (1, 8, 9, 16, 17, 8 * 65)] == [
        (1, 8), (1, 8), (2, 8), (2, 8), (4, 8), (128, 8)
    ]  # fmt: skip
    assert [size_of(64, groups).groups for groups in (1, 2, 3, 5)] == [1, 2, 4, 8]


def test_a_key_can_be_read() -> None:
    spec = BASE._replace(activation="swiglu", gathered=True, row_map=False)
    expected = "grouped_gemm/triton/plain_bfloat16_bfloat16_bfloat16/4096x4096/ragged_gathered_gated_no_row_map/r64_g8"
    assert tuning_key("triton", spec, size_of(8 * 60, 8)) == expected
    assert "/fp8_block_float8_e4m3fn_float8_e4m3fn_bfloat16_scales1x128/" in tuning_key("a", BLOCK, size_of(1, 1))


CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({"kind": "fp8_tensor"}, False),
    ({"row_dtype": torch.float16}, False),
    ({"weight_dtype": torch.float16}, False),
    ({"out_dtype": torch.float16}, False),
    ({"n": 8192}, False),
    ({"k": 8192}, False),
    ({"layout": "padded"}, False),
    ({"gathered": True}, False),
    ({"indexed": True}, False),
    ({"transposed": True}, False),
    ({"scale_rows": 128}, False),
    ({"scale_cols": 1}, False),
    ({"row_map": False}, False),
    ({"weight_map": False}, False),
    ({"out_map": False}, False),
    ({"activation": "swiglu"}, False),
    ({"activation": "silu"}, True),
    ({"bias": True}, True),
    ({"row_weights": True}, True),
    ({"few_rows": True}, True),
]


@pytest.mark.parametrize(("changes", "same"), CHANGES)
def test_products_with_tiles_of_their_own(changes: dict[str, Any], same: bool) -> None:
    size = size_of(640, 10)
    assert (tuning_key("triton", BLOCK._replace(**changes), size) == tuning_key("triton", BLOCK, size)) == same
    assert tuning_key("triton", BLOCK, size) != tuning_key("gluon_sm90", BLOCK, size)


def test_all_of_a_spec_is_considered() -> None:
    """A field that is added to a spec must be added above too."""
    assert {name for changes, _ in CHANGES for name in changes} == set(GemmSpec._fields)


# ---- Candidates


FP4 = BASE._replace(kind="mxfp4", weight_dtype=torch.uint8)
WIDE = BASE._replace(row_dtype=torch.float32, weight_dtype=torch.float32, out_dtype=torch.float32)


@pytest.mark.parametrize(
    "arch", [H200, Arch("sm80", 108, SMEM_BYTES["sm80"], "3.6.0"), CPU], ids=lambda arch: arch.name
)
@pytest.mark.parametrize("spec", [BASE, BLOCK, FP4, WIDE], ids=lambda spec: f"{spec.kind} {spec.row_dtype}")
def test_candidates_begin_with_the_rule(spec: GemmSpec, arch: Arch) -> None:
    for height, activation in product(configs.HEIGHTS, ("", "swiglu")):
        gated = spec._replace(activation=activation)
        found = configs.candidates(gated, arch, height)
        assert found[0] == configs._tile(gated, arch, height) and 3 <= len(set(found)) == len(found) <= 8
        for tile in found:
            assert tile.block_m in configs.HEIGHTS and 32 <= tile.block_n <= 256 and tile.per_sm in (1, 2, 4)
            assert not tile.swap or (arch.has_wgmma and tile.block_n >= 16 * tile.num_warps)
            assert spec.kind != "fp8_block" or tile.block_k == 128
            made = configs._configured(gated, arch, 0, 32, 0, tile)
            assert made.kernel.block_m <= tile.block_m and made.num_stages >= 2


@pytest.mark.parametrize("scale_rows", [0, 1, 128])
def test_hoppers_candidates_are_all_of_its_tiles(scale_rows: int) -> None:
    for height, few in product(hopper.HEIGHTS, (False, True)):
        load = hopper.Workload(height, few, 32, False)
        halves = hopper.candidates(BASE, load)
        assert halves[0] == hopper.TILES[hopper.RULES[height, 16][few], 16] and len(halves) == 6
        eights = hopper.candidates(BLOCK._replace(scale_rows=scale_rows), load)
        assert eights[0] == hopper.TILES[hopper.RULES[height, 8][few], 8]
        assert len(eights) == len(set(eights)) == (7 if scale_rows else 4)
        assert len({hopper.configured(BLOCK._replace(scale_rows=scale_rows), t, 32, False) for t in eights}) == len(
            eights
        )


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_hoppers_candidates_of_4_bit_weights(kind: str) -> None:
    for height, few in product(hopper.HEIGHTS[2:], (False, True)):
        found = hopper.candidates(FP4._replace(kind=kind), hopper.Workload(height, few, 32, False))
        assert found[0] == hopper.TILES[hopper.RULES[height, 4][few], 4] and len(set(found)) == len(found) == 4
