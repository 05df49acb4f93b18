"""Sampling: distributions by chi-square, supports, determinism, filters against a loop over sorted rows, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from flashinfer import sampling
from flashinfer.ops.sampling import reference
from flashinfer.testing import assert_close_to_oracle
from tests.ops.sampling_checks import ROUNDING, assert_distributed, softmax_noise

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DRAWS = 40_000
Tensor = torch.Tensor
Call = Callable[..., Tensor]

TOP_K, TOP_P, MIN_P = 5, 0.7, 0.2


def kept(row: Tensor, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None) -> Tensor:
    """The tokens of one fp64 row that pass one filter, in a plain loop."""
    row = row / row.sum()
    if min_p is not None:
        return row >= min_p * row.max()
    threshold, total = 0.0, 0.0
    for i, p in enumerate(row.sort(descending=True).values.tolist()):
        if (top_k is not None and i >= top_k) or (top_p is not None and total >= top_p):
            break
        threshold, total = p, total + p
    return row >= threshold


def top_k_then_top_p(row: Tensor) -> Tensor:
    first = kept(row, top_k=TOP_K)
    return first & kept(torch.where(first, row, 0.0), top_p=TOP_P)


def joint(row: Tensor) -> Tensor:
    return kept(row, top_k=TOP_K) & kept(row, top_p=TOP_P)


def logits_of(probs: Tensor) -> Tensor:
    return probs.log() + 3.0


def of_logits(call: Call, **fixed: Any) -> Call:
    """`call`, which takes logits, as a function of probs."""
    return lambda probs, **keywords: call(logits_of(probs), **fixed, **keywords)


BOTH = {"top_k": TOP_K, "top_p": TOP_P}
JOINT = {**BOTH, "filter_apply_order": "joint"}
# name -> (call on probs, the tokens it may draw as a function of one fp64 row)
SAMPLERS: dict[str, tuple[Call, Call]] = {
    "probs": (sampling.sampling_from_probs, torch.ones_like),
    "logits": (of_logits(sampling.sampling_from_logits), torch.ones_like),
    "top_p": (partial(sampling.top_p_sampling_from_probs, top_p=TOP_P), partial(kept, top_p=TOP_P)),
    "top_k": (partial(sampling.top_k_sampling_from_probs, top_k=TOP_K), partial(kept, top_k=TOP_K)),
    "min_p": (partial(sampling.min_p_sampling_from_probs, min_p=MIN_P), partial(kept, min_p=MIN_P)),
    "top_k_first": (partial(sampling.top_k_top_p_sampling_from_probs, **BOTH), top_k_then_top_p),
    "joint": (partial(sampling.top_k_top_p_sampling_from_probs, **JOINT), joint),
    "logits_top_k_first": (of_logits(sampling.top_k_top_p_sampling_from_logits, **BOTH), top_k_then_top_p),
    "logits_joint": (of_logits(sampling.top_k_top_p_sampling_from_logits, **JOINT), joint),
}
FROM_PROBS = [name for name in SAMPLERS if "logits" not in name]


@pytest.fixture(params=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> tuple[Call, Call]:
    return SAMPLERS[request.param]


def spread_row(vocab: int, device: str) -> Tensor:
    """Random probabilities `[vocab]`, all different, none near a filter's threshold by chance of rounding."""
    ranks = torch.arange(1, vocab + 1, dtype=torch.float64) ** -1.3
    row = (ranks / ranks.sum())[torch.randperm(vocab)]
    return row.float().to(device)


def test_the_chi_square_can_fail() -> None:
    """A tenth of one token's probability moved to another is seen."""
    probs = torch.full((10,), 0.1)
    skewed = probs.clone()
    skewed[0], skewed[1] = 0.09, 0.11
    samples = torch.multinomial(skewed, DRAWS, replacement=True)
    assert_distributed(samples, skewed)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_distributed(samples, probs)


# --- distributions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 2, 23])
def test_distribution(sampler: tuple, vocab: int, device: str) -> None:
    """Many draws of one row, through `indices`; the other row must not be seen."""
    call, support = sampler
    rows = torch.stack([spread_row(vocab, device) for _ in range(2)])
    indices = torch.ones(DRAWS, dtype=torch.int32, device=device)
    samples = call(rows, indices=indices)
    row = rows[1].double().cpu()
    assert_distributed(samples, torch.where(support(row).bool(), row, 0.0))


