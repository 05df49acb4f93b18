"""Mixture of experts against a dense loop in fp64, on every implementation, for few tokens and for many."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch

from flashinfer.core import replay
from flashinfer.ops.gemm import Activation, Weights
from flashinfer.ops.moe import BLOCK, Experts, Routes, moe
from flashinfer.testing import assert_close_to_oracle, poisoned
from tests.ops.common import DEVICE, captured, force, skip_unless_runs
from tests.ops.gemm_checks import ORDER, wiggled

E4M3 = torch.float8_e4m3fn
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# As the kernels tell them apart: those that find their pairs themselves, sorted ones, grouped products.
FEW, SORTED, MANY = 5, 33, 65
ACTIVATIONS = ("swiglu", "geglu", "relu2", "silu", "gelu", "relu", "identity")


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(monkeypatch, "gemm", request.param, skip=False)
    return force(monkeypatch, "moe", request.param)


class Sizes(NamedTuple):
    """experts, top_k, H, I."""

    experts: int
    top_k: int
    hidden: int
    inter: int


SMALL = Sizes(6, 2, 72, 40)
# Mixtral, Qwen3-30B-A3B, DeepSeek-V3, gpt-oss, scaled down
MODELS = (Sizes(8, 2, 128, 448), Sizes(32, 8, 64, 24), Sizes(64, 8, 224, 64), Sizes(16, 4, 90, 90))
FULL = (Sizes(8, 2, 4096, 14336), Sizes(128, 8, 2048, 768), Sizes(256, 8, 7168, 2048), Sizes(32, 4, 2880, 2880))


def routes_of(tokens: int, s: Sizes, device: str) -> Routes:
    """Every token goes to `top_k` different experts."""
    ids = torch.rand(tokens, s.experts, device=device).argsort(-1)[:, : s.top_k].int().contiguous()
    return Routes(ids, torch.rand(tokens, s.top_k, device=device))


def plain_experts(s: Sizes, dtype: torch.dtype, device: str, kind: str = "swiglu", biased: bool = False) -> Experts:
    activation = Activation(kind)
    rows = s.inter * (2 if activation.gated else 1)
    normal = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    fc1, fc2 = (
        Weights((torch.randn(s.experts, n, k, device=device) / math.sqrt(k)).to(dtype))
        for n, k in ((rows, s.hidden), (s.hidden, s.inter))
    )
    biases = (normal(s.experts, rows), normal(s.experts, s.hidden)) if biased else (None, None)
    return Experts(fc1, fc2, activation, *biases)


def activated(x: torch.Tensor, activation: Activation, expert: int) -> torch.Tensor:
    """The activation of sums `x`, written from its definition."""
    functions = {
        "relu2": lambda v: v.clamp(min=0) ** 2,
        "silu": lambda v: v * v.sigmoid(),
        "gelu": lambda v: 0.5 * v * torch.special.erfc(-v / math.sqrt(2)),
        "relu": lambda v: v.clamp(min=0),
        "identity": lambda v: v,
    }
    if not activation.gated:
        return functions[activation.kind](x)
    up, gate = x.chunk(2, dim=-1)
    if activation.kind == "geglu":
        return functions["gelu"](gate) * up
    alpha, beta, limit = (
        default if t is None else float(t[expert])
        for t, default in zip(activation[1:], (1.0, 0.0, math.inf), strict=True)
    )
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (alpha * gate).sigmoid() * (up + beta)


def dense(
    x: torch.Tensor, routes: Routes, experts: Experts, dtype: torch.dtype, between: torch.dtype | None = None
) -> torch.Tensor:
    """Token by token, expert by expert, sums in `dtype`; what lies between the products rounded to `between`."""
    fc1, fc2 = experts.fc1.values.to(dtype), experts.fc2.values.to(dtype)
    out = torch.zeros(x.shape[0], fc2.shape[1], dtype=dtype, device=x.device)
    local = routes.ids - routes.first_expert
    for e in range(fc1.shape[0]):
        tokens, place = (local == e).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        sums = x[tokens].to(dtype) @ fc1[e].T
        if experts.bias1 is not None:
            sums = sums + experts.bias1[e].to(dtype)
        hidden = activated(sums, experts.activation, e)
        y = (hidden if between is None else hidden.to(between).to(dtype)) @ fc2[e].T
        if experts.bias2 is not None:
            y = y + experts.bias2[e].to(dtype)
        if between is not None:
            y = y.to(between).to(dtype)
        out.index_add_(0, tokens, y * routes.weights[tokens, place, None].to(dtype))
    return out


def order_noise(x: torch.Tensor, routes: Routes, experts: Experts) -> torch.Tensor:
    """What the order of sums in fp32 may change, to first order."""
    fc1, fc2 = experts.fc1.values.double(), experts.fc2.values.double()
    noise = torch.zeros(x.shape[0], fc2.shape[1], dtype=torch.float64, device=x.device)
    local, x = routes.ids - routes.first_expert, x.double()
    for e in range(fc1.shape[0]):
        tokens, place = (local == e).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        sums, size = x[tokens] @ fc1[e].T, x[tokens].abs() @ fc1[e].abs().T
        if experts.bias1 is not None:
            sums, size = sums + experts.bias1[e].double(), size + experts.bias1[e].double().abs()
        function = partial(activated, activation=experts.activation, expert=e)
        moved = wiggled(function, sums, ORDER * size) + ORDER * function(sums).abs()
        size = function(sums).abs() @ fc2[e].abs().T
        if experts.bias2 is not None:
            size = size + experts.bias2[e].double().abs()
        moved = moved @ fc2[e].abs().T + ORDER * size
        noise.index_add_(0, tokens, moved * routes.weights[tokens, place, None].double().abs())
    return noise


def check(x: torch.Tensor, routes: Routes, experts: Experts) -> torch.Tensor:
    """Run, compare with fp64, by torch's error in fp32 with roundings between the products; returns the result."""
    out = poisoned((x.shape[0], experts.fc2.values.shape[1]), x.dtype, x.device)
    assert moe(x, routes, experts, out=out) is out
    oracle = dense(x, routes, experts, torch.float64)
    twin = dense(x, routes, experts, torch.float32, x.dtype).to(x.dtype)
    assert_close_to_oracle(out, oracle, twin, noise=order_noise(x, routes, experts))
    return out


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


