"""What tests of grouped products share: problems, and what they come to by plain loops, from the contract alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from flashinfer.ops import gemm
from flashinfer.ops.gemm import Activation, Epilogue, Rows, Weights
from flashinfer.testing import assert_close_to_oracle, poisoned
from flashinfer.testing.oracle import SEQUENTIAL_SUM
from tests.ops.common import DEVICE

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP4_BLOCK = {"mxfp4": 32, "nvfp4": 16}


@dataclass
class Problem:
    """A product and its groups: (first row, number of rows) of each."""

    rows: Rows
    weights: Weights
    spans: list[tuple[int, int]]
    num_rows: int
    epilogue: Epilogue = field(default_factory=Epilogue)
    out_dtype: torch.dtype = torch.float16

    @property
    def out_cols(self) -> int:
        activation, n = self.epilogue.activation, self.weights.values.shape[1]
        return n // 2 if activation is not None and activation.gated else n


def ragged(sizes: list[int], spare: int = 0) -> tuple[torch.Tensor, list[tuple[int, int]], int]:
    """indptr, spans, and rows with `spare` more behind the last group."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    indptr = torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)
    return indptr, [(end - n, n) for end, n in zip(ends, sizes, strict=True)], ends[-1] + spare


def drawn_sizes(rng: random.Random, groups: int, most: int) -> list[int]:
    """Group sizes with empty ones among them."""
    return [rng.choice([0, 1, rng.randrange(most + 1)]) for _ in range(groups)]


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def plain(sizes: list[int], n: int, k: int, dtype: torch.dtype = torch.float16) -> Problem:
    """16- or 32-bit rows and weights, a matrix for each group, and rows that no group owns."""
    indptr, spans, num_rows = ragged(sizes, spare=3)
    x, w = normal(num_rows, k, dtype=dtype), normal(len(sizes), n, k, dtype=dtype)
    return Problem(Rows(x, indptr), Weights(w), spans, num_rows, out_dtype=dtype)