def test_distribution_over_rows_and_calls(sampler: tuple, device: str) -> None:
    """Rows of one call, and calls with rising offsets, are independent draws."""
    call, support = sampler
    row = spread_row(7, device)
    rows = row.expand(DRAWS // 100, 7)
    seed = int(torch.randint(2**62, ()))
    samples = torch.cat([call(rows, seed=seed, offset=i) for i in range(100)])
    assert_distributed(samples, torch.where(support(row.double().cpu()).bool(), row.double().cpu(), 0.0))


def test_pairs_of_rows_are_independent(device: str) -> None:
    """Neighbouring rows together take each pair of tokens as often as independence says."""
    row = spread_row(4, device)
    samples = sampling.sampling_from_probs(row.expand(DRAWS, 4)).long()
    pairs = samples[0::2] * 4 + samples[1::2]
    assert_distributed(pairs, torch.outer(row, row).flatten())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    """Filters see the numbers as they were rounded to dtype, ties and all."""
    call, support = SAMPLERS[name]
    probs = torch.stack([spread_row(64, device) for _ in range(50)]).to(dtype)
    seen = torch.softmax(logits_of(probs).double(), dim=-1) if "logits" in name else probs.double()
    samples = call(probs)
    assert samples.dtype == torch.int32
    assert samples.shape == (50,)
    for row, token in zip(seen.cpu(), samples.tolist(), strict=True):
        assert support(row)[token]


def test_small_probabilities_are_drawn_and_zeros_are_not(device: str) -> None:
    """A large vocabulary whose weight is all in a few tokens, far apart in size."""
    probs = torch.zeros(1, 100_003, device=device)
    probs[0, [0, 51_234, 100_002]] = torch.tensor([1e-30, 1e-30, 2e-30], device=device)
    indices = torch.zeros(100, dtype=torch.int64, device=device)
    assert_distributed(sampling.sampling_from_probs(probs, indices=indices), probs[0])


def test_draws_at_the_ends_of_intervals(device: str) -> None:
    """A draw of 0 gives the first token with weight; the draw at which a token's interval ends gives the next one."""
    probs = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.5, 0.0]], device=device).expand(4, 6)
    draws = torch.tensor([0.0, 0.4999, 0.5, 1 - 2.0**-53], dtype=torch.float64, device=device)
    tokens, valid = reference.inverse_transform(probs, None, draws)
    assert tokens.tolist() == [2, 2, 4, 4]
    assert valid.all()


def test_top_p_of_flat_and_steep_rows(device: str) -> None:
    """Vocabularies in which a few tokens hold the mass, and ones in which thousands are needed for it.

    Whether a token is in is decided by two fp32 sums of at most 5000 numbers: what weighs more, and the whole. A lane
    adds at most 16 numbers one by one and lanes are added in a tree of at most 13 levels, so that a sum errs by 29
    roundings at most: nearer to top_p than twice that a token may be in or out.
    """
    flat = torch.rand(3, 5000, device=device) + 0.5
    steep = torch.softmax(20 * torch.rand(3, 5000, device=device), dim=-1)
    for probs in (flat, steep, torch.cat([flat, steep])):
        wide = probs.double() / probs.double().sum(-1, keepdim=True)
        ordered, order = wide.sort(-1, descending=True)
        above = torch.empty_like(wide).scatter_(1, order, ordered.cumsum(-1) - ordered)
        for top_p in (0.3, 0.9, 0.9999):
            kept_tokens = sampling.top_p_renorm_probs(probs, top_p) > 0
            sure = (above - top_p).abs() > 2 * 29 * ROUNDING
            assert (~sure).sum() < 100
            assert torch.equal(kept_tokens[sure], (above < top_p)[sure])


# --- parameters --------------------------------------------------------------------------------------------------


