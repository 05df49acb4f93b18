"""Draws of the Triton kernels against the torch implementation: interpreted, or at full size on a GPU."""

from __future__ import annotations

import pytest
import torch

from flashinfer.ops import sampling as ops
from flashinfer.ops.sampling import Draws, Filters
from tests.ops.sampling_checks import (
    DTYPES,
    LARGE,
    ON_GPU,
    assert_counts,
    count_draws,
    fresh_seed,
    random_logits,
    target,
)

Tensor = torch.Tensor
FILTERS = {
    "none": Filters(),
    "top_k": Filters(top_k=5),
    "top_p": Filters(top_p=0.7),
    "min_p": Filters(min_p=0.3),
    "top_k_first": Filters(5, 0.7),
    "joint": Filters(5, 0.7, joint=True),
}
# What leaves rows open: more tokens pass than a program holds.
WIDE_FILTERS = {
    "top_k": Filters(top_k=5000),
    "middle_top_k": Filters(top_k=1500 if ON_GPU else 100),
    "top_p": Filters(top_p=0.98),
    "low_top_p": Filters(top_p=0.1),
    "min_p": Filters(min_p=1e-3),
    "top_k_first": Filters(5000, 0.9),
    "joint": Filters(5000, 0.9, joint=True),
}


# min_p is of probs. The interpreter draws with each filter once.
PROBS_AND_LOGITS = (
    [(name, logits) for name in FILTERS for logits in (False, True) if not (logits and name == "min_p")]
    if ON_GPU
    else [(name, name in ("top_k", "top_k_first")) for name in FILTERS]
)


def sample(rows: Tensor, logits: bool, filters: Filters, draws: Draws) -> tuple[Tensor, Tensor]:
    return ops.sample(rows, logits, filters, draws, backend="triton")


