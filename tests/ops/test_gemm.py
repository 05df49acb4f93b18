"""Grouped products of 16- and 32-bit numbers: every implementation against fp64 loops."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
import torch

from flashinfer.ops import gemm
from flashinfer.ops.gemm import Activation, Epilogue, Rows, Weights
from flashinfer.testing import poisoned
from tests.ops.common import DEVICE, IMPLEMENTATIONS, captured, force, skip_unless_runs
from tests.ops.gemm_checks import check, check_far, drawn_sizes, expected, normal, plain, with_epilogue

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ON_GPU = DEVICE == "cuda"


@pytest.fixture(params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return force(monkeypatch, "gemm", request.param)


def transposed(w: torch.Tensor) -> torch.Tensor:
    """The same numbers, stored `[W, K, N]`."""
    return w.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["nk", "kn"])
def test_groups_of_any_size(backend: str, rng: random.Random, dtype: torch.dtype, stored: str) -> None:
    skip_unless_runs(backend, dtype)
    problem = plain([*drawn_sizes(rng, 5, 150), 40], 72, 136, dtype)
    if stored == "kn":
        problem = replace(problem, weights=Weights(transposed(problem.weights.values)))
    check(problem)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 33), (130, 65), (129, 200), (16, 16)])
@pytest.mark.parametrize("stored", ["nk", "kn"])
def test_odd_sizes(backend: str, rng: random.Random, n: int, k: int, stored: str) -> None:
    problem = plain([*drawn_sizes(rng, 3, 40), 1], n, k)
    if stored == "kn":
        problem = replace(problem, weights=Weights(transposed(problem.weights.values)))
    check(problem)


@pytest.mark.parametrize("sizes", [[1], [0, 0, 5, 0], [16] * 8, [300], [64, 65, 63], [129] * 2])
def test_every_height_of_tiles(backend: str, sizes: list[int]) -> None:
    check(plain(sizes, 96, 64))


def test_several_bands_and_column_tiles(backend: str) -> None:
    """More row tiles than a band has, more tiles than programs, columns of several tiles."""
    check(plain([1200, 30], 300, 48))


@pytest.mark.parametrize("offset", [0, 1])
def test_views(backend: str, rng: random.Random, offset: int) -> None:
    """Rows, weights and result are parts of larger tensors; at offset 1 no tensor map can hold them."""
    problem = plain([*drawn_sizes(rng, 4, 60), 9], 40, 56)
    x, w = problem.rows.values, problem.weights.values
    wide_x, wide_w = normal(x.shape[0], 80), normal(len(w), 48, 72)
    rows = problem.rows._replace(values=wide_x[:, offset : offset + 56])
    weights = Weights(wide_w[:, 4:44, offset : offset + 56])
    problem = replace(problem, rows=rows, weights=weights)
    room = poisoned((problem.num_rows, 64), torch.float16, DEVICE)
    gemm.grouped_gemm(rows, weights, out=room[:, offset : offset + 40])
    assert torch.equal(room[:, offset : offset + 40].isnan(), expected(problem, torch.float64).isnan())
    assert room[:, :offset].isnan().all() and room[:, offset + 40 :].isnan().all()
    check(problem)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_weight_indices(backend: str, rng: random.Random, dtype: torch.dtype) -> None:
    """Groups choose their weights, several the same; a negative one gives zeros in spite of a bias."""
    problem = plain([20, 0, 33, 7, 1], 64, 48)
    bias = normal(3, 64)
    indices = torch.tensor([2, 1, -1, 2, 0], dtype=dtype, device=DEVICE)
    weights = Weights(problem.weights.values[:3], indices)
    check(replace(problem, weights=weights, epilogue=Epilogue(bias)))
    spread = torch.zeros(5, 3, dtype=dtype, device=DEVICE)
    spread[:, 1] = indices
    check(replace(problem, weights=weights._replace(indices=spread[:, 1])))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gathered_rows(backend: str, rng: random.Random, dtype: torch.dtype) -> None:
    problem = plain([*drawn_sizes(rng, 4, 70), 17], 64, 72)
    indices = torch.randint(0, 11, (problem.num_rows,), device=DEVICE).to(dtype)
    indices[problem.num_rows - 3 :] = -(2**30)  # of no group: not to be followed
    check(replace(problem, rows=Rows(normal(11, 72), problem.rows.indptr, indices)))


def test_int64_indptr(backend: str) -> None:
    problem = plain([5, 0, 40], 64, 32)
    check(replace(problem, rows=problem.rows._replace(indptr=problem.rows.indptr.long())))


@pytest.mark.parametrize("room", [20, 128])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padded_groups(backend: str, room: int, dtype: torch.dtype) -> None:
    """Room for equally many rows of each group, of which some exist."""
    lengths = [room, 0, 1, room // 2]
    x, w = normal(4 * room, 64), normal(4, 48, 64)
    problem = replace(plain([1], 48, 64), rows=Rows(x, lengths=torch.tensor(lengths, dtype=dtype, device=DEVICE)))
    problem = replace(problem, weights=Weights(w), num_rows=4 * room)
    check(replace(problem, spans=[(g * room, n) for g, n in enumerate(lengths)]))


@pytest.mark.parametrize("room", [20, 128])
def test_equal_groups(backend: str, room: int) -> None:
    """All rows exist, and blocks of them choose their weights."""
    indices = torch.tensor([1, 1, 0, -1, 2], dtype=torch.int32, device=DEVICE)
    rows, weights = Rows(normal(5 * room, 64)), Weights(normal(3, 48, 64), indices)
    problem = replace(plain([1], 48, 64), rows=rows, weights=weights, num_rows=5 * room)
    check(replace(problem, spans=[(g * room, room) for g in range(5)]))


def test_one_matrix_for_all_rows(backend: str) -> None:
    problem = replace(plain([1], 72, 64), rows=Rows(normal(150, 64)), num_rows=150, spans=[(0, 150)])
    check(problem)


def test_thousands_of_groups(backend: str, rng: random.Random) -> None:
    """More than are looked at in one go."""
    sizes = [rng.choice([1, 2]) if rng.random() < (0.5 if ON_GPU else 0.01) else 0 for _ in range(2500)]
    problem = plain(sizes, 16, 16)
    indices = torch.randint(0, 4, (2500,), device=DEVICE)
    check(replace(problem, weights=Weights(normal(4, 16, 16), indices)))


@pytest.mark.parametrize("activation", gemm.ACTIVATIONS)
@pytest.mark.parametrize(("bias", "row_weights"), [(False, False), (True, True)])
def test_epilogues(backend: str, activation: str, bias: bool, row_weights: bool) -> None:
    problem = plain([30, 0, 70], 144, 32)
    check(with_epilogue(problem, activation, bias, row_weights, parameters=bias and activation == "swiglu"))


@pytest.mark.parametrize("present", list(product((False, True), repeat=3))[1:-1])
def test_each_parameter_of_swiglu_alone(backend: str, present: tuple[bool, bool, bool]) -> None:
    drawn = [torch.rand(2, device=DEVICE) + 0.5 if there else None for there in present]
    check(replace(plain([3, 9], 32, 32), epilogue=Epilogue(None, Activation("swiglu", *drawn))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_in_another_dtype(backend: str, dtype: torch.dtype) -> None:
    skip_unless_runs(backend, dtype)
    check(replace(plain([3, 40], 48, 32), out_dtype=dtype))


def test_not_a_number_stays_in_its_row(backend: str) -> None:
    problem = plain([5, 40, 3], 48, 64)
    for row, value in ((4, float("nan")), (5, float("inf")), (44, float("-inf")), (45, float("nan"))):
        problem.rows.values[row, 7] = value
    problem.weights.values[:, :, 7] = 1.0  # no zero among them: inf * 0 is NaN
    out = check(problem)
    assert out[4].isnan().all() and out[5].isposinf().all() and out[44].isneginf().all() and out[45].isnan().all()


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu", "relu2", "silu", "gelu"])
def test_not_a_number_passes_activations(backend: str, activation: str) -> None:
    limits = torch.ones(1, device=DEVICE)
    parameters = (limits, limits, limits) if activation == "swiglu" else ()
    problem = plain([4], 32, 32)
    problem.rows.values[2, 0] = float("nan")
    out = check(replace(problem, epilogue=Epilogue(None, Activation(activation, *parameters))))
    assert out[2].isnan().all() and out[:2].isfinite().all()


def test_empty_inputs(backend: str) -> None:
    problem = plain([0, 0, 0], 48, 64)
    check(problem)
    none = replace(problem, rows=problem.rows._replace(values=normal(0, 64)), num_rows=0)
    assert check(none).shape == (0, 48)
    nothing = Rows(normal(3, 64), torch.zeros(1, dtype=torch.int32, device=DEVICE))
    out = poisoned((3, 48), torch.float16, DEVICE)
    gemm.grouped_gemm(nothing, Weights(normal(0, 48, 64)), out=out)
    assert out.isnan().all()


def test_no_columns_to_sum(backend: str) -> None:
    problem = plain([4, 9], 48, 0)
    out = poisoned((problem.num_rows, 48), torch.float16, DEVICE)
    gemm.grouped_gemm(problem.rows, problem.weights, out=out)
    assert (out[:13] == 0).all() and out[13:].isnan().all()


def test_new_result(backend: str) -> None:
    problem = plain([4, 9], 48, 32)
    out = gemm.grouped_gemm(problem.rows, problem.weights, out_dtype=torch.float32)
    assert out.dtype == torch.float32 and out.shape == (problem.num_rows, 48)
    gated = Epilogue(None, Activation("swiglu"))
    indices = torch.zeros(14, dtype=torch.int32, device=DEVICE)
    out = gemm.grouped_gemm(problem.rows._replace(indices=indices), problem.weights, gated)
    assert out.dtype == torch.float16 and out.shape == (14, 24)


def test_repeats_bit_for_bit(backend: str) -> None:
    problem = plain([40, 100, 7], 200, 300)
    first, second = (gemm.grouped_gemm(problem.rows, problem.weights)[:147] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["rows", "weights", "out"])
def test_offsets_past_two_to_the_31(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    force(monkeypatch, "gemm", "triton")
    check_far(side)


@pytest.mark.gpu
def test_graph_replays_with_other_group_sizes(monkeypatch: pytest.MonkeyPatch, rng: random.Random) -> None:
    force(monkeypatch, "gemm", "triton")
    problem = plain([40, 60, 0, 100], 256, 128, torch.bfloat16)
    out = torch.empty(problem.num_rows, 256, dtype=torch.bfloat16, device=DEVICE)
    graph = captured(lambda: gemm.grouped_gemm(problem.rows, problem.weights, out=out))
    for sizes in ([200, 0, 0, 0], [0, 1, 198, 1], [50, 50, 50, 50]):
        fresh = plain(sizes, 256, 128, torch.bfloat16)
        problem.rows.indptr.copy_(fresh.rows.indptr)
        problem.spans = fresh.spans
        out.fill_(float("nan"))
        graph.replay()
        wanted = gemm.grouped_gemm(problem.rows, problem.weights)
        assert torch.equal(out[:200], wanted[:200])
        check(problem)


@pytest.mark.gpu
def test_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "gemm", "triton")
    problem = plain([40, 60, 0, 100], 256, 128, torch.bfloat16)
    gemm.grouped_gemm(problem.rows, problem.weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gemm.grouped_gemm(problem.rows, problem.weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_whole(backend: str) -> None:
    """`torch.compile(fullgraph=True)` sees one op."""
    problem = plain([4, 9], 48, 32)

    def layer(x: torch.Tensor, w: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
        return gemm.grouped_gemm(Rows(x, indptr), Weights(w), Epilogue(None, Activation("swiglu"))) + 1

    arguments = (problem.rows.values, problem.weights.values, problem.rows.indptr)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments)[:13], layer(*arguments)[:13])
