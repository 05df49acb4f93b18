"""Routing against a plain sort in fp64, on every implementation."""

from __future__ import annotations

import random

import pytest
import torch

from flashinfer.fused_moe import RoutingMethodType, fused_topk_deepseek, hash_topk, route
from flashinfer.testing import assert_close_to_oracle, poisoned
from tests.ops.common import captured, far_rows, force

Method = RoutingMethodType
SCORES = {
    Method.Default: "softmax",
    Method.Renormalize: "softmax",
    Method.DeepSeekV3: "sigmoid",
    Method.Llama4: "sigmoid",
    Method.RenormalizeNaive: "softmax",
    Method.TopK: "identity",
    Method.SigmoidRenorm: "sigmoid",
    Method.MiniMax2: "sigmoid",
    Method.Sigmoid: "sigmoid",
    Method.TopKSigmoid: "sigmoid",
}
RENORMALISED = (
    Method.Renormalize,
    Method.DeepSeekV3,
    Method.RenormalizeNaive,
    Method.SigmoidRenorm,
    Method.MiniMax2,
)
# experts, top_k: Mixtral, Qwen3-30B-A3B, gpt-oss, Llama 4, odd ones
SIZES = ((8, 2), (128, 8), (32, 4), (16, 1), (7, 7), (1, 1), (160, 6), (513, 10))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["torch", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return force(monkeypatch, "routing", request.param)


def scores_of(logits: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    x = logits.to(dtype)
    if name == "softmax":
        return x.softmax(-1)
    if name == "identity":
        return x
    return x.sigmoid() if name == "sigmoid" else torch.nn.functional.softplus(x).sqrt()


def weights_of(scores: torch.Tensor, ids: torch.Tensor, renormalise: bool, scale: float) -> torch.Tensor:
    weights = scores.gather(1, ids.long())
    return (weights / weights.sum(1, keepdim=True) if renormalise else weights) * scale


def distinct(tokens: int, experts: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Logits no two of which are equal in a row, however coarse the dtype: 1/16 apart."""
    order = torch.rand(tokens, experts, device=device).argsort(-1)
    return ((order - experts / 2) / 16).to(dtype)


def check_weights(
    weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, score: str, renormalise: bool, scale: float = 1.0
) -> None:
    oracle, twin = (
        weights_of(scores_of(logits, score, t), ids, renormalise, scale) for t in (torch.float64, torch.float32)
    )
    assert_close_to_oracle(weights, oracle, twin, "weights")


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize("size", SIZES)
def test_methods(method: RoutingMethodType, size: tuple[int, int], device: str, rng: random.Random) -> None:
    experts, top_k = size
    dtype = rng.choice(DTYPES) if experts <= 160 else torch.float32  # bf16 cannot tell so many apart
    logits = distinct(9, experts, dtype, device)
    weights, ids = route(logits, top_k, method)
    assert (weights.dtype, ids.dtype, weights.shape, ids.shape) == (torch.float32, torch.int32, (9, top_k), (9, top_k))
    assert torch.equal(ids, logits.float().topk(top_k, dim=-1).indices.int())
    check_weights(weights, ids, logits, SCORES[method], method in RENORMALISED)


def grouped_choice(logits: torch.Tensor, bias: torch.Tensor, n_group: int, topk_group: int, top_k: int) -> torch.Tensor:
    """Expert ids by plain loops."""
    chosen = []
    for row in (logits.double().sigmoid() + bias.double()).tolist():
        size = len(row) // n_group
        groups = [sum(sorted(row[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
        kept = sorted(range(n_group), key=lambda g: -groups[g])[:topk_group]
        experts = [e for g in kept for e in range(g * size, (g + 1) * size)]
        chosen.append(sorted(experts, key=lambda e: -row[e])[:top_k])
    return torch.tensor(chosen, dtype=torch.int32, device=logits.device)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("experts", "n_group", "topk_group", "top_k"),
    [(256, 8, 4, 8), (160, 8, 3, 6), (384, 1, 1, 8), (24, 3, 2, 4), (12, 12, 5, 5), (18, 3, 1, 6)],
)
def test_fused_topk_deepseek(
    experts: int, n_group: int, topk_group: int, top_k: int, ids_dtype: torch.dtype, device: str
) -> None:
    logits = torch.randn(13, experts, device=device)
    bias = torch.rand(experts, device=device) - 1.5  # biased scores are negative: a group dropped is not one of zeros
    values, ids = poisoned((13, top_k), torch.float32, device), poisoned((13, top_k), ids_dtype, device)
    replay = poisoned((15, top_k), torch.int16, device)
    fused_topk_deepseek(logits, bias, n_group, topk_group, top_k, 2.5, values, ids, routing_replay_out=replay)
    assert torch.equal(ids.int(), grouped_choice(logits, bias, n_group, topk_group, top_k))
    assert torch.equal(replay[:13].int(), ids.int())
    assert bool((replay[13:] == torch.iinfo(torch.int16).max).all())
    check_weights(values, ids, logits, "sigmoid", True, 2.5)


def test_minimax_adds_the_bias_for_the_choice_alone(device: str) -> None:
    logits, bias = torch.randn(40, 64, device=device), torch.randn(64, device=device)
    weights, ids = route(logits, 4, Method.MiniMax2, bias=bias)
    expected = (logits.double().sigmoid() + bias.double()).topk(4, dim=-1).indices
    assert torch.equal(ids.long(), expected)
    check_weights(weights, ids, logits, "sigmoid", True)


def test_equal_scores_are_taken_in_order(device: str) -> None:
    logits = torch.zeros(3, 20, device=device)
    logits[1, 10:] = 1.0
    logits[2, ::2] = -0.0
    _, ids = route(logits, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13], [0, 1, 2, 3]]
    values, ids = torch.empty(3, 4, device=device), torch.empty(3, 4, dtype=torch.int32, device=device)
    fused_topk_deepseek(torch.zeros(3, 24, device=device), torch.zeros(24, device=device), 4, 2, 4, 1.0, values, ids)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3


def test_saturated_sigmoids_are_told_apart(device: str) -> None:
    """All sigmoids are 1 in fp32; the largest logit is chosen all the same, as in top-k before sigmoid."""
    logits = torch.arange(16, device=device).float()[None] + 30
    weights, ids = route(logits, 2, Method.Llama4)
    assert ids.tolist() == [[15, 14]]
    assert weights.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("method", SCORES)
def test_nan_and_infinity(method: RoutingMethodType, device: str) -> None:
    """Ids stay in range and distinct; a NaN is the last to be chosen; other rows are untouched."""
    logits = torch.randn(6, 12, device=device)
    clean = logits.clone()
    logits[1] = float("nan")
    logits[2, :9] = float("nan")
    logits[3] = -float("inf")
    logits[4, 5] = float("inf")
    weights, ids = route(logits, 4, method)
    for row in ids.tolist():
        assert len(set(row)) == 4 and all(0 <= e < 12 for e in row)
    assert set(ids[2, :3].tolist()) == {9, 10, 11}
    assert int(ids[4, 0]) == 5
    expected, expected_ids = route(clean, 4, method)
    assert torch.equal(weights[[0, 5]], expected[[0, 5]]) and torch.equal(ids[[0, 5]], expected_ids[[0, 5]])
    assert bool(weights[1].isnan().all())


def test_no_tokens(device: str) -> None:
    weights, ids = route(torch.empty(0, 8, device=device), 2)
    assert weights.shape == ids.shape == (0, 2)


def test_views_and_outputs_of_the_caller(device: str) -> None:
    wide = torch.randn(11, 3 * 16, device=device)
    room_w, room_i = poisoned((11, 9), torch.float16, device), poisoned((11, 9), torch.int64, device)
    out = (room_w[:, 2:5], room_i[:, 1:4])
    weights, ids = route(wide[:, 16:32], 3, out=out)
    assert weights is out[0] and ids is out[1]
    expected, expected_ids = route(wide[:, 16:32].contiguous(), 3)
    assert torch.equal(weights, expected.half()) and torch.equal(ids.int(), expected_ids)
    assert bool(room_w[:, :2].isnan().all()) and bool(room_w[:, 5:].isnan().all())
    assert bool((room_i[:, 0] == torch.iinfo(torch.int64).max).all())


def test_thousands_of_tokens(device: str) -> None:
    tokens = 3000 if device == "cuda" else 300
    logits = distinct(tokens, 8, torch.float32, device)
    weights, ids = route(logits, 2)
    assert torch.equal(ids, logits.topk(2, dim=-1).indices.int())
    check_weights(weights, ids, logits, "softmax", True)


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("top_k", [6, 1])
def test_hash_topk(shared: int, top_k: int, device: str) -> None:
    logits = (torch.randn(21, 64, device=device) * 20).clamp(-60, 60)  # a smaller softplus is lost beside the least sum
    table = torch.rand(50, 64, device=device).argsort(-1)[:, :top_k].int().contiguous()
    tokens = torch.randint(50, (21,), device=device)
    weights, ids = hash_topk(logits, tokens, table, shared, 2.5)
    assert torch.equal(ids[:, :top_k], table[tokens])
    oracle, twin = (
        weights_of(scores_of(logits, "sqrt_softplus", dtype), table[tokens], True, 1.0)
        for dtype in (torch.float64, torch.float32)
    )
    # torch's softplus gives up above 20 what fp32 cannot hold; below it loses nothing.
    assert_close_to_oracle(weights[:, :top_k].contiguous(), oracle, twin)
    if shared:
        assert bool((ids[:, top_k] == 64).all()) and torch.equal(weights[:, top_k], torch.full_like(weights[:, 0], 0.4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 9}, "top_k: got 9"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 3, "n_group": 3}, "n_group"),
        ({"top_k": 3, "n_group": 4, "topk_group": 1}, "top_k: got 3"),
        ({"top_k": 3, "n_group": 4, "topk_group": 5}, "topk_group: got 5"),
        ({"top_k": 3, "method": Method.Unspecified}, "method"),
        ({"top_k": 3, "bias": torch.zeros(8)}, "bias"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(torch.zeros(2, 8), **arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_rows_past_2_31_elements() -> None:
    logits = far_rows(2**29, 64, torch.float16)
    _, ids = route(logits, 4)
    assert torch.equal(ids, route(logits.contiguous(), 4)[1])


@pytest.mark.gpu
def test_graph() -> None:
    logits = torch.randn(33, 128, device="cuda")
    out = (torch.empty(33, 8, device="cuda"), torch.empty(33, 8, dtype=torch.int32, device="cuda"))
    graph = captured(lambda: route(logits, 8, out=out))
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    expected, expected_ids = route(logits, 8)
    assert torch.equal(out[0], expected) and torch.equal(out[1], expected_ids)


@pytest.mark.gpu
@pytest.mark.compiles
def test_compile() -> None:
    logits = torch.randn(33, 64, device="cuda")
    weights, ids = torch.compile(lambda x: route(x, 4), fullgraph=True)(logits)
    expected, expected_ids = route(logits, 4)
    assert torch.equal(weights, expected) and torch.equal(ids, expected_ids)
