"""The Hopper products: every tile, every kind of operands, group sizes at random; what they refuse is in tests/unit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from flashinfer.core import replay
from flashinfer.core.arch import arch_of
from flashinfer.ops import gemm
from flashinfer.ops.gemm import Activation, Epilogue, Rows, Weights
from flashinfer.ops.gemm.support import gluon_sm90_supports
from flashinfer.testing import poisoned
from tests.ops.common import DEVICE, captured, force
from tests.ops.gemm_checks import (
    Problem,
    check,
    check_far,
    drawn_sizes,
    expected,
    fp8_blocks,
    normal,
    plain,
    ragged,
    with_epilogue,
)

BACKEND = "gluon_sm90"
ARCH = arch_of(torch.device(DEVICE))
MATRIX = torch.empty(64, 64, dtype=torch.float16)
SPEC = gemm.Gemm(MATRIX, Rows(MATRIX), Weights(MATRIX[None]), Epilogue()).spec
HERE = gluon_sm90_supports(SPEC, ARCH)
pytestmark = pytest.mark.skipif(HERE is not None, reason=f"no Hopper products here: {HERE}")
HALVES = (torch.float16, torch.bfloat16)
Each = Callable[[int], Iterator[str]]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name: what it refuses is an error, not a product of another implementation."""
    force(monkeypatch, "gemm", BACKEND, skip=False)


def imposed(tile: Any) -> AbstractContextManager[None]:
    from flashinfer.ops.gemm.gluon_sm90 import configs

    return configs.imposed(tile)


def tiles(bits: int) -> dict[str, Any]:
    """All that rules and tuning can choose: of fp8 also with turns where a rule's has none, and without."""
    from flashinfer.ops.gemm.gluon_sm90.configs import TILES

    found = {name: tile for (name, width), tile in TILES.items() if width == bits}
    two = {name: tile for name, tile in found.items() if tile.consumers == 2 and bits == 8}
    return found | {f"{name}, other turns": tile._replace(turns=not tile.turns) for name, tile in two.items()}


@pytest.fixture
def every_tile() -> Each:
    """`for name in every_tile(bits)`: the body's products get that tile."""

    def each(bits: int) -> Iterator[str]:
        for name, tile in tiles(bits).items():
            with imposed(tile):
                yield name

    return each


def transposed(w: torch.Tensor) -> torch.Tensor:
    """The same numbers, stored `[W, K, N]`."""
    return w.transpose(1, 2).contiguous().transpose(1, 2)


def fp8_tensor(sizes: list[int], n: int, k: int) -> Problem:
    """A scale of the rows, and one of each matrix."""
    indptr, spans, num_rows = ragged(sizes, spare=3)
    x, w = (normal(*shape, dtype=torch.float8_e4m3fn) for shape in ((num_rows, k), (len(sizes), n, k)))
    scale, of_matrices = torch.rand(1, device=DEVICE) + 0.5, torch.rand(len(sizes), device=DEVICE) + 0.5
    rows, weights = Rows(x, indptr, scale=scale), Weights(w, kind="fp8_tensor", global_scale=of_matrices)
    return Problem(rows, weights, spans, num_rows)


def splits(rng: random.Random, groups: int, total: int) -> list[int]:
    """Sizes of `groups` groups of at most `total` rows: even, uneven, of tiles' heights, all in one, mostly none."""
    kind = rng.randrange(5)
    if kind == 0:
        return [total // groups] * groups
    if kind == 1:
        sizes = [0] * groups
        sizes[rng.randrange(groups)] = total
        return sizes
    if kind == 2:
        heights = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 159, 160, 161, 191, 192, 256, 288, 289)
        sizes = [rng.choice(heights) for _ in range(groups)]
    elif kind == 3:
        sizes = [rng.randrange(total) if rng.random() < 0.2 else 0 for _ in range(groups)]
    else:
        sizes = [int(rng.expovariate(groups / total)) for _ in range(groups)]
    while sum(sizes) > total:
        sizes[sizes.index(max(sizes))] //= 2
    return sizes


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stored", ["nk", "kn"])
def test_every_tile(every_tile: Each, rng: random.Random, dtype: torch.dtype, stored: str) -> None:
    """Rows that end inside of tiles, K and columns that do."""
    for name in every_tile(16):
        problem = plain([*drawn_sizes(rng, 5, 400), 128, 70, 300], 328, 200, dtype)
        if stored == "kn":
            problem = replace(problem, weights=Weights(transposed(problem.weights.values)))
        check(problem, name)


