"""The Hopper products with 4-bit weights: every tile, group sizes at random; what they refuse is in tests/unit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from flashinfer.ops import gemm
from flashinfer.ops.gemm import Epilogue
from flashinfer.testing import poisoned
from tests.ops.common import DEVICE, force
from tests.ops.gemm_checks import Problem, check, drawn_sizes, fp4, normal, with_epilogue
from tests.ops.test_gemm_hopper import BACKEND, HERE, imposed, tiles

pytestmark = pytest.mark.skipif(HERE is not None, reason=f"no Hopper products here: {HERE}")
KINDS = ("mxfp4", "nvfp4")
TILES = ("256x128", "128x128", "64x128", "64x128x2")
BF16 = torch.bfloat16


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Products of the test get that tile, by name of the implementation: what it refuses is an error."""
    force(monkeypatch, "gemm", BACKEND, skip=False)
    with imposed(tiles(4)[request.param]):
        yield request.param


def test_all_tiles_are_here() -> None:
    assert set(TILES) == set(tiles(4))


def gathered(problem: Problem, dtype: torch.dtype) -> Problem:
    indices = torch.randint(problem.num_rows, (problem.num_rows,), device=DEVICE, dtype=dtype)
    return replace(problem, rows=problem.rows._replace(indices=indices))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), [(328, 32), (200, 96), (136, 704), (72, 2912), (512, 4096)])
