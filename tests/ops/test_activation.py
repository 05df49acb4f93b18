"""Gated activations against fp64, with torch in the same dtype as the measure."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn import functional

from flashinfer.activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from flashinfer.testing import assert_close_to_oracle, poisoned

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((4, 8), (0, 16), (3, 72), (2, 5, 3072), (24,), (1, 0))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """torch's; in fp64, where it is the oracle, by erfc: 1 + erf(x / sqrt(2)) cancels for x < -4."""
    return 0.5 * x * torch.erfc(-x / math.sqrt(2)) if x.dtype == torch.float64 else functional.gelu(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """torch's; in fp64 by (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u))."""
    if x.dtype != torch.float64:
        return functional.gelu(x, approximate="tanh")
    return x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "silu": (silu_and_mul, functional.silu),
    "gelu": (gelu_and_mul, gelu),
    "gelu_tanh": (gelu_tanh_and_mul, gelu_tanh),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_oracle_is_torch_where_torch_is_exact(name: str) -> None:
    x = torch.linspace(-2, 20, 1000, dtype=torch.float64)
    theirs = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    }
    torch.testing.assert_close(ACTIVATIONS[name][1](x), theirs[name](x), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_activation(name: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    op, activation = ACTIVATIONS[name]
    shape = (*shape[:-1], 2 * shape[-1])
    x = (torch.randn(shape, device=device) * 4).to(dtype)
    a, gate = x.chunk(2, dim=-1)
    oracle, twin = activation(a.double()) * gate.double(), activation(a) * gate
    out = poisoned(twin.shape, dtype, device)
    assert op(x, out=out) is out
    for name, got in (("returned", op(x)), ("out=", out)):
        assert got.shape == twin.shape
        # one dimension is one token
        assert_close_to_oracle(*(torch.atleast_2d(t) for t in (got, oracle, twin)), name)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_views(name: str, device: str) -> None:
    op, activation = ACTIVATIONS[name]
    x = torch.randn(6, 48, device=device)[::2, 8:40]
    wide = poisoned((3, 24), torch.float32, device)
    op(x, out=wide[:, :16])
    oracle = activation(x[:, :16].double()) * x[:, 16:].double()
    assert_close_to_oracle(wide[:, :16], oracle, activation(x[:, :16]) * x[:, 16:])
    assert wide[:, 16:].isnan().all()


def test_extremes(device: str) -> None:
    """Saturation on both sides, zeros and NaN."""
    x = torch.tensor([[-1e4, 0.0, 1e4, float("nan"), 1.0, 1.0, 1.0, 1.0]], device=device)
    for op, _ in ACTIVATIONS.values():
        got = op(x)[0]
        assert got[:2].abs().tolist() == [0.0, 0.0]
        assert got[2] == 1e4
        assert got[3].isnan()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_errors(name: str, device: str) -> None:
    op = ACTIVATIONS[name][0]
    x = torch.randn(3, 16, device=device)
    with pytest.raises(TypeError, match=r"input: got list"):
        op([1.0])
    with pytest.raises(ValueError, match=r"input: got dtype torch.int32"):
        op(x.int())
    with pytest.raises(ValueError, match=r"input: got 0 dimensions"):
        op(x[0, 0])
    with pytest.raises(ValueError, match=r"innermost stride must be 1"):
        op(x.t())
    with pytest.raises(ValueError, match=r"last dimension of input in bytes: got 24"):
        op(x[:, :6])
    with pytest.raises(ValueError, match=r"last dimension of input in bytes: got 8"):
        op(x[:, :4].half())
    with pytest.raises(ValueError, match=r"out: got shape \[3, 16\], expected shape \[3, 8\]"):
        op(x, out=x)
    with pytest.raises(ValueError, match=r"out: got dtype torch.float16"):
        op(x, out=x[:, :8].half())
    with pytest.raises(ValueError, match=r"out: got a tensor on meta"):
        op(x, out=x[:, :8].to("meta"))