@pytest.fixture(params=["dealt", "counted"])
def taking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether programs take tiles by turns, or a counter's next ones however few there are."""
    from flashinfer.ops.gemm.gluon_sm90 import launch

    monkeypatch.setattr(launch, "DRIFT_GROUPS", 1 if request.param == "counted" else 1 << 30)
    monkeypatch.setattr(launch, "DRIFT_TILES", 0)
    return str(request.param)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("activation", "n"), [(None, 1096), ("swiglu", 1056)])
def test_tails(gathered: bool, activation: str | None, n: int, taking: str) -> None:
    """Groups that end on, before and after the rows that a last tile takes along; K of one tile, and of many.

    More tiles than programs.
    """
    sizes = [1, 32, 127, 128, 129, 0, 159, 160, 161, 191, 256, 257, 288, 289, 416, 417, 130, 150]
    with imposed(tiles(16)["128x256t"]):
        for k in (64, 704):
            problem = with_epilogue(plain(sizes, n, k), activation or "", True, True, True)
            if gathered:
                indices = torch.randint(problem.num_rows, (problem.num_rows,), device=DEVICE)
                problem = replace(problem, rows=problem.rows._replace(indices=indices))
            check(problem, f"K {k}")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_gathered_rows_of_every_tile(
    every_tile: Each, rng: random.Random, dtype: torch.dtype, activation: str | None
) -> None:
    """Copied row by row from places all over, some of them twice; K of one tile, and of more than are in flight."""
    for name, k in product(every_tile(16), (64, 1280)):
        problem = plain([*drawn_sizes(rng, 4, 300), 70], 336, k)
        indices = torch.randint(0, 333, (problem.num_rows,), device=DEVICE).to(dtype)
        indices[problem.num_rows - 3 :] = -(2**30)  # of no group: not to be followed
        wide = normal(333, k + 24)[:, 8 : 8 + k]
        problem = replace(problem, rows=Rows(wide, problem.rows.indptr, indices))
        if activation:
            problem = with_epilogue(problem, activation, True, False, False)
        check(problem, f"{name}, K {k}")


def test_gathered_rows_without_weights(every_tile: Each) -> None:
    """A negative number of weights gives zeros, in spite of NaN in the rows."""
    for name in every_tile(16):
        problem = plain([20, 133, 64], 256, 256)
        indices = torch.arange(problem.num_rows, device=DEVICE).flip(0)
        weights = problem.weights._replace(indices=torch.tensor([2, -1, 0], device=DEVICE))
        values = problem.rows.values.clone()
        values[problem.num_rows - 153 : problem.num_rows - 20] = float("nan")
        out = poisoned((problem.num_rows, 256), torch.float16, DEVICE)
        gemm.grouped_gemm(Rows(values, problem.rows.indptr, indices), weights, out=out)
        assert (out[20:153] == 0).all(), name
        assert out[:20].isfinite().all() and out[153:217].isfinite().all(), name


# bf16 holds what gelu gives far below 0, where the oracle's erf has long been -1.
@pytest.mark.parametrize(
    ("activation", "dtype"), [("swiglu", torch.bfloat16), *((name, torch.float16) for name in gemm.ACTIVATIONS)]
)
@pytest.mark.parametrize("complete", [False, True])
def test_epilogues_of_every_tile(
    every_tile: Each, rng: random.Random, dtype: torch.dtype, activation: str, complete: bool
) -> None:
    for name in every_tile(16):
        problem = plain([*drawn_sizes(rng, 4, 300), 200], 336, 136, dtype)
        check(with_epilogue(problem, activation, complete, complete, complete and activation == "swiglu"), name)


