"""Norms against fp64, with torch's own norms in the same dtype as the measure."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from flashinfer.norm import fused_add_rmsnorm, gemma_fused_add_rmsnorm, gemma_rmsnorm, layernorm, rmsnorm
from flashinfer.testing import assert_close_to_oracle, poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((5, 1), (3, 7), (0, 64), (33, 576), (2, 4096), (3, 5, 72), (2, 0, 8))
EPS = 1e-5
RMSNORMS = {"rmsnorm": (rmsnorm, 0.0), "gemma": (gemma_rmsnorm, 1.0)}
FUSED = {"rmsnorm": (fused_add_rmsnorm, 0.0), "gemma": (gemma_fused_add_rmsnorm, 1.0)}


def rms_oracle(x: torch.Tensor, weight: torch.Tensor, bias: float) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight.double() + bias)


def rms_twin(x: torch.Tensor, weight: torch.Tensor, bias: float) -> torch.Tensor:
    return functional.rms_norm(x, x.shape[-1:], (weight + bias).to(x.dtype), EPS)


@pytest.mark.parametrize("name", RMSNORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rmsnorm(name: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
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
def test_rmsnorm_of_views(dtype: torch.dtype, device: str) -> None:
    fused = torch.randn(6, 4 * 64 + 40, device=device).to(dtype)
    x = fused[:, :256].view(6, 4, 64).transpose(0, 1)
    weight = torch.randn(64, device=device)
    wide = poisoned((4, 6, 80), dtype, device)
    rmsnorm(x, weight, EPS, out=wide[..., :64])
    assert_close_to_oracle(wide[..., :64], rms_oracle(x, weight, 0.0), rms_twin(x, weight, 0.0))
    assert wide[..., 64:].isnan().all()


def test_rmsnorm_accumulates_in_fp32(device: str) -> None:
    """Squares that overflow fp16 and are lost in bf16 sums."""
    x = torch.full((2, 2048), 300.0, dtype=torch.float16, device=device)
    assert torch.equal(rmsnorm(x, torch.ones_like(x[0])), torch.ones_like(x))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_add_rmsnorm(name: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    norm, bias = FUSED[name]
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    total, total_twin = x.double() + residual.double(), x + residual
    oracle, twin = rms_oracle(total, weight, bias), rms_twin(total_twin, weight, bias)
    assert norm(x, residual, weight, EPS) is None
    assert_close_to_oracle(residual, total, total_twin, "residual")
    assert_close_to_oracle(x, oracle, twin, "input")


def test_fused_add_rmsnorm_writes_through_views(device: str) -> None:
    wide = torch.randn(5, 3 * 48, device=device)
    before = wide.clone()
    x, residual, weight = wide[:, :48], wide[:, 96:], torch.randn(48, device=device)
    total = before[:, :48].double() + before[:, 96:].double()
    fused_add_rmsnorm(x, residual, weight, EPS)
    assert_close_to_oracle(wide[:, 96:], total, total.float())
    assert_close_to_oracle(wide[:, :48], rms_oracle(total, weight, 0.0), rms_twin(total.float(), weight, 0.0))
    assert torch.equal(wide[:, 48:96], before[:, 48:96])


def test_fused_add_rmsnorm_normalises_the_unrounded_sum(device: str) -> None:
    """The result is the correctly rounded one almost everywhere; rounding the sum first would change it every few."""
    x, residual = (torch.randn(64, 512, device=device).bfloat16() for _ in range(2))
    weight = torch.randn(512, device=device).bfloat16()
    expected = rms_oracle(x.double() + residual.double(), weight, 0.0).bfloat16()
    fused_add_rmsnorm(x, residual, weight, EPS)
    assert (x != expected).float().mean() < 0.001


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layernorm(dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    x = (torch.randn(shape, device=device) + 2).to(dtype)
    gemma, beta = torch.randn(2, shape[-1], device=device).to(dtype).float()
    beta *= 0.125  # a large shift may cancel the rest, and no bound made from the result covers the error of that
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    oracle = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * gemma + beta
    twin = functional.layer_norm(x, shape[-1:], gemma.to(dtype), beta.to(dtype), EPS)
    assert_close_to_oracle(layernorm(x, gemma, beta, EPS), oracle, twin)


def test_errors(device: str) -> None:
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    with pytest.raises(TypeError, match=r"input: got list, expected a torch.Tensor"):
        rmsnorm([1.0], weight)  # type: ignore[arg-type]
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