def test_parameters_for_each_row(device: str) -> None:
    """A tensor parameter means, row for row, what the scalar means; with `indices` it follows the rows of probs."""
    probs = torch.stack([spread_row(40, device) for _ in range(6)])
    top_k = torch.tensor([1, 2, 5, 40, 41, 1 << 30], device=device)
    top_p = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.99, 1.0], device=device)
    draws = torch.arange(6, device=device).repeat_interleave(500)
    seeded = {"indices": draws, "seed": 5, "offset": 9}
    cases: list[tuple[Call, tuple[Tensor, ...]]] = [
        (sampling.top_k_sampling_from_probs, (top_k,)),
        (sampling.top_k_sampling_from_probs, (top_k.int(),)),
        (sampling.top_p_sampling_from_probs, (top_p,)),
        (sampling.min_p_sampling_from_probs, (top_p,)),
        (sampling.top_k_top_p_sampling_from_probs, (top_k, top_p)),
    ]
    for call, parameters in cases:
        got = call(probs, *parameters, **seeded)
        for row in range(6):
            alone = call(probs, *(p[row].item() for p in parameters), **seeded)
            assert torch.equal(got[draws == row], alone[draws == row])


def test_parameters_that_filter_nothing(device: str) -> None:
    probs = torch.stack([spread_row(30, device) for _ in range(20)])
    probs[:, 3] = 1e-30
    plain = sampling.sampling_from_probs(probs, seed=1, offset=2)
    for got in (
        sampling.top_k_sampling_from_probs(probs, 30, seed=1, offset=2),
        sampling.top_k_sampling_from_probs(probs, 1 << 30, seed=1, offset=2),
        sampling.top_p_sampling_from_probs(probs, 1.0, seed=1, offset=2),
        sampling.min_p_sampling_from_probs(probs, 0.0, seed=1, offset=2),
        sampling.top_k_top_p_sampling_from_probs(probs, 99, 1.0, seed=1, offset=2),
    ):
        assert torch.equal(got, plain)
    assert torch.equal(sampling.top_p_renorm_probs(probs, 1.0) > 0, probs > 0)
    assert torch.equal(sampling.top_k_mask_logits(probs, 31), probs)


def test_parameters_that_leave_one_token(device: str) -> None:
    probs = torch.stack([spread_row(30, device) for _ in range(20)])
    best = probs.argmax(dim=-1).int()
    assert torch.equal(sampling.top_k_sampling_from_probs(probs, 1), best)
    assert torch.equal(sampling.top_p_sampling_from_probs(probs, 0.0), best)
    assert torch.equal(sampling.min_p_sampling_from_probs(probs, 1.0), best)
    assert torch.equal(sampling.top_k_top_p_sampling_from_logits(probs.log(), 1, 1.0), best)


def test_filter_orders_differ(device: str) -> None:
    """After top_k = 2, {0.4, 0.3} are {0.57, 0.43}: top_p = 0.5 keeps one; of the whole row it needs both."""
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]], device=device)
    indices = torch.zeros(2000, dtype=torch.int32, device=device)
    first = sampling.top_k_top_p_sampling_from_probs(probs, 2, 0.5, indices)
    joint = sampling.top_k_top_p_sampling_from_probs(probs, 2, 0.5, indices, filter_apply_order="joint")
    assert first.unique().tolist() == [0]
    assert joint.unique().tolist() == [0, 1]


def test_indices(sampler: tuple, device: str) -> None:
    """Samples follow `indices`, whose dtype they take; rows may repeat, or be left out."""
    call, _ = sampler
    probs = torch.full((4, 6), 1e-9, device=device)
    probs[torch.arange(4), torch.tensor([5, 0, 3, 2])] = 1.0
    order = [2, 2, 0, 3, 2]
    for dtype in (torch.int32, torch.int64):
        got = call(probs, indices=torch.tensor(order, dtype=dtype, device=device))
        assert got.dtype == dtype
        assert got.tolist() == [[5, 0, 3, 2][i] for i in order]
    assert call(probs, indices=torch.tensor([], dtype=torch.int32, device=device)).shape == (0,)
    assert call(probs[:0]).shape == (0,)


# --- randomness --------------------------------------------------------------------------------------------------


def test_seed_and_offset(sampler: tuple, device: str) -> None:
    """Equal seeds and offsets give equal tokens in every form they may be given in; other ones give other tokens."""
    call, _ = sampler
    probs = spread_row(50, device).expand(200, 50)
    seed, offset = 2**63 + 12345, 7
    expected = call(probs, seed=seed, offset=offset)
    assert torch.equal(call(probs, seed=seed, offset=offset), expected)
    for length in (1, 200):
        seeds = torch.tensor([seed - 2**64], device=device).expand(length).contiguous()
        offsets = torch.full((length,), offset, device=device)
        assert torch.equal(call(probs, seed=seeds, offset=offsets), expected)
        assert torch.equal(call(probs, seed=seeds.view(torch.uint64), offset=offsets), expected)
        assert torch.equal(call(probs, seed=seed, offset=offsets), expected)
    for other in ({"seed": seed + 1, "offset": offset}, {"seed": seed, "offset": offset + 1}):
        assert (call(probs, **other) != expected).any()


