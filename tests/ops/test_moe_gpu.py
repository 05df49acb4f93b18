"""Mixture of experts of full size, far apart in memory, in CUDA graphs and repeated; all of it on a GPU."""

from __future__ import annotations

import pytest
import torch

from flashinfer.ops.gemm import Activation, Weights
from flashinfer.ops.moe import Experts, Routes, moe
from flashinfer.testing import assert_close_to_oracle
from tests.ops.common import captured, force
from tests.ops.moe_checks import (
    FEW,
    FULL,
    MANY,
    MODELS,
    SMALL,
    SORTED,
    Sizes,
    check,
    dense,
    order_noise,
    plain_experts,
    routes_of,
)


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(monkeypatch, "gemm", request.param, skip=False)
    return force(monkeypatch, "moe", request.param)


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
@pytest.mark.parametrize("products", ["auto", "triton"])
def test_offsets_past_two_to_the_31(
    products: str, backend: str, monkeypatch: pytest.MonkeyPatch, large_memory: None
) -> None:
    """Pairs times the hidden size: rows in the order of experts, and what experts make of them."""
    if backend == "torch":
        pytest.skip("torch's own indices")
    force(monkeypatch, "gemm", products, skip=False)
    s = Sizes(8, 8, 8192, 64)
    tokens = 2**31 // (s.top_k * s.hidden) + 70
    x, routes = torch.randn(tokens, s.hidden, device="cuda").bfloat16(), routes_of(tokens, s, "cuda")
    experts = plain_experts(s, torch.bfloat16, "cuda")
    out = moe(x, routes, experts)
    # Every token goes to all experts, so the last tokens have rows at the end of each.
    for part in (slice(0, 70), slice(tokens - 140, tokens)):
        mine = Routes(routes.ids[part], routes.weights[part])
        oracle = dense(x[part], mine, experts, torch.float64)
        twin = dense(x[part], mine, experts, torch.float32, torch.bfloat16).bfloat16()
        assert_close_to_oracle(out[part], oracle, twin, noise=order_noise(x[part], mine, experts))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("side", ["x", "out"])
def test_rows_far_apart(
    tokens: int, side: str, backend: str, monkeypatch: pytest.MonkeyPatch, large_memory: None
) -> None:
    """The last row begins 2^31 elements after the first one, or more."""
    if backend == "torch":
        pytest.skip("torch's own strides")
    force(monkeypatch, "gemm", "auto", skip=False)
    s = MODELS[0]
    stride = -(-(2**31) // (tokens - 1) // 64) * 64 + 64
    x = torch.randn(tokens, s.hidden, device="cuda").bfloat16()
    routes, experts = routes_of(tokens, s, "cuda"), plain_experts(s, torch.bfloat16, "cuda")
    near = check(x, routes, experts)
    room = torch.empty((tokens - 1) * stride + s.hidden, dtype=torch.bfloat16, device="cuda")
    far = room.as_strided((tokens, s.hidden), (stride, 1))
    if side == "x":
        assert torch.equal(moe(far.copy_(x), routes, experts), near)
    else:
        assert torch.equal(moe(x, routes, experts, out=far), near)


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