def test_every_tile(tile: str, rng: random.Random, kind: str, n: int, k: int) -> None:
    """Rows that end inside of tiles, K and columns that do."""
    check(fp4(kind, [*drawn_sizes(rng, 5, 400), 128, 257, 300], n, k, BF16))


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(("kind", "activation"), [("mxfp4", "swiglu"), ("mxfp4", "relu2"), ("nvfp4", "swiglu")])
def test_epilogues(tile: str, rng: random.Random, kind: str, activation: str, complete: bool) -> None:
    problem = fp4(kind, [*drawn_sizes(rng, 4, 300), 200], 336, 160, BF16)
    check(with_epilogue(problem, activation, complete, complete, complete and activation == "swiglu"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("activation", ["", "swiglu"])
def test_gathered_rows(tile: str, rng: random.Random, dtype: torch.dtype, activation: str) -> None:
    problem = gathered(fp4("mxfp4", [*drawn_sizes(rng, 5, 400), 128, 257, 300], 336, 704, BF16), dtype)
    check(with_epilogue(problem, activation, True, True, bool(activation)))


@pytest.mark.parametrize("codes", ["every code", "every scale"])
def test_code_by_code(tile: str, codes: str) -> None:
    """All 16 codes under one scale; all scales of e8m0 under which numbers are finite, and its NaN."""
    problem = fp4("mxfp4", [64], 256, 64, BF16)
    problem.rows.values.copy_(torch.eye(67, 64, device=DEVICE))
    every = torch.arange(256, device=DEVICE).to(torch.uint8)
    problem.weights.scale.fill_(127)
    if codes == "every code":
        problem.weights.values.copy_(every[None, :, None])
    else:
        problem.weights.scale.copy_(every.clamp(max=252)[None, :, None])
        problem.weights.scale[0, 7, 1] = 255
    out = check(problem)
    assert out[:64, 7].isnan().all() == (codes == "every scale")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("finishes", [False, True])
def test_weights_of_nobody(tile: str, gated: bool, finishes: bool) -> None:
    """Negative indices give zeros in spite of a bias, of NaN in rows, and in scales of matrices that others have."""
    indices = torch.tensor([2, -1, 1, -5, 2, 1], dtype=torch.int32, device=DEVICE)
    problem = fp4("mxfp4", [100, 64, 33, 200, 270, 0], 272, 192, BF16)
    values, scale = problem.weights.values[:3], problem.weights.scale[:3].clone()
    scale[0] = 255
    weights = problem.weights._replace(values=values, scale=scale, indices=indices)
    problem = with_epilogue(replace(problem, weights=weights), "swiglu" if gated else "", finishes, False, False)
    clean = check(problem)[:667]
    problem.rows.values[100:164] = float("nan")
    problem.rows.values[197:397] = float("nan")
    out = poisoned((problem.num_rows, problem.out_cols), BF16, DEVICE)
    gemm.grouped_gemm(problem.rows, problem.weights, problem.epilogue, out=out)
    assert (out[100:164] == 0).all() and (out[197:397] == 0).all()
    assert torch.equal(out[:667], clean)


def test_not_a_number_stays_in_its_row(tile: str) -> None:
    problem = fp4("mxfp4", [5, 140, 90], 136, 128, BF16)
    for row, value in ((4, float("nan")), (5, float("inf")), (144, float("-inf")), (145, float("nan"))):
        problem.rows.values[row, 7] = value
    problem.weights.values[:, :, 3] = 0x22  # 1
    check(problem)


def apart(scale: torch.Tensor) -> torch.Tensor:
    """The same scales in the middle of others, NaN, at an odd address, with gaps between them."""
    matrices, rows, blocks = scale.shape
    room = torch.full((matrices + 2, rows + 3, 2 * blocks + 3), 255, dtype=torch.uint8, device=DEVICE)
    return room[1:-1, 1:-2, 1:-2:2].copy_(scale.view(torch.uint8)).view(scale.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_any_strides_and_views_of_codes(tile: str, kind: str) -> None:
    problem = fp4(kind, [100, 0, 200], 168, 192, BF16)
    weights, wide = problem.weights, torch.randint(0, 256, (3, 200, 128), device=DEVICE).to(torch.uint8)
    view = wide[:, 8:176, 16:112]
    by_k = weights.scale.transpose(1, 2).contiguous().transpose(1, 2)
    one, first = weights.scale[:1].expand_as(by_k), weights.scale[:, :, :1].expand_as(by_k)
    for scale in (by_k, one, first, apart(weights.scale)):
        check(replace(problem, weights=weights._replace(values=view, scale=scale)))


@pytest.mark.parametrize("groups", [1, 33, 257, 700])
def test_numbers_of_groups(tile: str, rng: random.Random, groups: int) -> None:
    problem = fp4("mxfp4", [rng.choice([0, 1, 70, 260]) for _ in range(groups - 1)] + [60 * groups], 72, 64, BF16)
    check(problem)


@pytest.mark.parametrize("room", [40, 128, 300])
def test_padded_groups(tile: str, room: int) -> None:
    problem = fp4("mxfp4", [room] * 4 + [room - 3], 136, 96, BF16)
    lengths = [room, 0, 1, room // 2, room - 1]
    rows = problem.rows._replace(indptr=None, lengths=torch.tensor(lengths, device=DEVICE))
    check(replace(problem, rows=rows, spans=[(g * room, n) for g, n in enumerate(lengths)]))
    full = [(g * room, room) for g in range(5)]
    check(replace(problem, rows=rows._replace(lengths=None), spans=full))


@pytest.mark.parametrize("rows", [40, 64, 257, 1000])
def test_one_group(tile: str, rows: int) -> None:
    problem = fp4("mxfp4", [rows - 3], 200, 160, BF16)
    check(replace(problem, rows=problem.rows._replace(indptr=None), spans=[(0, rows)]))


def test_repeats_bit_for_bit(tile: str) -> None:
    """A race would show as a difference."""
    problem = fp4("mxfp4", [400, 1000, 7, 0, 600, 64], 2048, 2048, BF16)
    first = gemm.grouped_gemm(problem.rows, problem.weights)[:2071]
    for _ in range(20):
        assert torch.equal(first, gemm.grouped_gemm(problem.rows, problem.weights)[:2071])


def test_few_rows_are_others_to_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "gemm", "auto")
    for rows, name in ((99, BACKEND), (96, "triton")):
        problem = replace(fp4("mxfp4", [rows, 0, 0], 72, 64, BF16), num_rows=rows)
        out = normal(rows, 72, dtype=BF16)
        spec = gemm.Gemm(out, problem.rows, problem.weights, Epilogue()).spec
        assert name in gemm.CHOICE.module(spec, out.device).__name__
        check(problem)
