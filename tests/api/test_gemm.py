"""The public products: shapes, layouts of scales, results and errors, on the CPU and on a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

import flashinfer
from flashinfer import deep_gemm, gemm, grouped_mm
from flashinfer.testing import assert_close_to_oracle, poisoned
from tests.ops.common import DEVICE
from tests.ops.gemm_checks import E4M3, Problem, drawn_sizes, expected, fp8_blocks, normal, ragged

BF16 = torch.bfloat16
E5M2 = torch.float8_e5m2


def judge(out: torch.Tensor, exact: torch.Tensor, single: torch.Tensor) -> None:
    """exact in fp64, single in fp32."""
    assert_close_to_oracle(out, exact, single.to(out.dtype))


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return a.to(dtype) @ b.to(dtype)


def judge_problem(out: torch.Tensor, problem: Problem) -> None:
    judge(out, expected(problem, torch.float64), expected(problem, torch.float32))


# ---- dense


@pytest.mark.parametrize("out_dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("given_out", [False, True])
def test_mm_bf16(out_dtype: torch.dtype, with_bias: bool, given_out: bool) -> None:
    a, b = normal(9, 64, dtype=BF16), normal(40, 64, dtype=BF16).t()
    bias = normal(40, dtype=BF16) if with_bias else None
    out = poisoned((9, 40), out_dtype, DEVICE) if given_out else None
    got = flashinfer.mm_bf16(a, b, bias, out=out, out_dtype=out_dtype)
    assert out is None or got is out
    shift = 0 if bias is None else bias
    judge(got, product(a, b, torch.float64) + shift, product(a, b, torch.float32) + shift)


@pytest.mark.parametrize("out_dtype", [BF16, torch.float16])
def test_bmm_bf16(out_dtype: torch.dtype) -> None:
    a, b = normal(3, 9, 64, dtype=BF16), normal(3, 40, 64, dtype=BF16).transpose(1, 2)
    judge(flashinfer.bmm_bf16(a, b, out_dtype=out_dtype), *(product(a, b, d) for d in (torch.float64, torch.float32)))


@pytest.mark.parametrize("with_bias", [False, True])
def test_tinygemm_bf16(with_bias: bool) -> None:
    x, w = normal(3, 64, dtype=BF16), normal(40, 64, dtype=BF16)
    bias = normal(40, dtype=BF16) if with_bias else None
    out = poisoned((3, 40), BF16, DEVICE)
    gemm.tinygemm_bf16(x, w, out, bias)
    shift = 0 if bias is None else bias
    judge(out, product(x, w.t(), torch.float64) + shift, product(x, w.t(), torch.float32) + shift)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_bmm_fp8(batch: int, dtypes: tuple[torch.dtype, torch.dtype], dtype: torch.dtype, strided: bool) -> None:
    a, b = normal(batch, 20, 96, dtype=dtypes[0]), normal(batch, 48, 96, dtype=dtypes[1]).transpose(1, 2)
    out = None
    if strided:  # heads of tokens, as absorbed attention has them
        a = normal(20, batch, 96, dtype=dtypes[0]).transpose(0, 1)
        out = poisoned((20, batch, 48), dtype, DEVICE).transpose(0, 1)
    a_scale, b_scale = torch.tensor(0.5, device=DEVICE), torch.tensor([0.3], device=DEVICE)
    got = flashinfer.bmm_fp8(a, b, a_scale, b_scale, dtype, out)
    assert out is None or got is out
    exact, single = (product(a, b, d) * a_scale.to(d) * b_scale.to(d) for d in (torch.float64, torch.float32))
    judge(got, exact, single)


def test_functions_tell_their_backends() -> None:
    assert flashinfer.mm_bf16.is_backend_supported("cudnn", 90)
    assert not flashinfer.mm_bf16.is_backend_supported("nothing", 90)
    assert flashinfer.bmm_fp8.is_compute_capability_supported(90)


# ---- grouped


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("by", ["seg_lens", "seg_indptr"])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_segments(rng: random.Random, column_major: bool, by: str, indexed: bool, dtype: torch.dtype) -> None:
    sizes = drawn_sizes(rng, 5, 40)
    indptr, spans, nnz = ragged(sizes)
    x, stored = normal(nnz, 24, dtype=dtype), normal(3 if indexed else 5, 40, 24, dtype=dtype)
    weights = stored if column_major else stored.transpose(1, 2).contiguous()
    wrapper = flashinfer.SegmentGEMMWrapper(torch.empty(16, dtype=torch.uint8, device=DEVICE))
    bounds = indptr.long() if by == "seg_indptr" else torch.tensor(sizes, device=DEVICE)
    options = {by: bounds, "weight_indices": torch.tensor([2, 0, 1, 1, 2], device=DEVICE) if indexed else None}
    got = wrapper.run(x, weights, 5, column_major, **options)
    again = wrapper.forward(x, weights, 5, column_major, out=torch.empty_like(got), **options)
    assert torch.equal(got, again)
    from flashinfer.ops.gemm import Rows, Weights

    judge_problem(got, Problem(Rows(x, indptr), Weights(stored, options["weight_indices"]), spans, nnz))


@pytest.mark.parametrize("out_dtype", [BF16, torch.float16, torch.float32])
def test_grouped_mm_bf16(rng: random.Random, out_dtype: torch.dtype) -> None:
    from flashinfer.ops.gemm import Rows, Weights

    indptr, spans, nnz = ragged(drawn_sizes(rng, 4, 50), spare=3)
    a, b = normal(nnz, 32, dtype=BF16), normal(4, 48, 32, dtype=BF16)
    out = poisoned((nnz, 48), out_dtype, DEVICE)
    assert flashinfer.grouped_mm_bf16(a, b, indptr, out, out_dtype) is out
    judge_problem(out, Problem(Rows(a, indptr), Weights(b), spans, nnz))


@pytest.mark.parametrize("alphas", [None, 1, 4])
def test_grouped_mm_fp8(rng: random.Random, alphas: int | None) -> None:
    from flashinfer.ops.gemm import Rows, Weights

    indptr, spans, nnz = ragged(drawn_sizes(rng, 4, 50))
    a, b = normal(nnz, 32, dtype=E4M3), normal(4, 48, 32, dtype=E4M3)
    alpha = None if alphas is None else torch.rand(alphas, device=DEVICE) + 0.5
    weights = Weights(b, kind="fp8_tensor", global_scale=alpha)
    judge_problem(flashinfer.grouped_mm_fp8(a, b, indptr, alpha), Problem(Rows(a, indptr), weights, spans, nnz))


# ---- block-scaled fp8


def turned(scale: torch.Tensor, mode: str) -> torch.Tensor:
    return scale if mode == "K" else scale.transpose(-1, -2).contiguous()


@pytest.mark.parametrize("mode", ["K", "MN"])
@pytest.mark.parametrize("granularity", [(1, 128, 128), (128, 128, 128), (1, 1, 128)])
def test_groupwise(mode: str, granularity: tuple[int, int, int]) -> None:
    p = fp8_blocks([150], 136, 256, *granularity[:2])
    a, row_scale = p.rows.values[:150], p.rows.scale[: -(-150 // granularity[0])]
    scales = turned(row_scale, mode), turned(p.weights.scale[0], mode)
    got = gemm.gemm_fp8_nt_groupwise(a, p.weights.values[0], *scales, mode, 1, granularity)
    judge(got, expected(p, torch.float64)[:150], expected(p, torch.float32)[:150])
    if granularity == (128, 128, 128):
        again = gemm.gemm_fp8_nt_blockscaled(a, p.weights.values[0], *scales, mode)
        assert torch.equal(got, again)


def test_groupwise_without_a_mode_goes_by_shape_and_strides() -> None:
    """As many rows as blocks of columns: how the scales lie decides."""
    p = fp8_blocks([2, 0], 256, 256)
    a, b, row_scale, scale = p.rows.values[:2], p.weights.values[0], p.rows.scale[:2], p.weights.scale[0]
    wanted = gemm.gemm_fp8_nt_groupwise(a, b, row_scale, scale, "K")
    side_by_side = row_scale.t().contiguous()
    for given in (side_by_side, side_by_side.t()):
        for given_b in (scale, scale.t()):
            assert torch.equal(gemm.gemm_fp8_nt_groupwise(a, b, given, given_b, backend="trtllm"), wanted)


@pytest.mark.parametrize("mode", ["K", "MN"])
def test_group_groupwise(rng: random.Random, mode: str) -> None:
    p = fp8_blocks(drawn_sizes(rng, 4, 40), 136, 256)
    scales = turned(p.rows.scale, mode), turned(p.weights.scale, mode)
    out = poisoned((p.num_rows, 136), BF16, DEVICE)
    gemm.group_gemm_fp8_nt_groupwise(
        p.rows.values, p.weights.values, *scales, p.rows.indptr, scale_major_mode=mode, out=out
    )
    judge_problem(out, p)


@pytest.mark.parametrize("tail", [0, 40])
@pytest.mark.parametrize("call", ["group_deepgemm", "contiguous"])
def test_rows_that_name_their_group(tail: int, call: str) -> None:
    p = fp8_blocks([256, 128, 128, tail] if tail else [256, 128, 128], 72, 256)
    owner = torch.tensor([2, 1, -1] + [0] * bool(tail), device=DEVICE, dtype=torch.int32)
    sizes = torch.tensor([n for _, n in p.spans], device=DEVICE)
    m = int(sizes.sum())
    p.weights = p.weights._replace(indices=owner)
    m_indices = owner.repeat_interleave(sizes)
    a, a_scale = p.rows.values[:m], p.rows.scale[:m]
    out = poisoned((m, 72), BF16, DEVICE)
    if call == "contiguous":
        pairs = (a, a_scale), (p.weights.values, p.weights.scale)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(*pairs, out, m_indices)
    else:
        pair = p.weights.values, a_scale, p.weights.scale
        assert gemm.group_deepgemm_fp8_nt_groupwise(a, *pair, m_indices, out=out) is out
    judge(out, expected(p, torch.float64)[:m], expected(p, torch.float32)[:m])


@pytest.mark.parametrize("expected_m", [1, 40, 200])
@pytest.mark.parametrize("call", ["batch_deepgemm", "masked"])
def test_masked_groups(expected_m: int, call: str) -> None:
    from flashinfer.ops.gemm import Rows

    p = fp8_blocks([64] * 3, 72, 256)
    masked_m = torch.tensor([64, 0, 17], device=DEVICE, dtype=torch.int32)
    values, scale = p.rows.values[:192], p.rows.scale[:192]
    p.rows, p.num_rows, p.spans = Rows(values, None, None, scale), 192, [(0, 64), (64, 0), (128, 17)]
    a, a_scale = values.view(3, 64, 256), scale.view(3, 64, 2)
    out = poisoned((3, 64, 72), BF16, DEVICE)
    if call == "masked":
        pairs = (a, a_scale), (p.weights.values, p.weights.scale)
        deep_gemm.m_grouped_fp8_gemm_nt_masked(*pairs, out, masked_m, expected_m)
    else:
        gemm.batch_deepgemm_fp8_nt_groupwise(
            a, p.weights.values, a_scale, p.weights.scale, masked_m, expected_m, out=out
        )
    judge_problem(out.view(192, 72), p)


@pytest.mark.parametrize("rows_per_scale", [1, 128])
def test_blockscale_sm90_of_fp8(rows_per_scale: int) -> None:
    p = fp8_blocks([33], 192, 256, 1, rows_per_scale)
    a, a_scale = p.rows.values[:33], p.rows.scale[:33]
    got = gemm.fp8_blockscale_gemm_sm90(a, p.weights.values[0], a_scale, p.weights.scale[0])
    judge(got, expected(p, torch.float64)[:33], expected(p, torch.float32)[:33])


@pytest.mark.parametrize("weight_dtype", [BF16, E4M3])
def test_blockscale_sm90_quantises(weight_dtype: torch.dtype) -> None:
    """bf16 comes out as the product of what `per_token_group_quant_8bit` makes of it."""
    x, w = normal(33, 256, dtype=BF16), normal(192, 256, dtype=BF16)
    codes, scale = flashinfer.quantization.per_token_group_quant_8bit(x, 128)
    w_codes, w_scale = flashinfer.quantization.per_token_group_quant_8bit(w, 128)
    wanted = gemm.fp8_blockscale_gemm_sm90(codes, w_codes, scale, w_scale)
    given = (w, None, None) if weight_dtype == BF16 else (w_codes, None, w_scale)
    assert torch.equal(gemm.fp8_blockscale_gemm_sm90(x, *given), wanted)
    error = (wanted.double() - x.double() @ w.double().t()).abs().max() / (x.double() @ w.double().t()).abs().max()
    assert error < 2**-4, "e4m3 has 3 mantissa bits"


# ---- fp4


def test_mm_bf16_fp4() -> None:
    n, k = 130, 96
    codes = torch.randint(0, 256, (n, k // 2), device=DEVICE).to(torch.uint8)
    scale = torch.rand(n, k // 16, device=DEVICE).to(E4M3)
    swizzled = flashinfer.nvfp4_block_scale_interleave(scale.view(torch.uint8))
    alpha = torch.tensor([0.7], device=DEVICE)
    prepared = flashinfer.prepare_bf16_fp4_weights(codes, swizzled, alpha, backend="cudnn")
    assert torch.equal(prepared[1].view(torch.uint8), scale.view(torch.uint8))
    a = normal(20, k, dtype=BF16)
    got = flashinfer.mm_bf16_fp4(a, *prepared, backend="cudnn")
    from flashinfer.ops.gemm import Rows, Weights

    weights = Weights(codes[None], scale=scale[None], kind="nvfp4", global_scale=alpha)
    judge_problem(got, Problem(Rows(a), weights, [(0, 20)], 20))


# ---- errors name the argument

X, W, PTR = normal(8, 128, dtype=BF16), normal(2, 64, 128, dtype=BF16), ragged([3, 5])[0]
X8, W8 = normal(8, 128, dtype=E4M3), normal(2, 64, 128, dtype=E4M3)
ONE = torch.ones(8, 1, device=DEVICE)
SEGMENT = flashinfer.SegmentGEMMWrapper(torch.empty(1, device=DEVICE))
WRONG: dict[str, tuple[str, Callable[[], object]]] = {
    "mm dtype": ("a", lambda: flashinfer.mm_bf16(X.half(), W[0].t())),
    "mm shape": ("b", lambda: flashinfer.mm_bf16(X, W[0])),
    "mm bias": ("bias", lambda: flashinfer.mm_bf16(X, W[0].t(), X[0])),
    "mm backend": ("backend", lambda: flashinfer.mm_bf16(X, W[0].t(), backend="mine")),
    "mm out": ("out", lambda: flashinfer.mm_bf16(X, W[0].t(), out=X)),
    "bmm scale": ("A_scale", lambda: flashinfer.bmm_fp8(X8[None], W8[:1].transpose(1, 2), ONE, ONE[:1], BF16)),
    "bmm rows": ("B", lambda: flashinfer.bmm_fp8(X8[None], normal(1, 128, 64, dtype=E4M3), ONE[0], ONE[0], BF16)),
    "segments": ("seg_lens", lambda: SEGMENT.run(X, W, 2, True)),
    "segment bounds": ("seg_indptr", lambda: SEGMENT.run(X, W, 2, True, seg_indptr=PTR[:2])),
    "segment depth": ("weights", lambda: SEGMENT.run(X, W, 2, False, seg_indptr=PTR)),
    "grouped bounds": ("m_indptr", lambda: grouped_mm.grouped_mm_bf16(X, W, PTR[:2])),
    "grouped dtype": ("b", lambda: grouped_mm.grouped_mm_bf16(X, W8, PTR)),
    "grouped alpha": ("alpha", lambda: grouped_mm.grouped_mm_fp8(X8, W8, PTR, ONE[:3, 0])),
    "scale shape": ("a_scale", lambda: gemm.gemm_fp8_nt_groupwise(X8, W8[0], ONE[:7], ONE[:1], "K")),
    "scale mode": ("scale_major_mode", lambda: gemm.gemm_fp8_nt_groupwise(X8, W8[0], ONE, ONE[:1], "N")),
    "granularity": (
        "scale_granularity_mnk",
        lambda: gemm.gemm_fp8_nt_groupwise(X8, W8[0], ONE, ONE[:1], "K", 1, (1, 64, 128)),
    ),
    "sm90 weight": ("weight", lambda: gemm.fp8_blockscale_gemm_sm90(X8, W[0], ONE)),
    "sm90 scale": ("weight_scale", lambda: gemm.fp8_blockscale_gemm_sm90(X, W8[0])),
    "sm90 unwanted": ("input_scale", lambda: gemm.fp8_blockscale_gemm_sm90(X, W[0], ONE)),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument(case: str) -> None:
    name, call = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=f"^{name}"):
        call()


@pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not read")
def test_bounds_past_the_rows_are_refused_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="indptr"):
        grouped_mm.grouped_mm_bf16(X[:7], W, PTR)
    with pytest.raises(ValueError, match="weight indices"):
        SEGMENT.run(X, W, 2, True, seg_indptr=PTR, weight_indices=torch.tensor([0, 2]))


# ---- torch.compile


def test_a_layer_compiles_whole() -> None:
    def layer(x: torch.Tensor, w: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
        return flashinfer.grouped_mm_bf16(x, w, indptr).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    indptr = PTR if DEVICE == "cuda" else PTR.clone()
    assert torch.equal(compiled(X, W, indptr), layer(X, W, indptr))