@pytest.mark.parametrize("scale_rows", [1, 128])
@pytest.mark.parametrize(("n", "k"), [(256, 128), (392, 896), (1024, 1100)])
def test_every_tile_of_fp8_blocks(every_tile: Each, rng: random.Random, n: int, k: int, scale_rows: int) -> None:
    k -= k % 16
    for name in every_tile(8):
        check(fp8_blocks([*drawn_sizes(rng, 5, 400), 128, 70, 300], n, k, scale_rows), name)


@pytest.mark.parametrize("complete", [False, True])
def test_gated_fp8_of_every_tile(every_tile: Each, rng: random.Random, complete: bool) -> None:
    for name in every_tile(8):
        for problem in (fp8_blocks([*drawn_sizes(rng, 4, 300), 200], 768, 512), fp8_tensor([3, 0, 200, 64], 256, 272)):
            check(with_epilogue(problem, "swiglu", complete, complete, complete), name)


def test_fp8_per_tensor(every_tile: Each, rng: random.Random) -> None:
    for name in every_tile(8):
        check(fp8_tensor([*drawn_sizes(rng, 4, 300), 200], 328, 272), name)


def inside(scale: torch.Tensor) -> torch.Tensor:
    """The same numbers in the middle of others, at an odd address, with gaps between them."""
    *outer, last = scale.shape
    room = torch.full([*(n + 3 for n in outer), 2 * last + 3], float("nan"), device=DEVICE)
    return room[(*(slice(1, 1 + n) for n in outer), slice(1, 1 + 2 * last, 2))].copy_(scale)


