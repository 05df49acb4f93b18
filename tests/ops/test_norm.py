"""Norms against fp64, with torch's own norms in the same dtype as the measure."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from flashinfer.core.select import BackendSupportedError
from flashinfer.norm import (
    fused_add_rmsnorm,
    fused_add_rmsnorm_quant,
    gemma_fused_add_rmsnorm,
    gemma_rmsnorm,
    layernorm,
    layernorm_quant,
    rmsnorm,
    rmsnorm_quant,
)
from flashinfer.ops import norm as ops
from flashinfer.testing import assert_close_to_oracle, poisoned
from tests.ops.common import captured, far_rows, force_backend, skip_unless_runs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SHAPES = ((5, 1), (3, 7), (0, 64), (33, 576), (1, 4096), (40, 577), (3, 5, 72), (2, 0, 8))
EPS = 1e-5
RMSNORMS = {"rmsnorm": (rmsnorm, 0.0), "gemma": (gemma_rmsnorm, 1.0)}
FUSED = {"rmsnorm": (fused_add_rmsnorm, 0.0), "gemma": (gemma_fused_add_rmsnorm, 1.0)}


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on each implementation, through the public functions."""
    force_backend(monkeypatch, ops, "normalise", request.param)
    return str(request.param)


def rms_oracle(x: torch.Tensor, weight: torch.Tensor, bias: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight.double() + bias)


def rms_twin(x: torch.Tensor, weight: torch.Tensor, bias: float) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], (weight + bias).to(x.dtype), EPS)


def layer_oracle(x: torch.Tensor, gemma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    centred = x.double() - x.double().mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * gemma + beta


@pytest.mark.parametrize("name", RMSNORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rmsnorm(name: str, dtype: torch.dtype, shape: tuple[int, ...], device: str, backend: str) -> None:
    skip_unless_runs(backend, dtype)
    norm, bias = RMSNORMS[name]
    x = (torch.randn(shape, device=device) * 3).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    oracle, twin = rms_oracle(x, weight, bias), rms_twin(x, weight, bias)
    assert_close_to_oracle(norm(x, weight, EPS), oracle, twin)
    out = poisoned(shape, dtype, device)
    assert norm(x, weight, EPS, out=out) is out
    assert_close_to_oracle(out, oracle, twin, "out=")
    assert norm(x, weight, EPS, out=x) is x
    assert_close_to_oracle(x, oracle, twin, "out=input")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 6, 41])
def test_rmsnorm_of_views(dtype: torch.dtype, tokens: int, device: str, backend: str) -> None:
    """Heads cut out of wider rows, tokens first and heads first, written to a part of something wider."""
    skip_unless_runs(backend, dtype)
    fused = torch.randn(tokens, 4 * 64 + 40, device=device).to(dtype)
    weight = torch.randn(64, device=device)
    heads = fused[:, :256].view(tokens, 4, 64)
    for x in (heads, heads.transpose(0, 1)):
        wide = poisoned((*x.shape[:2], 80), dtype, device)
        rmsnorm(x, weight, EPS, out=wide[..., :64])
        assert_close_to_oracle(wide[..., :64], rms_oracle(x, weight, 0.0), rms_twin(x, weight, 0.0))
        assert wide[..., 64:].isnan().all()
    rmsnorm(heads, weight, EPS, out=heads)
    assert_close_to_oracle(heads, wide[..., :64].double().transpose(0, 1), wide[..., :64].transpose(0, 1))