def test_seeds_of_rows(device: str) -> None:
    """Row i depends on its own seed and offset only."""
    probs = spread_row(50, device).expand(100, 50)
    seeds, offsets = torch.randint(2**60, (2, 100), device=device)
    got = sampling.sampling_from_probs(probs, seed=seeds, offset=offsets)
    for row in range(0, 100, 9):
        alone = sampling.sampling_from_probs(probs, seed=int(seeds[row]), offset=int(offsets[row]))
        assert got[row] == alone[row]


def test_generator(sampler: tuple, device: str) -> None:
    """A generator in the same state gives the same tokens, and moves on; so does torch's own."""
    call, _ = sampler
    probs = spread_row(50, device).expand(300, 50)
    for where in {device, "cpu"}:
        generator = torch.Generator(where)
        generator.manual_seed(3)
        first, second = call(probs, generator=generator), call(probs, generator=generator)
        generator.manual_seed(3)
        assert torch.equal(call(probs, generator=generator), first)
        assert (first != second).any()
    torch.manual_seed(4)
    first, second = call(probs), call(probs)
    torch.manual_seed(4)
    assert torch.equal(call(probs, deterministic=True), first)
    assert (first != second).any()


@pytest.mark.gpu
def test_generator_moves_by_the_documented_count() -> None:
    probs = torch.rand(5, 11, device="cuda")
    generator = torch.Generator("cuda")
    counts = {
        5: lambda: sampling.sampling_from_probs(probs, generator=generator),
        5 * 11: lambda: sampling.sampling_from_logits(probs, generator=generator),
        5 * 32: lambda: sampling.top_k_sampling_from_probs(probs, 3, generator=generator),
    }
    for count, call in counts.items():
        before = generator.get_offset()
        call()
        assert generator.get_offset() - before == (count + 3) // 4 * 4


@pytest.mark.gpu
def test_no_host_sync(sampler: tuple) -> None:
    call, _ = sampler
    probs = torch.rand(5, 1000, device="cuda")
    top_k, top_p = torch.full((5,), 7, device="cuda"), torch.full((5,), 0.8, device="cuda")

    def step() -> None:
        call(probs)
        call(probs, indices=top_k.clamp(max=4))
        sampling.top_k_top_p_sampling_from_probs(probs, top_k, top_p, seed=1, offset=2)
        sampling.min_p_sampling_from_probs(probs, top_p)
        sampling.softmax(probs, top_p)
        sampling.top_k_renorm_probs(probs, top_k)
        sampling.top_p_renorm_probs(probs, top_p)
        sampling.top_k_mask_logits(probs, top_k)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_uniform_numbers_are_philox() -> None:
    """The known answers of Random123 (kat_vectors, philox4x32 with 10 rounds), of which 53 bits are used."""
    zero = reference.uniform(1, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert zero.item() == ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) / 2**53


# --- softmax, masks, renormalisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (0, 5), (4, 257), (2, 5000)])
def test_softmax(dtype: torch.dtype, shape: tuple[int, int], device: str) -> None:
    logits = (torch.randn(shape, device=device) * 5).to(dtype)
    temperatures = torch.rand(shape[0], device=device) + 0.3
    for temperature, column in ((None, 1.0), (0.6, 0.6), (temperatures, temperatures[:, None])):
        got = sampling.softmax(logits, temperature)
        assert got.dtype == torch.float32
        wide = column.double() if isinstance(column, torch.Tensor) else column
        oracle = torch.softmax(logits.double() / wide, dim=-1)
        noise = softmax_noise(logits, wide, oracle) if logits.numel() else None
        assert_close_to_oracle(got, oracle, torch.softmax(logits.float() / column, dim=-1), noise=noise)


