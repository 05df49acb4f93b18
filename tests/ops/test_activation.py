"""Gated activations against fp64, with torch in the same dtype as the measure."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn import functional

from flashinfer.activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul, silu_and_mul_quant
from flashinfer.ops import activation as ops
from flashinfer.testing import assert_close_to_oracle, poisoned
from tests.ops.common import captured, far_rows, force_backend, skip_unless_runs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((4, 8), (0, 16), (3, 72), (2, 5, 3072), (24,), (1, 0), (2, 3, 2, 40))


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on each implementation, through the public functions."""
    force_backend(monkeypatch, ops, "gate", request.param)
    return str(request.param)


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
def test_activation(name: str, dtype: torch.dtype, shape: tuple[int, ...], device: str, backend: str) -> None:
    skip_unless_runs(backend, dtype)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_views_of_several_dimensions(dtype: torch.dtype, device: str) -> None:
    """Leading dimensions that swap places, in input and out alike, and rows that begin on no 16 bytes."""
    room = torch.randn(2, 3, 5, 4, 33, device=device).to(dtype)[..., 1:]
    wide = poisoned((4, 3, 2, 5, 20), dtype, device)
    for x, target in (
        (room.permute(3, 1, 0, 2, 4), wide),
        (room[0, 0].transpose(0, 1), wide[:, 0, 0]),
    ):
        out = target[..., 1:17]
        silu_and_mul(x, out=out)
        a, gate = x.chunk(2, dim=-1)
        oracle, twin = functional.silu(a.double()) * gate.double(), functional.silu(a) * gate
        assert_close_to_oracle(out.flatten(0, -2), oracle.flatten(0, -2), twin.flatten(0, -2))
    assert wide[..., 0].isnan().all() and wide[..., 17:].isnan().all()


def test_many_rows(device: str) -> None:
    """Enough work for the large tiles, the last ones not whole."""
    x = torch.randn(3001, 2 * 136, device=device)
    oracle = functional.silu(x[:, :136].double()) * x[:, 136:].double()
    assert_close_to_oracle(silu_and_mul(x), oracle, functional.silu(x[:, :136]) * x[:, 136:])


def test_extremes(device: str) -> None:
    """Saturation on both sides, zeros, and NaN that stays where it is."""
    x = torch.tensor([[-1e4, 0.0, 1e4, float("nan"), 1.0, 1.0, 1.0, 1.0]], device=device).repeat(3, 1)
    x[1] = 1.0
    for op, _ in ACTIVATIONS.values():
        got = op(x)
        assert got[0, :2].abs().tolist() == [0.0, 0.0]
        assert got[0, 2] == 1e4
        assert got.isnan().nonzero().tolist() == [[0, 3], [2, 3]]


# ---- fp8


@pytest.mark.parametrize("out_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 576), (3, 5, 72), (1, 1024)])
def test_quantised(dtype: torch.dtype, out_dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    """Rounded once, saturating: the correctly rounded value but for ties that fp32 breaks otherwise."""
    x = (torch.randn((*shape[:-1], 2 * shape[-1]), device=device) * 4).to(dtype)
    scale = torch.tensor(0.01, device=device)
    out = torch.empty(shape, dtype=out_dtype, device=device)
    assert silu_and_mul_quant(out, x, scale) is out
    a, gate = x.chunk(2, dim=-1)
    limit = torch.finfo(out_dtype).max
    exact = (functional.silu(a.double()) * gate.double() / 0.01).clamp(-limit, limit)
    twin = (functional.silu(a.float()) * gate.float() / 0.01).clamp(-limit, limit).to(out_dtype)
    assert_close_to_oracle(out.float(), exact, twin.float())
    assert (out.float() != exact.float().to(out_dtype).float()).float().mean() < 0.01
    assert (exact.abs() == limit).any() or out_dtype == torch.float8_e5m2, "nothing saturated"


def test_quantised_views_keep_nan(device: str) -> None:
    x = torch.randn(5, 48, device=device)
    x[2, 3] = float("nan")
    wide = torch.empty(5, 40, dtype=torch.float8_e4m3fn, device=device)
    silu_and_mul_quant(wide[:, :24], x, torch.ones(1, device=device))
    assert wide[:, :24].float().isnan().nonzero().tolist() == [[2, 3]]
    assert wide[:, 24:].float().isnan().all()


# ---- graphs, the compiler, large tensors


def mlp(x: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """Every op, each on results of the one before."""
    hidden = silu_and_mul(torch.cat([gelu_and_mul(x), gelu_tanh_and_mul(x)], dim=-1))
    quantised = torch.empty(hidden.shape[0], 32, dtype=torch.float8_e4m3fn, device=x.device)
    return [hidden, silu_and_mul_quant(quantised, silu_and_mul(x, out=torch.empty_like(x[:, :64])), scale).float()]


@pytest.mark.parametrize("dynamo_backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(
    dynamo_backend: str, device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the compiler cannot look into the poisoned torch.empty
    force_backend(monkeypatch, ops, "gate", backend)
    torch.compiler.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend=dynamo_backend, dynamic=True)
    scale = torch.tensor([0.02], device=device)
    for rows in (5, 40):
        x = torch.randn(rows, 128, device=device)
        for ours, theirs in zip(compiled(x, scale), mlp(x, scale), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_values() -> None:
    x, scale = torch.randn(300, 128, device="cuda").half(), torch.tensor([0.02], device="cuda")
    results: list[torch.Tensor] = []
    graph = captured(lambda: results.__setitem__(slice(None), mlp(x, scale)))
    fresh = torch.randn(300, 128, device="cuda").half()
    x.copy_(fresh)
    graph.replay()
    for ours, theirs in zip(results, mlp(fresh, scale), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [2**30 + 64, 2**31 + 64])
def test_rows_past_2_31_elements(stride: int) -> None:
    x = far_rows(stride, 128, torch.float16)
    oracle = functional.silu(x[:, :64].double()) * x[:, 64:].double()
    twin = functional.silu(x[:, :64]) * x[:, 64:]
    assert_close_to_oracle(silu_and_mul(x), oracle, twin)
    silu_and_mul(x, out=x[:, :64])
    assert_close_to_oracle(x[:, :64], oracle, twin)


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
    with pytest.raises(ValueError, match=r"out: got strides \(1, 3\), expected innermost stride must be 1"):
        op(x, out=torch.empty(8, 3, device=device).t())


def test_errors_of_the_quantised_form(device: str) -> None:
    x = torch.randn(3, 16, device=device)
    out, scale = x[:, :8].to(torch.float8_e5m2), torch.ones(1, device=device)
    with pytest.raises(ValueError, match=r"out: got dtype torch.float32"):
        silu_and_mul_quant(x[:, :8], x, scale)
    with pytest.raises(ValueError, match=r"out: got shape \[2, 8\]"):
        silu_and_mul_quant(out[:2], x, scale)
    with pytest.raises(ValueError, match=r"scale: got int, expected a tensor of one element"):
        silu_and_mul_quant(out, x, 1)  # type: ignore[arg-type]
