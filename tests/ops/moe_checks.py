"""Mixtures of experts to test with: sizes, random weights, and a dense loop that tells what comes out."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch

from flashinfer.ops.gemm import Activation, Weights
from flashinfer.ops.moe import Experts, Routes, moe
from flashinfer.testing import assert_close_to_oracle, poisoned
from tests.ops.common import DEVICE
from tests.ops.gemm_checks import ORDER, wiggled

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# As the kernels tell them apart: those that find their pairs themselves, sorted ones, grouped products.
FEW, SORTED, MANY = 5, 33, 65


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