# --- distributions and supports ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "logits"), PROBS_AND_LOGITS)
def test_distribution(name: str, logits: bool, device: str) -> None:
    """A million draws of a small vocabulary, rows of any sum; some through the interpreter."""
    vocab = 200 if ON_GPU else 7
    x = random_logits(2, vocab, device)
    probs = x.softmax(-1) * 3
    counts = count_draws(lambda d: sample(x if logits else probs, logits, FILTERS[name], d)[0], vocab, device)
    assert_counts(counts, target(probs, FILTERS[name])[1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", WIDE_FILTERS)
def test_distribution_of_open_rows(name: str, device: str) -> None:
    """The same where the tokens that pass are too many to be held: of 20011 tokens those expected often are counted."""
    probs = random_logits(2, 20_011, device, 1.0).softmax(-1)
    counts = count_draws(lambda d: sample(probs, False, WIDE_FILTERS[name], d)[0], probs.shape[1], device)
    assert_counts(counts, target(probs, WIDE_FILTERS[name])[1])


@pytest.mark.parametrize("scale", [1.0, 4.0] if ON_GPU else [1.0])
@pytest.mark.parametrize("name", [*FILTERS, *(f"wide_{n}" for n in WIDE_FILTERS)])
def test_support(name: str, scale: float, device: str) -> None:
    """Of a large vocabulary only tokens that pass are drawn, from probs and from logits."""
    filters = WIDE_FILTERS[name.removeprefix("wide_")] if name.startswith("wide_") else FILTERS[name]
    rows = 64 if ON_GPU else 1
    x = random_logits(rows, LARGE, device, scale)
    probs = x.softmax(-1)
    allowed = target(probs, filters) > 0
    for rows_in, is_logits in ((probs, False), (x, True)):
        if is_logits and filters.min_p is not None:
            continue
        tokens, valid = sample(rows_in, is_logits, filters, Draws(fresh_seed(), 0, rows))
        assert valid.all()
        assert allowed.gather(1, tokens.long()[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 3, 255, 4097] + ([50_257, 300_007] if ON_GPU else []))
def test_vocabularies_and_dtypes(vocab: int, dtype: torch.dtype, device: str) -> None:
    """Rows of each size and dtype, unaligned and strided views among them."""
    wide = random_logits(3, vocab + 5, device).to(dtype)
    for x in (wide[:, 5:], wide[:, :vocab].t().contiguous().t()):
        seen = x.float().softmax(-1)
        allowed = target(seen, Filters(2, 0.6)) > 0
        tokens, valid = sample(x, True, Filters(2, 0.6), Draws(fresh_seed(), 0, 3))
        assert valid.all()
        assert allowed.gather(1, tokens.long()[:, None]).all()


def test_rows_of_a_language_model(device: str) -> None:
    """A row with a few likely tokens and a long tail never opens; what is drawn is the head."""
    x = random_logits(2, LARGE, device, 0.5)
    x[:, ::1009] += 15
    probs = x.softmax(-1)
    allowed = target(probs, Filters(top_p=0.9)) > 0
    tokens, _ = sample(probs, False, Filters(top_p=0.9), Draws(fresh_seed(), 0, 2))
    assert allowed.gather(1, tokens.long()[:, None]).all()


def test_parameters_of_rows(device: str) -> None:
    """A tensor means row for row what the number means, and follows `indices`."""
    probs = random_logits(4, 300, device).softmax(-1)
    top_k = torch.tensor([1, 3, 300, 1000], device=device)
    top_p = torch.tensor([1.0, 0.5, 0.0, 0.9], device=device)
    indices = torch.tensor([3, 1, 1, 0, 2, 3], device=device)
    draws = Draws(fresh_seed(), 3, 6, indices)
    got, _ = sample(probs, False, Filters(top_k, top_p), draws)
    assert got.dtype == torch.int64
    for row in range(4):
        alone, _ = sample(probs, False, Filters(int(top_k[row]), float(top_p[row])), draws)
        assert torch.equal(got[indices == row], alone[indices == row])


def test_seeds(device: str) -> None:
    """Ints and tensors of both lengths say the same; another seed or offset says something else."""
    rows = 2000 if ON_GPU else 4
    probs = torch.rand(1, 1000, device=device).expand(rows, 1000)
    seed, offset = fresh_seed() - 2**63, 2**33 + 5
    expected, _ = sample(probs, False, Filters(), Draws(seed, offset, rows))
    for length in (1, rows):
        tensors = (torch.full((length,), value, dtype=torch.int64, device=device) for value in (seed, offset))
        assert torch.equal(sample(probs, False, Filters(), Draws(*tensors, rows))[0], expected)
    for other in ((seed + 1, offset), (seed, offset + 1), (seed, offset + 2**32)):
        assert (sample(probs, False, Filters(), Draws(*other, rows))[0] != expected).any()


@pytest.mark.parametrize("name", FILTERS)
def test_rows_without_weight(name: str, device: str) -> None:
    """Zeros, NaN and infinities are reported and give a token of the vocabulary; their neighbours are right."""
    eye = torch.eye(70, device=device)
    for bad in (torch.nan, 0.0, torch.inf):
        probs = torch.full((3, 70), bad, device=device)
        probs[[0, 2]] = eye[[4, 69]]
        tokens, valid = sample(probs, False, FILTERS[name], Draws(fresh_seed(), 0, 3))
        assert valid.tolist() == [True, False, True]
        assert tokens[0] == 4 and tokens[2] == 69
        assert 0 <= int(tokens[1]) < 70


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.inf])
def test_logits_without_weight(bad: float, device: str) -> None:
    x = torch.full((2, LARGE), bad, device=device)
    x[1] = -torch.inf
    x[1, LARGE - 1] = 3.0
    for filters in (Filters(), Filters(40, 0.9), Filters(top_p=0.5)):
        tokens, valid = sample(x, True, filters, Draws(fresh_seed(), 0, 2))
        assert valid.tolist() == [False, True]
        assert 0 <= int(tokens[0]) < LARGE and tokens[1] == LARGE - 1


@pytest.mark.parametrize("name", FILTERS)
def test_least_positive_numbers(name: str, device: str) -> None:
    """Probabilities below the normal fp32 numbers are numbers like others: their rows have tokens to draw."""
    probs = torch.zeros(2, 3000, device=device)
    probs[0, 2999] = 1e-42
    probs[1, [5, 2000]] = torch.tensor([3e-45, 1e-39], device=device)
    tokens, valid = sample(probs, False, FILTERS[name], Draws(fresh_seed(), 0, 2))
    assert valid.all()
    assert tokens[0] == 2999 and tokens[1] in (5, 2000)