def test_softmax_of_extremes(device: str) -> None:
    logits = torch.tensor([[1e30, -torch.inf, 1e30, 0.0], [-1e30, -2e30, -torch.inf, -torch.inf]], device=device)
    expected = torch.tensor([[0.5, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]], device=device)
    for temperature in (None, 2.0, 0, torch.zeros(2, device=device)):
        assert torch.equal(sampling.softmax(logits, temperature), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_renorm_and_mask(dtype: torch.dtype, device: str) -> None:
    probs = torch.stack([spread_row(37, device) for _ in range(4)]).to(dtype)
    scalar_k, scalar_p = 9, 0.6
    ks, ps = torch.tensor([1, 9, 36, 50], device=device), torch.tensor([0.05, 0.6, 0.97, 1.0], device=device)
    for k, p in ((scalar_k, scalar_p), (ks, ps)):
        per_row = [(int(ks[i]), float(ps[i])) if isinstance(k, torch.Tensor) else (k, p) for i in range(4)]
        for got, masks in (
            (sampling.top_k_renorm_probs(probs, k), [{"top_k": row_k} for row_k, _ in per_row]),
            (sampling.top_p_renorm_probs(probs, p), [{"top_p": row_p} for _, row_p in per_row]),
        ):
            assert got.dtype == dtype
            keep = torch.stack([kept(row.double().cpu(), **m) for row, m in zip(probs, masks, strict=True)]).to(device)
            wide = torch.where(keep, probs.double(), 0.0)
            twin = torch.where(keep, probs, 0.0)
            twin = twin / twin.sum(-1, keepdim=True)
            assert_close_to_oracle(got, wide / wide.sum(-1, keepdim=True), twin)
        masked = sampling.top_k_mask_logits(probs, k)
        assert masked.dtype == dtype
        keep = torch.stack([kept(row.double().cpu(), top_k=rk) for row, (rk, _) in zip(probs, per_row, strict=True)])
        assert torch.equal(masked, probs.masked_fill(~keep.to(device), -torch.inf))


def test_ties_are_kept(device: str) -> None:
    probs = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.3]], device=device)
    everything_but_first = torch.tensor([[False, True, True, True, True]], device=device)
    assert torch.equal(sampling.top_k_renorm_probs(probs, 2) > 0, everything_but_first)
    assert torch.equal(sampling.top_p_renorm_probs(probs, 0.4) > 0, everything_but_first)
    assert torch.equal(sampling.top_k_mask_logits(probs, 3) > -torch.inf, everything_but_first)


def test_unnormalised_and_zero_rows(device: str) -> None:
    probs = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, 0.0]], device=device)
    assert sampling.top_p_renorm_probs(probs, 0.6).tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert sampling.top_k_renorm_probs(probs, 1).tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_aliases() -> None:
    assert sampling.top_p_renorm_prob is sampling.top_p_renorm_probs
    assert sampling.top_k_renorm_prob is sampling.top_k_renorm_probs


# --- invalid rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), 0.0, float("inf")])
@pytest.mark.parametrize("name", FROM_PROBS)
def test_rows_without_weight(name: str, bad: float, device: str) -> None:
    """A row of NaN, zeros or infinities gives a token of the vocabulary and is reported; its neighbours are right."""
    call, _ = SAMPLERS[name]
    probs = torch.full((3, 9), bad, device=device)
    probs[[0, 2]] = torch.eye(9, device=device)[[4, 1]]
    tokens, valid = call(probs, return_valid=True)
    assert valid.dtype == torch.bool
    assert valid.tolist() == [True, False, True]
    assert tokens[0] == 4 and tokens[2] == 1
    assert 0 <= int(tokens[1]) < 9


def test_logits_of_nan(device: str) -> None:
    for bad in (torch.nan, -torch.inf):
        logits = torch.full((2, 9), bad, device=device)
        logits[0, 6] = 0.0 if bad == -torch.inf else torch.nan
        for got in (
            sampling.sampling_from_logits(logits),
            sampling.top_k_top_p_sampling_from_logits(logits, 3, 0.9),
            sampling.top_k_top_p_sampling_from_logits(logits, 3, 0.9, filter_apply_order="joint"),
        ):
            assert ((got >= 0) & (got < 9)).all()
            assert bad != -torch.inf or got[0] == 6


def test_check_nan(sampler: tuple, device: str) -> None:
    call, _ = sampler
    probs = spread_row(8, device)[None]
    call(probs, check_nan=True)
    with pytest.raises(ValueError, match=r"(probs|logits): got NaN, expected numbers only"):
        call(probs.where(torch.arange(8, device=device) != 3, torch.nan), check_nan=True)