def fp8_blocks(sizes: list[int], n: int, k: int, scale_rows: int = 1, scale_cols: int = 128) -> Problem:
    indptr, spans, num_rows = ragged(sizes, spare=3)
    x, w = normal(num_rows, k, dtype=E4M3), normal(len(sizes), n, k, dtype=E4M3)
    blocks = -(-k // 128)
    row_scale = torch.rand(-(-num_rows // scale_rows), blocks, device=DEVICE) + 0.5
    scale = torch.rand(len(sizes), -(-n // scale_cols), blocks, device=DEVICE) + 0.5
    rows, weights = Rows(x, indptr, scale=row_scale), Weights(w, scale=scale, kind="fp8_block")
    return Problem(rows, weights, spans, num_rows)


def fp4(kind: str, sizes: list[int], n: int, k: int, dtype: torch.dtype = torch.float16) -> Problem:
    indptr, spans, num_rows = ragged(sizes, spare=3)
    codes = torch.randint(0, 256, (len(sizes), n, k // 2), device=DEVICE).to(torch.uint8)
    if kind == "mxfp4":
        scale = torch.randint(117, 127, (len(sizes), n, k // 32), device=DEVICE).to(torch.uint8)
        weights = Weights(codes, scale=scale, kind=kind)
    else:
        scale = torch.rand(len(sizes), n, k // 16, device=DEVICE).to(E4M3)
        weights = Weights(codes, scale=scale, kind=kind, global_scale=torch.rand(len(sizes), device=DEVICE) + 0.5)
    return Problem(Rows(normal(num_rows, k, dtype=dtype), indptr), weights, spans, num_rows, out_dtype=dtype)


# ---- what it comes to


def _matrix(weights: Weights, index: int, dtype: torch.dtype) -> torch.Tensor:
    values = weights.values[index]
    if weights.kind in FP4_BLOCK:
        numbers = torch.empty(values.shape[0], 2 * values.shape[1], dtype=dtype)
        for half, codes in enumerate((values & 15, values >> 4)):
            sign = 1 - 2 * (codes >> 3).to(dtype).cpu()
            numbers[:, half::2] = sign * E2M1.to(dtype)[(codes & 7).long().cpu()]
        scale = weights.scale[index].cpu()
        powers = torch.exp2(scale.to(dtype) - 127).masked_fill(scale.view(torch.uint8) == 255, torch.nan)
        factor = powers if weights.kind == "mxfp4" else scale.to(dtype)
        return (numbers * factor.repeat_interleave(FP4_BLOCK[weights.kind], 1)).to(values.device)
    numbers = values.to(dtype)
    if weights.kind == "fp8_block":
        scale = weights.scale[index].to(dtype)
        column = torch.arange(numbers.shape[0], device=DEVICE) * scale.shape[0] // numbers.shape[0]
        if scale.shape[0] < numbers.shape[0]:
            column = torch.arange(numbers.shape[0], device=DEVICE) // 128
        numbers = numbers * scale[column].repeat_interleave(128, 1)[:, : numbers.shape[1]]
    return numbers


def _finish(y: torch.Tensor, epilogue: Epilogue, index: int, row_weights: torch.Tensor | None) -> torch.Tensor:
    if epilogue.bias is not None:
        y = y + epilogue.bias[index].to(y.dtype)
    activation = epilogue.activation
    if activation is not None and activation.gated:
        half = y.shape[1] // 2
        up, gate = y[:, :half], y[:, half:]
        if activation.kind == "geglu":
            y = torch.nn.functional.gelu(gate) * up
        else:
            given = activation.alpha, activation.beta, activation.limit
            alpha, beta, limit = (None if t is None else t[index].to(y.dtype) for t in given)
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            y = gate * torch.sigmoid(gate * (1 if alpha is None else alpha)) * (up + (0 if beta is None else beta))
    elif activation is not None:
        functions = {
            "relu": torch.relu,
            "relu2": lambda x: torch.relu(x) ** 2,
            "silu": torch.nn.functional.silu,
            "gelu": torch.nn.functional.gelu,
            "identity": lambda x: x,
        }
        y = functions[activation.kind](y)
    return y if row_weights is None else y * row_weights.to(y.dtype)[:, None]


# fp32 sums, in whatever order: see there. The tensor cores of Hopper keep about 14 bits of the sums of fp8 products
# (DeepSeek-V3, arXiv 2412.19437, section 3.5.2), so each may be off by 2^-13 of their magnitudes.
ORDER = SEQUENTIAL_SUM * torch.finfo(torch.float32).eps
FP8_SUMS = 2.0**-13


def wiggled(function: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """How far `function(y)` moves where y moves by up to `by`; both halves of a row, up and gate, to either side."""
    exact, half = function(y), y.shape[1] // 2
    side = torch.arange(y.shape[1], device=y.device) < half
    moves = [torch.where(side, a, b) * by for a in (1.0, -1.0) for b in (1.0, -1.0)]
    return torch.stack([(function(y + move) - exact).abs() for move in moves]).amax(0)


def expected(problem: Problem, dtype: torch.dtype, noise: bool = False) -> torch.Tensor:
    """The product in `dtype`; NaN where no group owns the row. noise: instead, what the order of sums may change."""
    rows, weights = problem.rows, problem.weights
    on_fp8 = rows.values.dtype.itemsize == 1 and DEVICE == "cuda"
    result = torch.full((problem.num_rows, problem.out_cols), float("nan"), dtype=dtype, device=DEVICE)
    for group, (begin, count) in enumerate(problem.spans):
        index = group if weights.indices is None else int(weights.indices[group])
        if index < 0:
            result[begin : begin + count] = 0
            continue
        source = torch.arange(begin, begin + count, device=DEVICE)
        if rows.indices is not None:
            source = rows.indices[begin : begin + count].long()
        x = rows.values.to(dtype)[source]
        if weights.kind == "fp8_block":
            shared = 1 if rows.scale.shape[0] == rows.values.shape[0] else 128
            x = x * rows.scale.to(dtype)[source // shared].repeat_interleave(128, 1)[:, : x.shape[1]]
        matrix = _matrix(weights, index, dtype).T
        y, size = x @ matrix, x.abs() @ matrix.abs() * (FP8_SUMS if on_fp8 else ORDER)
        if weights.kind == "fp8_tensor" and rows.scale is not None:
            y, size = y * rows.scale.to(dtype).item(), size * rows.scale.to(dtype).item()
        for factor in filter(lambda t: t is not None, (weights.global_scale,)):
            one = factor.to(dtype)[index if factor.numel() > 1 else 0]
            y, size = y * one, size * one.abs()
        row_weights = problem.epilogue.row_weights
        chosen = None if row_weights is None else row_weights[begin : begin + count]
        finish = partial(_finish, epilogue=problem.epilogue, index=index, row_weights=chosen)
        result[begin : begin + count] = wiggled(finish, y, size) if noise else finish(y)
    return result


def check(problem: Problem, name: str = "") -> torch.Tensor:
    """Run it into a poisoned `out` and compare everything, what must stay untouched included."""
    out = poisoned((problem.num_rows, problem.out_cols), problem.out_dtype, DEVICE)
    returned = gemm.grouped_gemm(problem.rows, problem.weights, problem.epilogue, out=out)
    assert returned is out
    oracle, twin = expected(problem, torch.float64), expected(problem, torch.float32)
    noise = expected(problem, torch.float64, noise=True)
    assert_close_to_oracle(out, oracle, twin.to(problem.out_dtype), name, noise)
    return out


def check_far(side: str) -> None:
    """`check` a product whose "rows", "weights" or "out" span more than 2^31 elements, 4 GiB of memory."""
    stride = 2**24
    rows = 2**31 // stride + 2
    problem = replace(plain([rows - 5, 5], 48, 64), num_rows=rows)
    problem.rows = problem.rows._replace(values=problem.rows.values[:rows])
    if side == "rows":
        far = torch.empty(rows * stride, dtype=torch.float16, device=DEVICE).as_strided((rows, 64), (stride, 1))
        problem.rows = problem.rows._replace(values=far.copy_(normal(rows, 64)))
    if side == "weights":
        far = torch.empty(2**31 + 48 * 64, dtype=torch.float16, device=DEVICE)
        problem.weights = Weights(far.as_strided((2, 48, 64), (2**31, 64, 1)).copy_(problem.weights.values))
    if side == "out":
        out = torch.empty(rows * stride, dtype=torch.float16, device=DEVICE).as_strided((rows, 48), (stride, 1))
        gemm.grouped_gemm(problem.rows, problem.weights, out=out)
        assert torch.equal(out, check(problem))
    check(problem)


def with_epilogue(problem: Problem, activation: str, bias: bool, row_weights: bool, parameters: bool) -> Problem:
    count, n = problem.weights.values.shape[:2]
    drawn = [torch.rand(count, device=DEVICE) + 0.5 for _ in range(3)] if parameters else []
    epilogue = Epilogue(
        normal(count, n, dtype=problem.out_dtype) if bias else None,
        Activation(activation, *drawn) if activation else None,
        torch.rand(problem.num_rows, device=DEVICE) if row_weights else None,
    )
    return replace(problem, epilogue=epilogue)