def test_fewer_possible_tokens_than_top_k(device: str) -> None:
    """Tokens of -inf are not drawn to make up the number."""
    x = torch.full((3, LARGE), -torch.inf, device=device)
    x[:, [4, LARGE - 1]] = 2.0
    # The last: more than there are groups, of few enough for a guess.
    for filters in (Filters(50, 0.9), Filters(top_k=5000), Filters(top_p=0.99), Filters(LARGE // 30)):
        tokens, valid = sample(x, True, filters, Draws(fresh_seed(), 0, 3))
        assert valid.all()
        assert all(token in (4, LARGE - 1) for token in tokens.tolist())


@pytest.mark.parametrize("likely", [1, 2])
def test_min_p_where_most_tries_miss(likely: int, device: str) -> None:
    """Each group holds a few tokens that pass and many that just do not: few enough to be held at hand, or not."""
    vocab = 70_001
    probs = torch.full((1, vocab), 0.8, device=device)
    # A group of fp32 numbers is four columns of sixteen stripes of 512.
    token = torch.arange(vocab, device=device)
    passing = (token % 8192 < 512) & (token % 4 < likely)
    probs[:, passing] = 1.0
    num_samples = 2000 if ON_GPU else 6
    indices = torch.zeros(num_samples, dtype=torch.int32, device=device)
    tokens, valid = sample(probs, False, Filters(min_p=0.9), Draws(fresh_seed(), 0, num_samples, indices))
    assert valid.all()
    assert passing[tokens.long()].all()
    assert tokens.unique().numel() > min(num_samples, int(passing.sum())) // 2


def test_constant_rows(device: str) -> None:
    """All tokens tie at every threshold."""
    rows = 2 if ON_GPU else 1
    probs = torch.full((rows, LARGE), 1 / LARGE, device=device)
    for filters in (FILTERS["top_k"], FILTERS["joint"], WIDE_FILTERS["top_k_first"]):
        tokens, valid = sample(probs, False, filters, Draws(fresh_seed(), 0, rows))
        assert valid.all()
        assert ((tokens >= 0) & (tokens < LARGE)).all()


# --- on a GPU only -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_deterministic() -> None:
    """Bitwise the same on every run, where several programs share a row too."""
    probs = random_logits(8, LARGE, "cuda", 1.0).softmax(-1)
    for filters in (*FILTERS.values(), *WIDE_FILTERS.values()):
        runs = [sample(probs, False, filters, Draws(3, 4, 8))[0] for _ in range(5)]
        assert all(torch.equal(runs[0], run) for run in runs)
    for filters in (Filters(top_p=0.9), Filters(top_k=5000)):
        runs = [ops.renormalise(probs, filters, backend="triton") for _ in range(5)]
        assert all(torch.equal(runs[0], run) for run in runs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(150, 32_001), (300, 128_256), (700, 50_257)])
def test_softmax_without_looking_at_others(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that never finds its neighbours' sums computes them; bits are the same however often it looks."""
    from flashinfer.ops.sampling.triton import softmax_launch

    x = random_logits(*shape, "cuda").bfloat16()
    x[7], x[8, 5:] = -torch.inf, -torch.inf
    results = []
    for polls in (softmax_launch.SOFTMAX_POLLS, 0, 1, 1000):
        monkeypatch.setattr(softmax_launch, "SOFTMAX_POLLS", polls)
        out = torch.full(shape, torch.nan, device="cuda")
        softmax_launch.softmax(out, x, 0.7, None)
        results.append(out.view(torch.int32))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    """Row 17000 of 130000 tokens lies past 2^31 elements."""
    probs = torch.zeros(17_000, 130_000, dtype=torch.bfloat16, device="cuda")
    probs[-1, 129_999] = 1
    indices = torch.tensor([16_999], device="cuda")
    for filters in FILTERS.values():
        tokens, valid = sample(probs, False, filters, Draws(1, 2, 1, indices))
        assert tokens.tolist() == [129_999] and valid.all()


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 300, 4000])
def test_many_rows(batch_size: int) -> None:
    """From several programs a row to thousands of rows."""
    x = random_logits(batch_size, 32_001, "cuda")
    for filters in FILTERS.values():
        tokens, valid = sample(x.softmax(-1), False, filters, Draws(fresh_seed(), 0, batch_size))
        assert valid.all()
        assert (target(x.softmax(-1), filters).gather(1, tokens.long()[:, None]) > 0).all()
