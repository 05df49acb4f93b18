"""Triton's softmax, masks and renormalisation against torch: interpreted, or at full size on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashinfer.ops import sampling as ops
from flashinfer.ops.sampling import Filters, reference
from flashinfer.testing import assert_close_to_oracle
from tests.ops.sampling_checks import DTYPES, LARGE, ON_GPU, random_logits, softmax_noise


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 1000 if ON_GPU else 5])
def test_softmax(rows: int, dtype: torch.dtype, device: str) -> None:
    """Several programs a row, and one."""
    x = (torch.randn(rows, 9001, device=device) * 5).to(dtype)
    temperature = torch.rand(rows, device=device) + 0.3
    got = ops.softmax(x, temperature, backend="triton")
    oracle = torch.softmax(x.double() / temperature[:, None].double(), -1)
    noise = softmax_noise(x, temperature[:, None].double(), oracle)
    assert_close_to_oracle(got, oracle, torch.softmax(x.float() / temperature[:, None], -1), noise=noise)


def test_softmax_of_extremes(device: str) -> None:
    x = torch.tensor([[1e30, -torch.inf, 1e30, 0.0], [-1e30, -2e30, -torch.inf, -torch.inf]], device=device)
    expected = torch.tensor([[0.5, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]], device=device)
    for rows in (x, x.repeat(100 if ON_GPU else 2, 1)):
        for temperature in (1.0, 2.0, 0.0, torch.zeros(rows.shape[0], device=device)):
            got = ops.softmax(rows, temperature, backend="triton")
            assert torch.equal(got, expected.repeat(rows.shape[0] // 2, 1))
    for hopeless in (torch.nan, -torch.inf):
        assert ops.softmax(torch.full((1, 9), hopeless, device=device), 1.0, backend="triton").isnan().all()


@pytest.mark.parametrize("scale", [1.0, 4.0] if ON_GPU else [1.0], ids=str)
@pytest.mark.parametrize(
    "filters",
    [
        *({"top_k": k} for k in (1, 50, 5000, 10**6)),
        *({"top_p": p} for p in (0.0, 0.1, 0.9, 1.0)),
        *({"min_p": p} for p in (0.0, 0.2)),
    ],
)
def test_renormalise(filters: dict[str, Any], scale: float, device: str) -> None:
    """Kept tokens are those of the torch implementation, but for ones that rounding of the mass may decide."""
    probs = random_logits(3, LARGE, device, scale).softmax(-1)
    got = ops.renormalise(probs, Filters(**filters), backend="triton")
    keep = reference.kept_by(probs, Filters(**filters))
    assert keep is not None
    differing = (got > 0) != keep
    assert differing.sum(-1).max() <= (2 if "top_p" in filters else 0)
    oracle = torch.where(got > 0, probs.double(), 0.0)
    twin = torch.where(got > 0, probs, 0.0)
    assert_close_to_oracle(got, oracle / oracle.sum(-1, keepdim=True), twin / twin.sum(-1, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_and_renormalise_dtypes_and_ties(dtype: torch.dtype, device: str) -> None:
    """Half precision makes many ties: all are kept."""
    x = random_logits(4, 5000, device).to(dtype)
    k = torch.tensor([1, 40, 700, 5000], device=device)
    got = ops.mask_logits(x, k, backend="triton")
    assert torch.equal(got, reference.mask_logits(x, k))
    probs = x.float().softmax(-1).to(dtype)
    kept = ops.renormalise(probs, Filters(top_k=k), backend="triton")
    assert kept.dtype == dtype
    keep = reference.keep_top_k(probs, k)
    twin = torch.where(keep, probs, 0.0)
    oracle = twin.double() / twin.double().sum(-1, keepdim=True)
    assert_close_to_oracle(kept, oracle, twin / twin.sum(-1, keepdim=True))


def test_rows_without_weight_are_left(device: str) -> None:
    probs = torch.zeros(2, 100, device=device)
    probs[1, 7] = 4.0
    for filters in (Filters(top_k=3), Filters(top_p=0.5)):
        got = ops.renormalise(probs, filters, backend="triton")
        assert not got[0].any()
        assert got[1, 7] == 1 and got[1].sum() == 1
    masked = ops.mask_logits(torch.full((1, 100), -torch.inf, device=device), 3, backend="triton")
    assert (masked == -torch.inf).all()


def test_nan_counts_as_nothing(device: str) -> None:
    """A NaN is impossible among probabilities and logits; its row is otherwise as if it held 0 and -inf there."""
    x = random_logits(2, 300, device)
    probs = x.softmax(-1)
    worst = int(probs[0].argmax())
    without, damaged = probs.clone(), probs.clone()
    without[0, worst], damaged[0, worst] = 0.0, torch.nan
    for filters in (Filters(top_k=5), Filters(top_p=0.6), Filters(min_p=0.3)):
        for backend in ("torch", "triton"):
            got = ops.renormalise(damaged, filters, backend=backend)
            assert torch.equal(got, ops.renormalise(without, filters, backend=backend))
    x[0, worst] = torch.nan
    for backend in ("torch", "triton"):
        masked = ops.mask_logits(x, 5, backend=backend)
        assert masked[0, worst] == -torch.inf
        assert (masked > -torch.inf).sum(-1).tolist() == [5, 5]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sums_that_meet_top_p_exactly(backend: str, device: str) -> None:
    """What weighs exactly top_p is the nucleus; the next token is not in it."""
    probs = torch.zeros(1, 3000, device=device)
    probs[0, [7, 2999, 0, 1500]] = torch.tensor([0.5, 0.25, 0.125, 0.125], device=device)
    for top_p, tokens in ((0.5, [7]), (0.75, [7, 2999]), (0.751, [0, 7, 1500, 2999])):
        got = ops.renormalise(probs, Filters(top_p=top_p), backend=backend)
        assert got[0].nonzero().flatten().tolist() == tokens


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fewer_possible_tokens_than_top_k(backend: str, device: str) -> None:
    """Zeros and -inf never count as kept, however large k is."""
    logits = torch.full((2, LARGE), -torch.inf, device=device)
    places = [3, LARGE // 2, LARGE - 1]
    logits[:, places] = torch.tensor([1.0, 2.0, 3.0], device=device)
    masked = ops.mask_logits(logits, 50, backend=backend)
    assert torch.equal(masked, logits)
    for k in (2, 3, 50, LARGE):
        got = ops.renormalise(logits.softmax(-1), Filters(top_k=k), backend=backend)
        assert got[1].nonzero().flatten().tolist() == places[-min(k, 3) :]
