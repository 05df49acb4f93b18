"""Grouped products of fp8 and of fp4 weights: every implementation against fp64 loops."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from flashinfer.ops.gemm import Rows
from flashinfer.ops.gemm.triton import configs
from tests.ops.common import DEVICE, IMPLEMENTATIONS, force
from tests.ops.gemm_checks import E4M3, check, drawn_sizes, fp4, fp8_blocks, normal, plain, ragged, with_epilogue


@pytest.fixture(params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return force(monkeypatch, "gemm", request.param)


@pytest.mark.parametrize("scale_rows", [1, 128])
@pytest.mark.parametrize("scale_cols", [1, 128])
def test_fp8_blocks(backend: str, rng: random.Random, scale_rows: int, scale_cols: int) -> None:
    check(fp8_blocks([*drawn_sizes(rng, 3, 140), 9], 200, 256, scale_rows, scale_cols))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (129, 130), (72, 128), (16, 272)])
def test_fp8_odd_sizes(backend: str, n: int, k: int) -> None:
    check(fp8_blocks([5, 0, 20], n, k))


@pytest.mark.parametrize("rows", [1, 20, 70])
@pytest.mark.parametrize("half", [128, 96, 200])
def test_fp8_pairs_whose_gates_begin_inside_of_a_block(backend: str, rows: int, half: int) -> None:
    check(with_epilogue(fp8_blocks([rows, 3], 2 * half, 128), "swiglu", True, True, True))


def test_fp8_scales_side_by_side(backend: str) -> None:
    """Scales of one block of columns lie next to each other, as quantisers for TMA write them."""
    problem = fp8_blocks([5, 40], 64, 384)
    scale = problem.rows.scale.t().contiguous().t()
    weight_scale = problem.weights.scale.transpose(1, 2).contiguous().transpose(1, 2)
    weights = problem.weights._replace(scale=weight_scale)
    check(replace(problem, rows=problem.rows._replace(scale=scale), weights=weights))


def test_fp8_gathered_rows(backend: str) -> None:
    """The scales are gathered with the rows."""
    problem = fp8_blocks([5, 40], 64, 256)
    indices = torch.randint(0, 7, (problem.num_rows,), device=DEVICE, dtype=torch.int32)
    values, scale = normal(7, 256, dtype=E4M3), torch.rand(7, 2, device=DEVICE) + 0.5
    check(replace(problem, rows=Rows(values, problem.rows.indptr, indices, scale)))


def test_fp8_not_a_number_stays_in_its_row(backend: str) -> None:
    problem = fp8_blocks([5, 40], 64, 256)
    interpreted = backend == "triton" and DEVICE == "cpu"  # takes an fp8 NaN for 480
    if not interpreted:
        problem.rows.values.view(torch.uint8)[7, 3] = 0x7F
    problem.rows.scale[9, 1] = float("nan")
    out = check(problem)
    assert (interpreted or out[7].isnan().all()) and out[9].isnan().all() and out[8].isfinite().all()


@pytest.mark.parametrize("rows", [3, 60])
@pytest.mark.parametrize("factors", ["none", "one", "each"])
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (torch.float8_e5m2, E4M3), (E4M3, torch.float8_e5m2)])
def test_fp8_of_one_scale(backend: str, rows: int, factors: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    indptr, spans, num_rows = ragged([rows, 0, 7], 2)
    x, w = normal(num_rows, 160, dtype=dtypes[0]), normal(3, 80, 160, dtype=dtypes[1])
    sizes = {"none": None, "one": 1, "each": 3}[factors]
    factor = None if sizes is None else torch.rand(sizes, device=DEVICE) + 0.5
    row_scale = None if sizes is None else torch.rand(1, device=DEVICE) + 0.5
    problem = plain([1], 80, 160)
    weights = problem.weights._replace(values=w, kind="fp8_tensor", global_scale=factor)
    check(replace(problem, rows=Rows(x, indptr, scale=row_scale), weights=weights, spans=spans, num_rows=num_rows))


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("rows", [1, 20, 60, 130])
def test_fp4(backend: str, kind: str, rows: int) -> None:
    check(fp4(kind, [rows, 0, 3], 72, 160))


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (130, 96), (17, 2080)])
def test_fp4_odd_sizes(backend: str, kind: str, n: int, k: int) -> None:
    check(fp4(kind, [4, 9], n, k))


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_fp4_pairs(backend: str, kind: str) -> None:
    check(with_epilogue(fp4(kind, [4, 40], 176, 96), "swiglu", True, True, True))


@pytest.mark.parametrize("codes", ["every code", "every scale"])
def test_fp4_code_by_code(backend: str, codes: str) -> None:
    """All 16 codes under one scale; all scales of e8m0 that stay inside of fp16's range, and its NaN."""
    problem = fp4("mxfp4", [32], 256, 32)
    problem.rows.values.copy_(torch.eye(35, 32, device=DEVICE))
    problem.weights.scale.fill_(127)
    if codes == "every code":
        problem.weights.values.copy_(torch.arange(256, device=DEVICE)[None, :, None].to(torch.uint8))
    else:
        problem.weights.scale[0, :, 0] = torch.randint(115, 140, (256,), device=DEVICE).to(torch.uint8)
        problem.weights.scale[0, 7, 0] = 255
    out = check(problem)
    assert out[:32, 7].isnan().all() == (codes == "every scale")


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", ["half", "fp8", "mxfp4"])
def test_every_tile(monkeypatch: pytest.MonkeyPatch, kind: str, block_m: int, swap: bool) -> None:
    """What tuning may choose is right, whatever the number of rows."""
    force(monkeypatch, "gemm", "triton")
    sizes = [1, 0, 70]
    make = {"half": lambda: plain(sizes, 80, 200), "fp8": lambda: fp8_blocks(sizes, 80, 200)}
    problem = make[kind]() if kind in make else fp4(kind, sizes, 80, 192)
    with configs.imposed(configs.Tile(block_m, 64, 128, 4, 2, 1, swap, band=1)):
        check(problem)
        check(with_epilogue(problem, "geglu", True, False, False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PTX decodes two numbers at a time, for bf16")
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("rows", [3, 20, 60, 130])
def test_fp4_of_bf16(monkeypatch: pytest.MonkeyPatch, kind: str, rows: int) -> None:
    """mxfp4: scales from the smallest, which is subnormal, to one under which sums stay finite."""
    force(monkeypatch, "gemm", "triton")
    problem = fp4(kind, [1, 0, rows], 176, 192, torch.bfloat16)
    if kind == "mxfp4":
        problem.weights.scale[0, :, 0] = torch.arange(176, device=DEVICE).to(torch.uint8)
    check(problem)
    check(with_epilogue(problem, "geglu", True, False, False))
