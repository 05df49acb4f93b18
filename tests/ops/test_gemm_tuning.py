"""Products of tiles that `autotune` measures: whatever it may choose is right, and it measures once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from flashinfer.autotuner import autotune
from flashinfer.core import tuning
from flashinfer.core.arch import arch_of
from flashinfer.ops import gemm
from flashinfer.ops.gemm.triton import configs
from tests.ops.common import DEVICE, force
from tests.ops.gemm_checks import Problem, check, drawn_sizes, fp4, fp8_blocks, plain, with_epilogue

MAKERS: dict[str, Callable[..., Problem]] = {
    "half": plain,
    "fp8": fp8_blocks,
    "mxfp4": lambda *sizes: fp4("mxfp4", *sizes, torch.bfloat16 if DEVICE == "cuda" else torch.float16),
}
# N and K; the interpreter takes its time.
SHAPE = (384, 256) if DEVICE == "cuda" else (144, 160)
TIMED: list[object] = []


@pytest.fixture(params=["gluon_sm90", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Measures for real on a GPU; in the interpreter every tile runs, and times are drawn."""
    force(monkeypatch, "gemm", request.param)
    tuning.forget()
    TIMED.clear()
    really, time_ms = tuning.measuring, tuning.time_ms

    def timed(run: Callable[[], object]) -> float:
        TIMED.append(run)
        if DEVICE == "cuda":
            return time_ms(run)
        run()
        return random.random()

    monkeypatch.setattr(tuning, "time_ms", timed)
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(tuning, "measuring", lambda op, device: really(op, torch.device("cuda")))
    yield request.param
    tuning.forget()


def stored() -> list[str]:
    """Keys of all that was measured."""
    return list(tuning._table.entries)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_tuned_product_is_right_and_measured_once(backend: str, kind: str, rng: random.Random) -> None:
    problem = MAKERS[kind]([*drawn_sizes(rng, 2, 40), 133], *SHAPE)
    check(problem)
    assert not TIMED
    with autotune():
        check(problem, "measured")
        (key,), count = stored(), len(TIMED)
        assert f"/grouped_gemm/{backend}/" in key and count > 2
        check(problem, "measured before")
    check(problem, "outside")
    with autotune():
        check(problem, "in another block")
    assert len(TIMED) == count and stored() == [key]


@pytest.mark.parametrize("activation", ["", "swiglu"])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_candidate_of_triton_is_right(
    kind: str, activation: str, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    force(monkeypatch, "gemm", "triton")
    problem = with_epilogue(MAKERS[kind]([*drawn_sizes(rng, 2, 40), 70], *SHAPE), activation, False, False, False)
    out = torch.empty(1, problem.out_cols, dtype=problem.out_dtype, device=DEVICE)
    spec = gemm.Gemm(out, problem.rows, problem.weights, problem.epilogue).spec
    arch, ran = arch_of(torch.device(DEVICE)), 0
    tiles: dict[Any, None] = {}
    for height in configs.HEIGHTS:
        tiles |= dict.fromkeys(configs.candidates(spec, arch, height))
    for tile in tiles:
        try:
            with configs.imposed(tile):
                check(problem, str(tile))
            ran += 1
        except OutOfResources:  # of shared memory: measuring leaves it out
            continue
    assert 2 * ran > len(tiles)


@pytest.mark.gpu
def test_a_captured_product_is_not_measured(backend: str) -> None:
    problem = plain([33, 0, 70], *SHAPE)
    expected = check(problem)
    out = torch.zeros_like(expected)

    def run() -> None:
        gemm.grouped_gemm(problem.rows, problem.weights, out=out)

    run()
    graph = torch.cuda.CUDAGraph()
    with autotune(), torch.cuda.graph(graph):
        run()
    assert not TIMED and not stored()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out[:103], expected[:103])
    with autotune():
        run()
    assert TIMED and len(stored()) == 1