@pytest.mark.parametrize("tokens", [FEW, SORTED, MANY])
def test_all_tokens_to_one_expert(tokens: int, device: str) -> None:
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
        assert_close_to_oracle(total, oracle, twin)


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


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 700])
@pytest.mark.parametrize("sizes", FULL)
def test_models_in_full(
    tokens: int, sizes: Sizes, backend: str, monkeypatch: pytest.MonkeyPatch, large_memory: None
) -> None:
    """Weights of a model's size, 20 GB for the largest, as a server would call it: products by their best kernels.

    The dense loop is torch's in fp32 without TF32.
    """
    if backend == "torch":
        pytest.skip("one run of all that is automatic")
    for op in ("gemm", "moe"):
        force(monkeypatch, op, "auto", skip=False)
    torch.manual_seed(tokens)
    fc1 = torch.empty(sizes.experts, 2 * sizes.inter, sizes.hidden, dtype=torch.bfloat16, device="cuda")
    fc2 = torch.empty(sizes.experts, sizes.hidden, sizes.inter, dtype=torch.bfloat16, device="cuda")
    for w in (fc1, fc2):
        w.normal_(std=w.shape[2] ** -0.5)
    x, routes = torch.randn(tokens, sizes.hidden, device="cuda").bfloat16(), routes_of(tokens, sizes, "cuda")
    out = moe(x, routes, Experts(Weights(fc1), Weights(fc2), Activation("swiglu")))
    oracle, twin = torch.zeros(out.shape, dtype=torch.float64, device="cuda"), torch.zeros(out.shape, device="cuda")
    for e in range(sizes.experts):
        tokens_of, place = (routes.ids == e).nonzero(as_tuple=True)
        if len(tokens_of):
            one = Routes(
                torch.zeros(len(tokens_of), 1, dtype=torch.int32, device="cuda"), routes.weights[tokens_of, place, None]
            )
            experts = Experts(Weights(fc1[e : e + 1]), Weights(fc2[e : e + 1]), Activation("swiglu"))
            oracle.index_add_(0, tokens_of, dense(x[tokens_of], one, experts, torch.float64))
            twin.index_add_(0, tokens_of, dense(x[tokens_of], one, experts, torch.float32, torch.bfloat16))
    assert_close_to_oracle(out, oracle, twin.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, FEW, SORTED, MANY, 3000])