@pytest.mark.parametrize("rows", [2000, 5001])
def test_rmsnorm_of_many_rows(rows: int, device: str) -> None:
    """More rows than programs: each takes several turns, the last one not whole."""
    x, weight = torch.randn(rows, 32, device=device), torch.randn(32, device=device)
    assert_close_to_oracle(rmsnorm(x, weight, EPS), rms_oracle(x, weight, 0.0), rms_twin(x, weight, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_misaligned_rows(dtype: torch.dtype, device: str) -> None:
    """Tensors that begin on no 16 bytes, after aligned ones of the same shape took the same kernel."""
    room, weights = torch.randn(7 * 64 + 1, device=device).to(dtype), torch.randn(65, device=device).to(dtype)
    for begin in (0, 1):
        x, weight = room[begin : begin + 7 * 64].view(7, 64), weights[begin : begin + 64]
        out = poisoned((7 * 64 + 1,), dtype, device)
        got = rmsnorm(x, weight, EPS, out=out[begin : begin + 7 * 64].view(7, 64))
        assert_close_to_oracle(got, rms_oracle(x, weight, 0.0), rms_twin(x, weight, 0.0))
        assert int(out.isnan().sum()) == 1


def test_rmsnorm_accumulates_in_fp32(device: str) -> None:
    """Squares that overflow fp16 and are lost in bf16 sums."""
    x = torch.full((2, 2048), 300.0, dtype=torch.float16, device=device)
    assert torch.equal(rmsnorm(x, torch.ones_like(x[0])), torch.ones_like(x))


def test_rows_with_nan_and_infinity_keep_to_themselves(device: str) -> None:
    x, weight = torch.randn(50, 72, device=device), torch.randn(72, device=device)
    x[7, 3], x[20, 71], x[41, 0] = float("nan"), float("inf"), -float("inf")
    assert_close_to_oracle(rmsnorm(x, weight, EPS), rms_oracle(x, weight, 0.0), rms_twin(x, weight, 0.0))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_add_rmsnorm(name: str, dtype: torch.dtype, shape: tuple[int, ...], device: str, backend: str) -> None:
    skip_unless_runs(backend, dtype)
    norm, bias = FUSED[name]
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    total, total_twin = x.double() + residual.double(), x + residual
    oracle, twin = rms_oracle(total, weight, bias), rms_twin(total_twin, weight, bias)
    assert norm(x, residual, weight, EPS) is None
    assert_close_to_oracle(residual, total, total_twin, "residual")
    assert_close_to_oracle(x, oracle, twin, "input")


def test_fused_add_rmsnorm_writes_through_views(device: str) -> None:
    wide = torch.randn(45, 3 * 48, device=device)
    before = wide.clone()
    x, residual, weight = wide[:, :48], wide[:, 96:], torch.randn(48, device=device)
    total = before[:, :48].double() + before[:, 96:].double()
    fused_add_rmsnorm(x, residual, weight, EPS)
    assert_close_to_oracle(wide[:, 96:], total, total.float())
    assert_close_to_oracle(wide[:, :48], rms_oracle(total, weight, 0.0), rms_twin(total.float(), weight, 0.0))
    assert torch.equal(wide[:, 48:96], before[:, 48:96])


def test_fused_add_rmsnorm_normalises_the_unrounded_sum(device: str) -> None:
    """The result is the correctly rounded one almost everywhere; rounding the sum first would change it every few."""
    x, residual = (torch.randn(64, 512, device=device).half() for _ in range(2))
    weight = torch.randn(512, device=device).half()
    expected = rms_oracle(x.double() + residual.double(), weight, 0.0).half()
    fused_add_rmsnorm(x, residual, weight, EPS)
    assert (x != expected).float().mean() < 0.005


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layernorm(dtype: torch.dtype, shape: tuple[int, ...], device: str, backend: str) -> None:
    skip_unless_runs(backend, dtype)
    x = (torch.randn(shape, device=device) + 2).to(dtype)
    gemma, beta = torch.randn(2, shape[-1], device=device).to(dtype).float()
    beta *= 0.125  # a large shift may cancel the rest, and no bound made from the result covers the error of that
    twin = functional.layer_norm(x, shape[-1:], gemma.to(dtype), beta.to(dtype), EPS)
    assert_close_to_oracle(layernorm(x, gemma, beta, EPS), layer_oracle(x, gemma, beta), twin)


# ---- fp8


def to_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Saturating, NaN kept."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def check_fp8(got: torch.Tensor, exact: torch.Tensor, twin: torch.Tensor, scale: torch.Tensor) -> None:
    """Within the tolerance everywhere, and the correctly rounded value but for ties that fp32 breaks otherwise."""
    limit = torch.finfo(got.dtype).max
    exact = (exact / scale.double()).clamp(-limit, limit)
    assert_close_to_oracle(got.float(), exact, to_fp8(twin.float() / scale, got.dtype).float())
    right = to_fp8(exact.float(), got.dtype).float().nan_to_num()
    assert (got.float().nan_to_num() != right).float().mean() < 0.01


@pytest.mark.parametrize("out_dtype", FP8)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 576), (3, 5, 72), (1, 1023)])
def test_quantised_norms(dtype: torch.dtype, out_dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    """bf16 too: it comes in but does not go out, so the interpreter can."""
    x = torch.randn(shape, device=device).to(dtype)
    weight, beta = torch.randn(2, shape[-1], device=device).to(dtype)
    scale = torch.rand(1, device=device) * 0.01 + 0.003  # in e4m3 the largest values saturate
    out = torch.empty(shape, dtype=out_dtype, device=device)
    assert rmsnorm_quant(out, x, weight, scale, EPS) is out
    check_fp8(out, rms_oracle(x, weight, 0.0), rms_twin(x, weight, 0.0), scale)
    out = torch.empty(shape, dtype=out_dtype, device=device)
    gemma, beta = weight.float(), beta.float() * 0.125
    assert layernorm_quant(out, x, gemma, beta, scale[0], EPS) is out
    twin = functional.layer_norm(x.float(), shape[-1:], gemma, beta, EPS)
    check_fp8(out, layer_oracle(x, gemma, beta), twin, scale)


@pytest.mark.parametrize("out_dtype", FP8)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_fused_add(dtype: torch.dtype, out_dtype: torch.dtype, device: str, backend: str) -> None:
    skip_unless_runs(backend, dtype)
    x, residual = (torch.randn(40, 576, device=device).to(dtype) for _ in range(2))
    weight, scale = torch.randn(576, device=device).to(dtype), torch.tensor(0.03, device=device)
    total, total_twin, before = x.double() + residual.double(), x + residual, x.clone()
    wide = torch.empty(40, 600, dtype=out_dtype, device=device)
    assert fused_add_rmsnorm_quant(wide[:, 24:], x, residual, weight, scale, EPS) is None
    assert torch.equal(x, before)
    assert_close_to_oracle(residual, total, total_twin)
    check_fp8(wide[:, 24:], rms_oracle(total, weight, 0.0), rms_twin(total_twin, weight, 0.0), scale)
    assert wide[:, :24].float().isnan().all()


@pytest.mark.parametrize("out_dtype", FP8)
def test_quantised_rows_saturate_and_keep_nan(out_dtype: torch.dtype, device: str) -> None:
    x = torch.ones(3, 16, device=device)
    x[1, 5] = float("nan")
    x[2, 8:] = -1.0
    out = torch.empty(3, 16, dtype=out_dtype, device=device)
    rmsnorm_quant(out, x, torch.full((16,), 1e6, device=device), torch.tensor(1.0, device=device))
    limit = torch.finfo(out_dtype).max
    assert (out[0].float() == limit).all() and out[1].float().isnan().all()
    assert (out[2].float() == limit * x[2]).all()


# ---- selection, graphs, the compiler


def test_rows_that_no_program_can_hold_go_to_torch(device: str, backend: str) -> None:
    x, weight = torch.randn(2, 16385, device=device), torch.randn(16385, device=device)
    if backend == "triton":
        with pytest.raises(BackendSupportedError, match="more than 16384 elements"):
            rmsnorm(x, weight, EPS)
    else:
        assert_close_to_oracle(rmsnorm(x, weight, EPS), rms_oracle(x, weight, 0.0), rms_twin(x, weight, 0.0))


def block(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """One of each op, with results that depend on what they write."""
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    fused_add_rmsnorm_quant(out, x, residual, weight, scale)
    fused_add_rmsnorm(x, residual, weight)
    heads = gemma_rmsnorm(x.view(x.shape[0], 4, -1), weight[: x.shape[1] // 4])
    normed = layernorm(rmsnorm(x, weight, out=torch.empty_like(x)), weight, weight) + heads.flatten(1)
    return [normed, x, residual, out.float(), rmsnorm_quant(torch.empty_like(out), normed, weight, scale).float()]


@pytest.mark.parametrize("dynamo_backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(
    dynamo_backend: str, device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the compiler cannot look into the poisoned torch.empty
    force_backend(monkeypatch, ops, "normalise", backend)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=dynamo_backend, dynamic=True)
    weight, scale = torch.randn(64, device=device), torch.tensor([0.02], device=device)
    for rows in (5, 40):
        x, residual = torch.randn(2, rows, 64, device=device)
        got = compiled(x.clone(), residual.clone(), weight, scale)
        for ours, theirs in zip(got, block(x, residual, weight, scale), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_values(backend: str) -> None:
    x, residual = torch.randn(2, 300, 64, device="cuda").half()
    weight, scale = torch.randn(64, device="cuda").half(), torch.tensor([0.02], device="cuda")
    results: list[torch.Tensor] = []
    graph = captured(lambda: results.__setitem__(slice(None), block(x, residual, weight, scale)))
    fresh = torch.randn(2, 300, 64, device="cuda").half()
    x.copy_(fresh[0]), residual.copy_(fresh[1])
    graph.replay()
    for ours, theirs in zip(results, block(fresh[0], fresh[1], weight, scale), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [2**30 + 64, 2**31 + 64])
def test_rows_past_2_31_elements(stride: int) -> None:
    x = far_rows(stride, 64, torch.float16)
    weight = torch.randn(64, device="cuda").half()
    oracle, twin = rms_oracle(x, weight, 0.0), rms_twin(x, weight, 0.0)
    assert_close_to_oracle(rmsnorm(x, weight, EPS), oracle, twin)
    rmsnorm(x, weight, EPS, out=x)
    assert_close_to_oracle(x, oracle, twin)


def test_errors(device: str) -> None:
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    with pytest.raises(TypeError, match=r"input: got list, expected a torch.Tensor"):
        rmsnorm([1.0], weight)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weight: got float, expected a torch.Tensor"):
        rmsnorm(x, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"input: got dtype torch.int64.*Convert"):
        rmsnorm(x.long(), weight)
    with pytest.raises(ValueError, match=r"input: got 1 dimensions, expected 2 or 3"):
        rmsnorm(x[0], weight)
    with pytest.raises(ValueError, match=r"input: got 0 dimensions, expected 2 or 3"):
        rmsnorm(x[0, 0], weight)
    with pytest.raises(ValueError, match=r"input: got strides.*innermost stride must be 1"):
        rmsnorm(x.t(), weight[:3])
    with pytest.raises(ValueError, match=r"weight: got shape \[15\], expected shape \[16\]"):
        rmsnorm(x, weight[:15])
    with pytest.raises(ValueError, match=r"weight: got strides \(2,\), expected innermost stride must be 1"):
        rmsnorm(x[:, :8], weight[::2])
    with pytest.raises(ValueError, match=r"weight: got a tensor on meta while input is on"):
        rmsnorm(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"out: got shape \[3, 8\]"):
        rmsnorm(x, weight, out=x[:, :8])
    with pytest.raises(ValueError, match=r"out: got dtype torch.float16"):
        gemma_rmsnorm(x, weight, out=x.half())
    with pytest.raises(ValueError, match=r"residual: got dtype torch.float16"):
        fused_add_rmsnorm(x, x.half(), weight)
    with pytest.raises(ValueError, match=r"residual: got shape \[2, 16\]"):
        gemma_fused_add_rmsnorm(x, x[:2], weight)
    with pytest.raises(ValueError, match=r"beta: got shape \[4\]"):
        layernorm(x, weight, weight[:4])


def test_errors_of_quantised_norms(device: str) -> None:
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    out, scale = x.to(torch.float8_e4m3fn), torch.ones(1, device=device)
    with pytest.raises(ValueError, match=r"scale: got float, expected a tensor of one element"):
        rmsnorm_quant(out, x, weight, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scale: got shape \[2\], expected a tensor of one element"):
        layernorm_quant(out, x, weight, weight, torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"scale: got dtype torch.float64"):
        fused_add_rmsnorm_quant(out, x, x.clone(), weight, scale.double())
    with pytest.raises(ValueError, match=r"out: got dtype torch.float32"):
        rmsnorm_quant(x, x, weight, scale)
    with pytest.raises(ValueError, match=r"out: got shape \[2, 16\]"):
        layernorm_quant(out[:2], x, weight, weight, scale)
