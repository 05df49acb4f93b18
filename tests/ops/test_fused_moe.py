"""The public functions of the mixture of experts: arguments of FlashInfer's, ranks, errors, tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flashinfer
from flashinfer.autotuner import autotune
from flashinfer.core import tuning
from flashinfer.core.select import BackendSupportedError
from flashinfer.fused_moe import (
    ActivationType,
    cutlass_fused_moe,
    cutlass_fused_moe_workspace_size,
    interleave_moe_scales_for_sm90_mixed_gemm,
    interleave_moe_weights_for_sm90_mixed_gemm,
    route,
)
from flashinfer.ops.gemm import Activation, Weights
from flashinfer.ops.moe import Experts, Routes
from flashinfer.testing import assert_close_to_oracle, poisoned
from tests.ops.common import force
from tests.ops.moe_checks import order_noise

E, K, H, INTER = 8, 2, 64, 48
TOKENS = 11


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(monkeypatch, "gemm", request.param, skip=False)
    return force(monkeypatch, "moe", request.param)


def problem(
    device: str, dtype: torch.dtype = torch.float32, gated: bool = True, tokens: int = TOKENS
) -> dict[str, Any]:
    """The arguments of a call."""
    weights, ids = route(torch.randn(tokens, E, device=device), K)
    return {
        "input": torch.randn(tokens, H, device=device).to(dtype),
        "token_selected_experts": ids,
        "token_final_scales": weights,
        "fc1_expert_weights": (torch.randn(E, INTER * (1 + gated), H, device=device) / H**0.5).to(dtype),
        "fc2_expert_weights": (torch.randn(E, H, INTER, device=device) / INTER**0.5).to(dtype),
        "output_dtype": dtype,
        "quant_scales": None,
    }


def dense(p: dict[str, Any], dtype: torch.dtype, activation: Any) -> torch.Tensor:
    """Every expert for every token, weighted by what the router said; activation: of sums `[tokens, experts, N]`."""
    x, fc1, fc2 = (p[name].to(dtype) for name in ("input", "fc1_expert_weights", "fc2_expert_weights"))
    table = torch.zeros(x.shape[0], E, dtype=dtype, device=x.device)
    table.scatter_add_(1, p["token_selected_experts"].long(), p["token_final_scales"].to(dtype))
    bias1, bias2 = (p[name].to(dtype) if name in p else 0.0 for name in ("fc1_expert_biases", "fc2_expert_biases"))
    hidden = activation(torch.einsum("th,enh->ten", x, fc1) + bias1)
    return torch.einsum("te,teh->th", table, torch.einsum("ten,ehn->teh", hidden, fc2) + bias2)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    up, gate = x.chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


ACTIVATIONS = {
    ActivationType.Swiglu: (swiglu, "swiglu"),
    ActivationType.SwigluBias: (swiglu, "swiglu"),
    ActivationType.Relu2: (lambda x: x.relu().square(), "relu2"),
    ActivationType.Identity: (lambda x: x, "identity"),
}


def noise_of(p: dict[str, Any], kind: str = "swiglu") -> torch.Tensor:
    """What the order of sums may change in the result of these arguments."""
    weights = [Weights(p[name]) for name in ("fc1_expert_weights", "fc2_expert_weights")]
    biases = [p.get(name) for name in ("fc1_expert_biases", "fc2_expert_biases")]
    routes = Routes(p["token_selected_experts"], p["token_final_scales"])
    return order_noise(p["input"], routes, Experts(*weights, Activation(kind), *biases))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cutlass_fused_moe(activation: ActivationType, device: str) -> None:
    function, kind = ACTIVATIONS[activation]
    p = problem(device, gated=kind == "swiglu")
    output = poisoned((TOKENS, H), torch.float32, device)
    assert cutlass_fused_moe(**p, output=output, activation_type=activation) is output
    oracle, twin = (dense(p, dtype, function) for dtype in (torch.float64, torch.float32))
    assert_close_to_oracle(output, oracle, twin, noise=noise_of(p, kind))


def test_ranks_of_experts_and_of_tensors(device: str) -> None:
    """Two by two ranks: half of the experts, half of each; the second bias belongs to the first tensor rank."""
    p = problem(device)
    biases = {
        "fc1_expert_biases": torch.randn(E, 2 * INTER, device=device),
        "fc2_expert_biases": torch.randn(E, H, device=device),
    }
    oracle, twin = (dense({**p, **biases}, dtype, swiglu) for dtype in (torch.float64, torch.float32))
    total = torch.zeros(TOKENS, H, dtype=torch.float64, device=device)
    for ep in range(2):
        for tp in range(2):
            e, i = slice(ep * E // 2, (ep + 1) * E // 2), slice(tp * INTER // 2, (tp + 1) * INTER // 2)
            halves = lambda w: w[e].unflatten(1, (2, -1))[:, :, i].flatten(1, 2)  # noqa: B023, E731
            mine = {
                **p,
                "fc1_expert_weights": halves(p["fc1_expert_weights"]),
                "fc2_expert_weights": p["fc2_expert_weights"][e][:, :, i],
                "fc1_expert_biases": halves(biases["fc1_expert_biases"]),
                "fc2_expert_biases": biases["fc2_expert_biases"][e],
            }
            total += cutlass_fused_moe(**mine, tp_size=2, tp_rank=tp, ep_size=2, ep_rank=ep)
    assert_close_to_oracle(total.float(), oracle, twin, noise=noise_of({**p, **biases}))


def test_narrow_kinds_through_the_facade(device: str) -> None:
    """Which scales are which: numbers that narrow formats hold exactly give what wide weights give."""
    p = problem(device)
    for name in ("fc1_expert_weights", "fc2_expert_weights", "input"):
        p[name] = (p[name] * 4).round().clamp(-6, 6)
    codes = {name: p[name].to(torch.float8_e4m3fn) for name in ("fc1_expert_weights", "fc2_expert_weights", "input")}
    factors = [torch.full((E,), 0.5, device=device), torch.tensor(2.0, device=device)]
    scales = [factors[0], factors[1], torch.full((E,), 0.125, device=device), torch.tensor(1.0, device=device)]
    narrow = {**p, **codes, "quant_scales": scales}
    out = cutlass_fused_moe(**narrow, activation_type=ActivationType.Swiglu)

    def cast(x: torch.Tensor) -> torch.Tensor:
        return (swiglu(x * 0.5) * 2).float().clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * 0.125

    expected, twin = dense(p, torch.float64, cast), dense(p, torch.float32, cast)
    largest = p["fc2_expert_weights"].abs().max().double()
    # One activation of e4m3 rounded the other way: its spacing, at most an eighth of 448, times scale and weight.
    noise = 448 / 8 * 0.125 * largest * p["token_final_scales"].double().sum(1, keepdim=True)
    assert_close_to_oracle(out, expected, twin, noise=noise.expand_as(expected))


def test_mxfp4_weights_need_no_order_of_their_own(device: str) -> None:
    codes = torch.randint(256, (E, 2 * INTER, H // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(256, (E, 2 * INTER, H // 32), dtype=torch.uint8, device=device)
    assert torch.equal(interleave_moe_weights_for_sm90_mixed_gemm(codes, "fp4"), codes)
    assert torch.equal(interleave_moe_scales_for_sm90_mixed_gemm(scales), scales)


def test_errors(device: str) -> None:
    p = problem(device)
    with pytest.raises(BackendSupportedError, match="min_latency_mode"):
        cutlass_fused_moe(**p, min_latency_mode=True)
    with pytest.raises(ValueError, match="activation_type"):
        cutlass_fused_moe(**p, activation_type=ActivationType.InvalidType)
    with pytest.raises(ValueError, match="fc1_expert_weights"):
        cutlass_fused_moe(**{**p, "fc1_expert_weights": p["fc1_expert_weights"][:, :-2]})
    with pytest.raises(ValueError, match="token_final_scales"):
        cutlass_fused_moe(**{**p, "token_final_scales": p["token_final_scales"][:, :1]})
    with pytest.raises(ValueError, match="quant_scales: got 0 tensors"):
        cutlass_fused_moe(**{**p, "fc1_expert_weights": p["fc1_expert_weights"].to(torch.float8_e4m3fn),
                             "fc2_expert_weights": p["fc2_expert_weights"].to(torch.float8_e4m3fn)})  # fmt: skip
    with pytest.raises(ValueError, match="output: got dtype"):
        cutlass_fused_moe(**p, output=torch.empty(TOKENS, H, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match="swiglu_alpha"):
        cutlass_fused_moe(**p, activation_type=ActivationType.Geglu, swiglu_alpha=torch.ones(E, device=device))


def test_workspace_is_ours() -> None:
    size = cutlass_fused_moe_workspace_size(64, H, INTER, E, K, x_dtype=torch.bfloat16, weight_dtype=torch.bfloat16)
    assert size == 0
    assert flashinfer.cutlass_fused_moe is cutlass_fused_moe


@pytest.mark.gpu
def test_tuning_measures_keeps_and_saves(tmp_path: Path, backend: str) -> None:
    if backend == "torch":
        pytest.skip("nothing to tune")
    tuning.forget()
    p, path = problem("cuda", torch.bfloat16), tmp_path / "configs.json"
    expected = cutlass_fused_moe(**p)
    assert tuning.generation() and not path.exists()
    with autotune(cache=path):
        cutlass_fused_moe(**p)
    assert path.read_text().count("moe_few_") == 2
    tuned = cutlass_fused_moe(**p)
    assert_close_to_oracle(tuned, expected.double(), expected)
    tuning.forget()


@pytest.mark.gpu
def test_tuning_of_many_tokens_is_that_of_grouped_products(backend: str) -> None:
    """Two of them, between launches that share scratch memory with what is measured."""
    if backend == "torch":
        pytest.skip("nothing to tune")
    tuning.forget()
    p = problem("cuda", torch.bfloat16, tokens=300)
    oracle, twin = (dense(p, dtype, swiglu) for dtype in (torch.float64, torch.bfloat16))
    with autotune():
        measured = cutlass_fused_moe(**p).clone()
        generation = tuning.generation()
        again = cutlass_fused_moe(**p)
    assert generation == tuning.generation(), "measured but once"
    assert [key.split("/")[1] for key in tuning._table.entries] == ["grouped_gemm"] * 2
    for tuned in (measured, again, cutlass_fused_moe(**p)):
        assert_close_to_oracle(tuned, oracle, twin, noise=noise_of(p, "swiglu"))
    tuning.forget()


@pytest.mark.gpu
@pytest.mark.compiles
def test_compile(backend: str) -> None:
    p = problem("cuda", torch.bfloat16)

    def layer(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        weights, ids = route(logits, K)
        return cutlass_fused_moe(**{**p, "input": x, "token_selected_experts": ids, "token_final_scales": weights})

    logits = torch.randn(TOKENS, E, device="cuda")
    assert torch.equal(torch.compile(layer, fullgraph=True)(p["input"], logits), layer(p["input"], logits))