def test_graph_replays_for_other_groups(tokens: int, backend: str) -> None:
    """Ids change between replays: other sizes of groups, all tokens to one expert, nobody here."""
    if backend == "torch":
        pytest.skip("the reference reads the sizes of groups")
    sizes = MODELS[0]
    x, routes = torch.randn(tokens, sizes.hidden, device="cuda").bfloat16(), routes_of(tokens, sizes, "cuda")
    experts = plain_experts(sizes, torch.bfloat16, "cuda")
    out = torch.empty_like(x)
    graph = captured(lambda: moe(x, routes, experts, out=out))
    for ids in (routes_of(tokens, sizes, "cuda").ids, torch.full_like(routes.ids, 5), torch.full_like(routes.ids, -1)):
        routes.ids.copy_(ids)
        x.copy_(torch.randn_like(x))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, moe(x, routes, experts))
        assert bool(out.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_no_host_sync(tokens: int, backend: str) -> None:
    if backend == "torch":
        pytest.skip("the reference reads the sizes of groups")
    x, routes = torch.randn(tokens, SMALL.hidden, device="cuda"), routes_of(tokens, SMALL, "cuda")
    experts = plain_experts(SMALL, torch.float32, "cuda")
    moe(x, routes, experts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe(x, routes, experts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, FEW, SORTED, MANY])
def test_calls_are_repeated(tokens: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third call of a kind launches from memory, with scratch memory of the size that the first one noted."""
    if backend == "torch":
        pytest.skip("the reference launches nothing of ours")
    from flashinfer.core.launch import Prebound

    sizes = MODELS[0]
    experts = plain_experts(sizes, torch.bfloat16, "cuda")
    calls = [
        (torch.randn(tokens, sizes.hidden, device="cuda").bfloat16(), routes_of(tokens, sizes, "cuda"))
        for _ in range(3)
    ]
    expected = [moe(x, routes, experts) for x, routes in calls]

    def launch(*arguments: object, **options: object) -> None:
        raise AssertionError("not repeated")

    monkeypatch.setattr(Prebound, "__call__", launch)
    for (x, routes), wanted in zip(calls, expected, strict=True):
        assert torch.equal(moe(x, routes, experts), wanted)


@pytest.mark.gpu
@pytest.mark.compiles
def test_compile(backend: str) -> None:
    x, routes = torch.randn(FEW, SMALL.hidden, device="cuda"), routes_of(FEW, SMALL, "cuda")
    experts = plain_experts(SMALL, torch.float32, "cuda")
    compiled = torch.compile(lambda x: moe(x * 2, routes, experts) + 1, fullgraph=True)
    assert torch.equal(compiled(x), moe(x * 2, routes, experts) + 1)


@pytest.mark.gpu
def test_thousands_of_tokens() -> None:
    """More pairs than one program sorts; groups of very different sizes."""
    sizes = Sizes(64, 8, 256, 128)
    x, routes = torch.randn(9001, sizes.hidden, device="cuda").bfloat16(), routes_of(9001, sizes, "cuda")
    routes.ids[:8000, 0] = 3
    check(x, routes, plain_experts(sizes, torch.bfloat16, "cuda"))