# Of rows, of weights: by columns and by K, as other libraries keep them; apart; one number for all blocks of K.
LAYOUTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], ...]] = {
    "columns first": (lambda x: x.t().contiguous().t(), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "inside": (inside, inside),
    "repeated": (lambda x: x[:, :1].expand_as(x), lambda x: x[:, :, :1].expand_as(x)),
    "matrices repeated": (lambda x: x[:1].expand_as(x), lambda x: x[:1, :1].expand_as(x)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("scale_rows", "activation"), [(1, None), (128, None), (1, "swiglu")])
def test_scales_of_any_strides(every_tile: Each, layout: str, scale_rows: int, activation: str | None) -> None:
    of_rows, of_weights = LAYOUTS[layout]
    for name in every_tile(8):
        problem = fp8_blocks([100, 0, 200, 28], 512, 640, scale_rows)
        rows, weights = problem.rows, problem.weights
        rows, weights = rows._replace(scale=of_rows(rows.scale)), weights._replace(scale=of_weights(weights.scale))
        problem = replace(problem, rows=rows, weights=weights)
        check(with_epilogue(problem, activation, False, False, False) if activation else problem, name)


@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize("k", [128, 1152])
def test_scales_of_nobody(every_tile: Each, k: int, activation: str | None) -> None:
    """NaN as the scales of rows without weights, of rows of no group, and of a matrix that no row uses."""
    indices = torch.tensor([2, -1, 1, -5, 2, 0], device=DEVICE)
    sizes = [100, 64, 33, 200, 70, 0]
    for name in every_tile(8):
        problem = fp8_blocks(sizes, 512, k)
        scale = problem.weights.scale[:3].clone()
        scale[0] = float("nan")
        weights = problem.weights._replace(values=problem.weights.values[:3], scale=scale, indices=indices)
        of_rows = problem.rows.scale.clone()
        for begin, count in (problem.spans[1], problem.spans[3], (467, 3)):
            of_rows[begin : begin + count] = float("nan")
        columns = 512 if activation is None else 256
        epilogue = Epilogue(None, Activation(activation)) if activation else Epilogue()
        out = poisoned((problem.num_rows, columns), torch.float16, DEVICE)
        gemm.grouped_gemm(problem.rows._replace(scale=of_rows), weights, epilogue, out=out)
        assert (out[100:164] == 0).all() and (out[197:397] == 0).all(), name
        assert not out[:467].isnan().any() and out[467:].isnan().all(), name
        problem = replace(problem, weights=weights, epilogue=epilogue)
        assert torch.equal(out[:467], check(problem, name)[:467]), name


@pytest.mark.parametrize("kind", ["half", "fp8"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_weight_indices(every_tile: Each, kind: str, dtype: torch.dtype) -> None:
    """Groups choose their weights, several the same; a negative one gives zeros in spite of a bias and of NaN."""
    indices = torch.tensor([2, 1, -1, 2, 0, -1], dtype=dtype, device=DEVICE)
    for name in every_tile(16 if kind == "half" else 8):
        problem = (plain if kind == "half" else fp8_blocks)([20, 0, 133, 7, 200, 64], 256, 256)
        weights = problem.weights._replace(
            values=problem.weights.values[:3],
            scale=None if problem.weights.scale is None else problem.weights.scale[:3],
            indices=indices,
        )
        problem.rows.values.view(torch.uint8)[20:153] = 0x7F  # NaN in e4m3 and fp16
        problem = replace(problem, weights=weights)
        wanted = problem.rows.values.clone()
        out = poisoned((problem.num_rows, 256), torch.float16, DEVICE)
        gemm.grouped_gemm(problem.rows, weights, Epilogue(normal(3, 256)), out=out)
        assert (out[20:153] == 0).all() and (out[360:424] == 0).all(), name
        wanted.view(torch.uint8)[20:153] = 0
        check(replace(problem, rows=problem.rows._replace(values=wanted), epilogue=Epilogue(normal(3, 256))), name)


@pytest.mark.parametrize("groups", [1, 2, 31, 32, 33, 64, 129, 256, 257, 700])
def test_numbers_of_groups(every_tile: Each, rng: random.Random, groups: int) -> None:
    """Up to 32, up to 256 and more of them are looked up in different ways."""
    weights = normal(4, 72, 64)
    indices = torch.randint(0, 4, (groups,), device=DEVICE)
    sizes = [rng.choice([0, 0, 1, 2, 30, 140]) for _ in range(groups)]
    for name in every_tile(16):
        check(replace(plain(sizes, 72, 64), weights=Weights(weights, indices)), name)


@pytest.mark.parametrize("room", [20, 128, 150, 200])
@pytest.mark.parametrize("bits", [16, 8])
def test_padded_groups(every_tile: Each, bits: int, room: int) -> None:
    lengths = [room, 0, 1, room // 2, room - 1]
    spans = [(g * room, n) for g, n in enumerate(lengths)]
    for name in every_tile(bits):
        problem = (plain if bits == 16 else fp8_blocks)([room] * 4 + [room - 3], 256, 256)
        problem = replace(problem, spans=spans)
        rows = problem.rows._replace(indptr=None, lengths=torch.tensor(lengths, device=DEVICE))
        check(replace(problem, rows=rows), name)
        full = replace(problem, spans=[(g * room, room) for g in range(5)])
        check(replace(full, rows=rows._replace(lengths=None)), name)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128, 1000])
def test_one_group(every_tile: Each, rows: int) -> None:
    for bits in (16, 8):
        for name in every_tile(bits):
            problem = (plain if bits == 16 else fp8_blocks)([rows - 3] if rows > 3 else [rows], 384, 384)
            count = problem.num_rows
            one = problem.rows._replace(indptr=None)
            check(replace(problem, rows=one, spans=[(0, count)]), f"{name}, {bits} bits")


def test_views(every_tile: Each) -> None:
    """Rows, weights and result are parts of larger tensors."""
    for name in every_tile(16):
        problem = plain([130, 0, 64, 9], 200, 136)
        wide_x, wide_w = normal(problem.num_rows, 200), normal(4, 300, 264)
        rows = problem.rows._replace(values=wide_x[:, 8:144])
        weights = Weights(wide_w[:, 4:204, 16:152])
        problem = replace(problem, rows=rows, weights=weights)
        room = poisoned((problem.num_rows, 264), torch.float16, DEVICE)
        gemm.grouped_gemm(rows, weights, out=room[:, 8:208])
        inside = room[:, 8:208]
        assert torch.equal(inside.isnan(), expected(problem, torch.float64).isnan()), name
        assert room[:, :8].isnan().all() and room[:, 208:].isnan().all(), name
        assert torch.equal(inside[:203], check(problem, name)[:203])


def test_not_a_number_stays_in_its_row(every_tile: Each) -> None:
    for name in every_tile(16):
        problem = plain([5, 140, 3], 136, 128)
        for row, value in ((4, float("nan")), (5, float("inf")), (144, float("-inf")), (145, float("nan"))):
            problem.rows.values[row, 7] = value
        problem.weights.values[:, :, 7] = 1.0
        check(problem, name)


RANDOM = [("half", tile) for tile in ("128x256", "128x256t", "64x256", "64x128x2", "swap32", "swap16")]
RANDOM += [("fp8", tile) for tile in ("128x256", "128x64", "64x128", "64x64")]


@pytest.mark.parametrize(("kind", "name"), RANDOM)
def test_random_splits(kind: str, name: str, rng: random.Random, taking: str) -> None:
    """250 splits of each kernel, one launch after another without a wait, then each judged."""
    groups, total, n, k = rng.choice([3, 17, 60]), 2000, 264 if kind == "half" else 256, 128
    base = (plain if kind == "half" else fp8_blocks)([total // groups] * groups, n, k)
    values = base.rows.values
    problems, outs = [], []
    with imposed(tiles(16 if kind == "half" else 8)[name]):
        for _ in range(250):
            sizes = splits(rng, groups, total // groups * groups)
            ends = [sum(sizes[: i + 1]) for i in range(groups)]
            indptr = torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)
            spans = [(end - size, size) for end, size in zip(ends, sizes, strict=True)]
            problems.append(replace(base, rows=base.rows._replace(indptr=indptr), spans=spans))
            outs.append(poisoned((values.shape[0], n), torch.float16, DEVICE))
            gemm.grouped_gemm(problems[-1].rows, base.weights, out=outs[-1])
    every = every_product(base)
    for problem, out in zip(problems, outs, strict=True):
        wanted = torch.full_like(every[0], float("nan"))
        for group, (begin, count) in enumerate(problem.spans):
            wanted[begin : begin + count] = every[group, begin : begin + count]
        assert torch.equal(out.isnan(), wanted.isnan()), problem.spans
        error = (out.double() - wanted).nan_to_num().abs().amax()
        assert error <= bound(every, k), problem.spans


def every_product(base: Problem) -> torch.Tensor:
    """`[groups, rows, columns]`: all rows with all weights, in fp64."""
    num_rows, groups = base.num_rows, base.weights.values.shape[0]
    whole = replace(base, spans=[(0, num_rows)])
    one = []
    for group in range(groups):
        chosen = torch.tensor([group], device=DEVICE)
        one.append(expected(replace(whole, weights=base.weights._replace(indices=chosen)), torch.float64))
    return torch.stack(one)


def bound(every: torch.Tensor, k: int) -> float:
    """Rounding to fp16 of the largest result, and sums of k products in fp32 (fp8: 14 bits of 128 products' sum)."""
    largest = float(every.abs().amax())
    return largest * (torch.finfo(torch.float16).eps + 2.0**-13) + k * torch.finfo(torch.float32).eps * largest


def test_repeats_bit_for_bit(every_tile: Each, taking: str) -> None:
    """A race would show as a difference."""
    for bits in (16, 8):
        problem = (plain if bits == 16 else fp8_blocks)([400, 1000, 7, 0, 600, 64], 2048, 1024)
        for name in every_tile(bits):
            first = gemm.grouped_gemm(problem.rows, problem.weights)[:2071]
            for _ in range(10):
                assert torch.equal(first, gemm.grouped_gemm(problem.rows, problem.weights)[:2071]), name


def test_launches_wait_for_each_other(taking: str) -> None:
    """Programs are set up while the launch before runs; its results are the rows of the next."""
    weights = Weights(normal(4, 256, 256) / 16)
    indptr = torch.tensor([0, 300, 300, 900, 1100], dtype=torch.int32, device=DEVICE)
    for name, tile in tiles(16).items():
        results = []
        for waits in (True, False, False):
            x = torch.ones(1100, 256, dtype=torch.float16, device=DEVICE)
            with imposed(tile):
                for _ in range(30):
                    x = gemm.grouped_gemm(Rows(x, indptr), weights)
                    if waits:
                        torch.cuda.synchronize()
            results.append(x)
        assert all(torch.equal(results[0], x) for x in results[1:]), name


@pytest.mark.parametrize("side", ["rows", "weights", "out"])
def test_offsets_past_two_to_the_31(side: str) -> None:
    check_far(side)


@pytest.mark.parametrize(("name", "others", "n"), [("64x256", 0, 256), ("128x256", 16, 2048), ("128x256t", 16, 2048)])
def test_graph_replays_with_other_group_sizes(name: str, others: int, n: int, taking: str) -> None:
    """Of many groups, too, whose tiles are counted as programs take them: each replay counts anew."""
    with imposed(tiles(16)[name]):
        check_replays([0] * others, n)


@pytest.mark.parametrize("kind", ["half", "fp8"])
def test_repeated_calls_count_anew(kind: str, taking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that are only launched again, with other tensors: all tiles once, whoever takes them."""
    make = plain if kind == "half" else fp8_blocks
    replay.forget()
    for repeated in range(3):
        problem = make([150] * 24, 2048, 256)
        out = poisoned((problem.num_rows, 2048), torch.float16, DEVICE)
        if repeated:
            with monkeypatch.context() as patch:
                patch.setattr(gemm, "multiply", None)
                gemm.grouped_gemm(problem.rows, problem.weights, out=out)
        else:
            gemm.grouped_gemm(problem.rows, problem.weights, out=out)
        assert torch.equal(out[: 150 * 24], check(problem)[: 150 * 24])
    replay.forget()


def check_replays(others: list[int], n: int) -> None:
    problem = plain([40, 60, 0, 100, *others], n, 128, torch.bfloat16)
    out = torch.empty(problem.num_rows, n, dtype=torch.bfloat16, device=DEVICE)
    graph = captured(lambda: gemm.grouped_gemm(problem.rows, problem.weights, out=out))
    for sizes in ([200, 0, 0, 0], [0, 1, 198, 1], [150, 50, 0, 0], [50, 50, 50, 50], [0, 0, 0, 0]):
        fresh = plain([*sizes, *others], n, 128, torch.bfloat16)
        problem.rows.indptr.copy_(fresh.rows.indptr)
        problem.spans = fresh.spans
        out.fill_(float("nan"))
        graph.replay()
        wanted = expected(problem, torch.float64)
        assert torch.equal(out.isnan(), wanted.isnan())
        count = sum(sizes)
        assert torch.equal(out[:count], gemm.grouped_gemm(problem.rows, problem.weights)[:count])
        check(problem)


def test_does_not_wait_for_the_device() -> None:
    problem = plain([40, 60, 0, 100], 256, 128, torch.bfloat16)
    gated = Epilogue(None, Activation("swiglu"))
    for epilogue in (Epilogue(), gated):
        gemm.grouped_gemm(problem.rows, problem.weights, epilogue)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for epilogue in (Epilogue(), gated):
            gemm.grouped_gemm(problem.rows, problem.weights, epilogue)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_takes_it_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "gemm", "auto")
    indices = torch.zeros(7, dtype=torch.int32, device=DEVICE)
    for k, rows, name in ((72, None, BACKEND), (64, indices, BACKEND), (72, indices, "triton")):
        given = Rows(normal(7, k), torch.tensor([0, 7], dtype=torch.int32, device=DEVICE), rows)
        out = torch.empty(7, 64, dtype=torch.float16, device=DEVICE)
        spec = gemm.Gemm(out, given, Weights(normal(1, 64, k)), Epilogue()).spec
        assert name in gemm.CHOICE.module(spec, out.device).__name__
