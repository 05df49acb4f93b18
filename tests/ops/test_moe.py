"""Mixture of experts against a dense loop in fp64, on every implementation, for few tokens and for many."""

from __future__ import annotations

import pytest
import torch

from flashinfer.core import replay
from flashinfer.ops.gemm import Activation, Weights
from flashinfer.ops.moe import BLOCK, Experts, Routes, moe
from flashinfer.testing import assert_close_to_oracle, poisoned
from tests.ops.common import force, skip_unless_runs
from tests.ops.moe_checks import (
    FEW,
    HALF,
    MANY,
    MODELS,
    SMALL,
    SORTED,
    Sizes,
    activated,
    check,
    dense,
    order_noise,
    plain_experts,
    routes_of,
)

E4M3 = torch.float8_e4m3fn
ACTIVATIONS = ("swiglu", "geglu", "relu2", "silu", "gelu", "relu", "identity")


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(monkeypatch, "gemm", request.param, skip=False)
    return force(monkeypatch, "moe", request.param)


@pytest.mark.parametrize("tokens", [0, 1, FEW, SORTED, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain(tokens: int, dtype: torch.dtype, device: str, backend: str) -> None:
    skip_unless_runs(backend, dtype)
    x = torch.randn(tokens, SMALL.hidden, device=device).to(dtype)
    check(x, routes_of(tokens, SMALL, device), plain_experts(SMALL, dtype, device))


@pytest.mark.parametrize("tokens", [3, MANY])
@pytest.mark.parametrize("sizes", MODELS)
def test_models(tokens: int, sizes: Sizes, device: str) -> None:
    x = torch.randn(tokens, sizes.hidden, device=device).to(HALF)
    check(x, routes_of(tokens, sizes, device), plain_experts(sizes, HALF, device))


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_and_biases(tokens: int, kind: str, device: str) -> None:
    x = torch.randn(tokens, SMALL.hidden, device=device)
    check(x, routes_of(tokens, SMALL, device), plain_experts(SMALL, torch.float32, device, kind, biased=True))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_swiglu_parameters(tokens: int, device: str) -> None:
    """alpha, beta and limit of each expert; limits small enough to bind."""
    x = torch.randn(tokens, SMALL.hidden, device=device)
    experts = plain_experts(SMALL, torch.float32, device, biased=True)
    parameters = [torch.rand(SMALL.experts, device=device) + 0.5 for _ in range(3)]
    check(x, routes_of(tokens, SMALL, device), experts._replace(activation=Activation("swiglu", *parameters)))


@pytest.mark.parametrize("tokens", [FEW, 40, SORTED, MANY])
def test_all_tokens_to_one_expert(tokens: int, device: str) -> None:
    """More than a tile of rows, of which programs find their own pairs (40), too."""
    x = torch.randn(tokens, SMALL.hidden, device=device)
    ids = torch.full((tokens, 1), 3, dtype=torch.int32, device=device)
    routes = Routes(ids, torch.rand(tokens, 1, device=device))
    check(x, routes, plain_experts(SMALL, torch.float32, device))


@pytest.mark.parametrize("tokens", [1, FEW, SORTED, MANY])
def test_repeated_and_foreign_ids(tokens: int, device: str, backend: str) -> None:
    """A token may name an expert twice; ids held elsewhere, negative ones too, add nothing, whatever they weigh."""
    x = torch.randn(tokens, SMALL.hidden, device=device)
    ids = torch.randint(-2, 9, (tokens, 4), device=device)
    ids[:, 1] = ids[:, 0]
    weights = torch.rand(tokens, 4, device=device)
    held = (ids >= 1) & (ids < 7)
    experts = plain_experts(SMALL, torch.float32, device, biased=True)
    check(x, Routes(ids, weights, 1), experts)
    got, zeroed = (moe(x, Routes(ids, weights.masked_fill(~held, w), 1), experts) for w in (float("nan"), 0.0))
    if backend == "torch":  # adds up in no fixed order on a GPU
        torch.testing.assert_close(got, zeroed)
    else:
        assert torch.equal(got, zeroed)


@pytest.mark.parametrize("tokens", [FEW, SORTED, MANY])
def test_nobody_is_routed_here(tokens: int, device: str) -> None:
    x = torch.randn(tokens, SMALL.hidden, device=device)
    routes = routes_of(tokens, SMALL, device)._replace(first_expert=100)
    out = moe(x, routes, plain_experts(SMALL, torch.float32, device))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_ranks_add_up(tokens: int, device: str) -> None:
    """Expert parallel: a third of the experts each. Tensor parallel: a half of every expert each, fc2's bias once."""
    x, routes = torch.randn(tokens, SMALL.hidden, device=device), routes_of(tokens, SMALL, device)
    experts = plain_experts(SMALL, torch.float32, device, biased=True)
    oracle, twin = (dense(x, routes, experts, dtype) for dtype in (torch.float64, torch.float32))

    def part(e: slice, i: slice, bias2: bool) -> Experts:
        fc1 = experts.fc1.values[e].unflatten(1, (2, -1))[:, :, i].flatten(1, 2)
        bias1 = experts.bias1[e].unflatten(1, (2, -1))[:, :, i].flatten(1, 2)
        fc2 = Weights(experts.fc2.values[e][:, :, i])
        return experts._replace(fc1=Weights(fc1), fc2=fc2, bias1=bias1, bias2=experts.bias2[e] if bias2 else None)

    whole, half = slice(None), SMALL.inter // 2
    by_expert = [(routes._replace(first_expert=f), part(slice(f, f + 2), whole, True)) for f in (0, 2, 4)]
    by_tensor = [(routes, part(whole, slice(f, f + half), f == 0)) for f in (0, half)]
    for ranks in (by_expert, by_tensor):
        total = torch.stack([moe(x, *rank) for rank in ranks]).sum(0)
        assert_close_to_oracle(total, oracle, twin, noise=order_noise(x, routes, experts))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_views(tokens: int, device: str) -> None:
    """Tokens, results and weights that are parts of something wider; results repeat bit for bit."""
    wide = torch.randn(tokens, 2 * SMALL.hidden + 3, device=device)
    x, room = wide[:, 3 : 3 + SMALL.hidden], poisoned((tokens, 2 * SMALL.hidden), torch.float32, device)
    routes, experts = routes_of(tokens, SMALL, device), plain_experts(SMALL, torch.float32, device)
    padded = torch.randn(SMALL.experts, SMALL.hidden + 5, SMALL.inter + 7, device=device)
    padded[:, : SMALL.hidden, : SMALL.inter] = experts.fc2.values
    strided = experts._replace(fc2=Weights(padded[:, : SMALL.hidden, : SMALL.inter]))
    out = moe(x, routes, strided, out=room[:, : SMALL.hidden])
    expected = check(x.contiguous(), routes, experts)
    assert_close_to_oracle(out.contiguous(), expected.double(), expected)
    assert bool(room[:, SMALL.hidden :].isnan().all())
    again = out.clone()
    assert torch.equal(moe(x, routes, strided, out=out), again)


@pytest.mark.parametrize("tokens", [FEW, SORTED, MANY])
def test_rows_with_nan_keep_to_themselves(tokens: int, device: str) -> None:
    x, routes = torch.randn(tokens, SMALL.hidden, device=device), routes_of(tokens, SMALL, device)
    experts = plain_experts(SMALL, torch.float32, device)
    clean = moe(x, routes, experts)
    x[2, 7] = float("nan")
    got = moe(x, routes, experts)
    assert bool(got[2].isnan().all())
    others = torch.arange(tokens) != 2
    assert torch.equal(got[others], clean[others])


def test_rows_side_by_side(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hopper's products want: the same bits as from rows that are gathered where they are read."""
    if backend == "torch":
        pytest.skip("only kernels gather")
    launch = pytest.importorskip("flashinfer.ops.moe.triton.launch")
    x, experts = torch.randn(MANY, SMALL.hidden, device=device), plain_experts(SMALL, torch.float32, device)
    routes = routes_of(MANY, SMALL, device)._replace(first_expert=1)
    monkeypatch.setattr(launch, "wants_neighbours", lambda product: False)
    gathered = moe(x, routes, experts)
    replay.forget()
    monkeypatch.setattr(launch, "wants_neighbours", lambda product: True)
    assert torch.equal(check(x, routes, experts), gathered)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_sums_in_rounds(tokens: int, device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's experts are added a few at a time, the last time fewer."""
    if backend == "torch":
        pytest.skip("torch adds expert by expert")
    configs = pytest.importorskip("flashinfer.ops.moe.triton.configs")
    for name in ("COMBINE_FEW", "COMBINE_MANY"):
        monkeypatch.setattr(configs, name, (4, 128))
    sizes = SMALL._replace(experts=9, top_k=6)
    x = torch.randn(tokens, sizes.hidden, device=device)
    check(x, routes_of(tokens, sizes, device), plain_experts(sizes, torch.float32, device, biased=True))


# ---- narrow weights


def one_flip(experts: Experts, routes: Routes, largest: torch.Tensor, spacing: float) -> torch.Tensor:
    """By how much `[tokens, 1]` a result may move where one activation of e4m3 is rounded the other way.

    fp32 sums differ in the last places, so one in many thousand lies on the other side of a rounding boundary.
    """
    return routes.weights.double().sum(1, keepdim=True) * largest * spacing * experts.fc2.values.double().abs().max()


def quantised(x: torch.Tensor, limit: float = 448.0) -> torch.Tensor:
    """x as e4m3 with a scale for every 128 columns holds it, in fp64."""
    rows, width = x.shape
    blocks = torch.nn.functional.pad(x.float(), (0, -width % BLOCK)).view(rows, -(-width // BLOCK), BLOCK)
    scale = (blocks.abs().amax(-1, keepdim=True) / limit).clamp(min=1e-30)
    return ((blocks / scale).to(E4M3).double() * scale.double()).flatten(1)[:, :width]


def narrow_dense(x: torch.Tensor, routes: Routes, wide: Experts, cast: object, dtype: torch.dtype) -> torch.Tensor:
    """`dense` with fp64 sums of x as it is; cast: what becomes of the activations."""
    fc1, fc2 = wide.fc1.values.double(), wide.fc2.values.double()
    out = torch.zeros(x.shape[0], fc2.shape[1], dtype=torch.float64, device=x.device)
    for e in range(fc1.shape[0]):
        tokens, place = (routes.ids == e).nonzero(as_tuple=True)
        hidden = cast(activated(x[tokens].double() @ fc1[e].T, wide.activation, e))  # type: ignore[operator]
        out.index_add_(0, tokens, (hidden @ fc2[e].T) * routes.weights[tokens, place, None].double())
    return out


@pytest.mark.parametrize("tokens", [1, FEW, SORTED, MANY])
@pytest.mark.parametrize("per_expert", [False, True])
def test_fp8_per_tensor(tokens: int, per_expert: bool, device: str) -> None:
    s = Sizes(6, 2, 96, 80)
    x = torch.randn(tokens, s.hidden, device=device).to(E4M3)
    codes = plain_experts(s, torch.float32, device)
    weights = [(w.values * 64).to(E4M3) for w in codes[:2]]
    factors = [torch.rand(s.experts, device=device) / 64 for _ in range(2)]
    scale = torch.rand(s.experts if per_expert else 1, device=device) + 0.5
    experts = Experts(
        *(Weights(w, kind="fp8_tensor", global_scale=f) for w, f in zip(weights, factors, strict=True)),
        Activation("swiglu"),
        hidden_scale=scale,
    )
    routes = routes_of(tokens, s, device)
    wide = experts._replace(
        fc1=Weights(weights[0].double() * factors[0].double()[:, None, None]),
        fc2=Weights(weights[1].double() * factors[1].double()[:, None, None]),
    )
    out = moe(x, routes, experts, out_dtype=HALF)
    scales = iter(scale.expand(s.experts).tolist())
    largest: list[torch.Tensor] = [torch.zeros((), dtype=torch.float64, device=device)]

    def cast(hidden: torch.Tensor) -> torch.Tensor:
        hidden = (hidden * next(scales)).float().clamp(-448, 448).to(E4M3).double()
        largest.append(hidden.abs().amax() if hidden.numel() else largest[0])
        return hidden

    oracle = narrow_dense(x.float(), routes, wide, cast, torch.float64)
    noise = one_flip(wide, routes, torch.stack(largest).max(), 2.0**-3)
    assert_close_to_oracle(out, oracle, oracle.to(HALF), noise=noise.expand_as(oracle))


@pytest.mark.parametrize("tokens", [1, FEW, SORTED, MANY])
def test_fp8_blocks(tokens: int, device: str) -> None:
    """DeepSeek's: 128 x 128 blocks of weights, activations quantised on the way; I no multiple of 128 by much."""
    s = Sizes(4, 2, 256, 128)
    x, routes = torch.randn(tokens, s.hidden, device=device).to(HALF), routes_of(tokens, s, device)
    plain = plain_experts(s, torch.float32, device)
    weights, wide = [], []
    for w in plain[:2]:
        codes = (w.values * 64).to(E4M3)
        scale = torch.rand(s.experts, codes.shape[1] // 128, codes.shape[2] // 128, device=device) / 64
        spread = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        weights.append(Weights(codes, scale=scale, kind="fp8_block"))
        wide.append(Weights(codes.double() * spread.double()))
    experts, wide_experts = plain._replace(fc1=weights[0], fc2=weights[1]), plain._replace(fc1=wide[0], fc2=wide[1])
    out = moe(x, routes, experts)
    largest = [torch.zeros((), dtype=torch.float64, device=device)]

    def cast(hidden: torch.Tensor) -> torch.Tensor:
        largest.append(hidden.abs().amax() if hidden.numel() else largest[0])
        return quantised(hidden.to(HALF))

    oracle = narrow_dense(quantised(x), routes, wide_experts, cast, torch.float64)
    noise = one_flip(wide_experts, routes, torch.stack(largest).max(), 2.0**-3)
    assert_close_to_oracle(out, oracle, oracle.to(HALF), noise=noise.expand_as(oracle))


@pytest.mark.parametrize("tokens", [1, FEW, SORTED, MANY])
def test_mxfp4(tokens: int, device: str) -> None:
    """gpt-oss: biases, alpha, beta and limit; exact numbers in 16 bits, so only sums are rounded."""
    s = Sizes(5, 2, 96, 64)
    x, routes = torch.randn(tokens, s.hidden, device=device).to(HALF), routes_of(tokens, s, device)
    plain = plain_experts(s, HALF, device, biased=True)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
    table = torch.cat([values, -values])
    weights, wide = [], []
    for w in plain[:2]:
        codes = torch.randint(256, (*w.values.shape[:2], w.values.shape[2] // 2), dtype=torch.uint8, device=device)
        scale = torch.randint(
            121, 125, (*w.values.shape[:2], w.values.shape[2] // 32), dtype=torch.uint8, device=device
        )
        numbers = table[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]
        factor = torch.exp2(scale.float() - 127).repeat_interleave(32, -1)
        weights.append(Weights(codes, scale=scale, kind="mxfp4"))
        wide.append(Weights((numbers * factor).to(HALF)))
    parameters = [torch.full((s.experts,), v, device=device) for v in (1.702, 1.0, 7.0)]
    activation = Activation("swiglu", *parameters)
    experts = plain._replace(fc1=weights[0], fc2=weights[1], activation=activation)
    wide_experts = plain._replace(fc1=wide[0], fc2=wide[1], activation=activation)
    oracle = dense(x, routes, wide_experts, torch.float64)
    twin = dense(x, routes, wide_experts, torch.float32, HALF).to(HALF)
    assert_close_to_oracle(moe(x, routes, experts), oracle, twin)
