"""The Triton kernels of sampling against the torch implementation: interpreted, or at full size on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashinfer.ops import sampling as ops
from flashinfer.ops.sampling import Draws, Filters, Selection, Tree, reference
from flashinfer.testing import assert_close_to_oracle

Tensor = torch.Tensor
ON_GPU = torch.cuda.is_available()
# The interpreter takes some 50 ms for each program.
DRAWS, CALLS = (100_000, 10) if ON_GPU else (40, 1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)
# More tokens than a program holds candidates; an odd number of them; several tiles.
LARGE = 128_256 if ON_GPU else 20_011
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
    "top_p": Filters(top_p=0.98),
    "low_top_p": Filters(top_p=0.1),
    "min_p": Filters(min_p=1e-3),
    "top_k_first": Filters(5000, 0.9),
    "joint": Filters(5000, 0.9, joint=True),
}


@pytest.fixture(params=[False, True], ids=["probs", "logits"])
def logits(request: pytest.FixtureRequest) -> bool:
    return request.param


def sample(rows: Tensor, logits: bool, filters: Filters, draws: Draws) -> tuple[Tensor, Tensor]:
    return ops.sample(rows, logits, filters, draws, backend="triton")


def fresh_seed() -> int:
    return int(torch.randint(2**62, ()))


def target(probs: Tensor, filters: Filters) -> Tensor:
    """fp64 `[batch, vocab]`: the distribution that the filters leave of `probs`, by the torch implementation."""
    keep = reference.kept_by(probs, filters)
    kept = probs.double() if keep is None else torch.where(keep, probs.double(), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def assert_counts(counts: Tensor, probs: Tensor) -> None:
    """Pearson's chi-square, tokens expected less than five times put together; false alarm once in a million.

    The quantile is that of Wilson and Hilferty, 4.75 standard deviations up.
    """
    counts, probs = counts.double().cpu(), probs.double().cpu()
    assert not counts[probs == 0].any(), "a token of probability 0 was drawn"
    expected = probs * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = max(len(counts) - 1, 1)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, limit {limit:.1f}"


def count_draws(draw: Callable[[Draws], Tensor], vocab: int, device: str) -> Tensor:
    """How often each token comes in DRAWS * CALLS draws of row 1."""
    counts = torch.zeros(vocab, dtype=torch.long, device=device)
    indices = torch.ones(DRAWS, dtype=torch.int32, device=device)
    seed = fresh_seed()
    for call in range(CALLS):
        tokens = draw(Draws(seed, call, DRAWS, indices))
        counts += torch.bincount(tokens.long(), minlength=vocab)
    return counts


def random_logits(rows: int, vocab: int, device: str, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, device=device) * scale


# --- distributions and supports ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILTERS)
def test_distribution(name: str, logits: bool, device: str) -> None:
    """A million draws of a small vocabulary; some through the interpreter."""
    if name == "min_p" and logits:
        pytest.skip("min_p is of probs")
    vocab = 200 if ON_GPU else 7
    x = random_logits(2, vocab, device)
    probs = x.softmax(-1)
    counts = count_draws(lambda d: sample(x if logits else probs, logits, FILTERS[name], d)[0], vocab, device)
    assert_counts(counts, target(probs, FILTERS[name])[1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", WIDE_FILTERS)
def test_distribution_of_open_rows(name: str, device: str) -> None:
    """The same where the tokens that pass are too many to be held: of 20011 tokens those expected often are counted."""
    probs = random_logits(2, 20_011, device, 1.0).softmax(-1)
    counts = count_draws(lambda d: sample(probs, False, WIDE_FILTERS[name], d)[0], probs.shape[1], device)
    assert_counts(counts, target(probs, WIDE_FILTERS[name])[1])


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["flat", "steep"])
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
    for i, row in enumerate(indices.tolist()):
        alone, _ = sample(probs, False, Filters(int(top_k[row]), float(top_p[row])), draws)
        assert got[i] == alone[i]


def test_seeds(device: str) -> None:
    """Ints and tensors of both lengths say the same; another seed or offset says something else."""
    rows = 2000 if ON_GPU else 8
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


def test_constant_rows(device: str) -> None:
    """All tokens tie at every threshold."""
    probs = torch.full((2, LARGE), 1 / LARGE, device=device)
    for filters in (FILTERS["top_k"], FILTERS["joint"], WIDE_FILTERS["top_k_first"]):
        tokens, valid = sample(probs, False, filters, Draws(fresh_seed(), 0, 2))
        assert valid.all()
        assert ((tokens >= 0) & (tokens < LARGE)).all()


# --- softmax, masks, renormalisation -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 1000 if ON_GPU else 5])
def test_softmax(rows: int, dtype: torch.dtype, device: str) -> None:
    """Several programs a row, and one."""
    x = (torch.randn(rows, 9001, device=device) * 5).to(dtype)
    temperature = torch.rand(rows, device=device) + 0.3
    got = ops.softmax(x, temperature, backend="triton")
    oracle = torch.softmax(x.double() / temperature[:, None].double(), -1)
    assert_close_to_oracle(got, oracle, torch.softmax(x.float() / temperature[:, None], -1))


def test_softmax_of_extremes(device: str) -> None:
    x = torch.tensor([[1e30, -torch.inf, 1e30, 0.0], [-1e30, -2e30, -torch.inf, -torch.inf]], device=device)
    expected = torch.tensor([[0.5, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]], device=device)
    for rows in (x, x.repeat(100 if ON_GPU else 2, 1)):
        for temperature in (1.0, 2.0, 0.0, torch.zeros(rows.shape[0], device=device)):
            got = ops.softmax(rows, temperature, backend="triton")
            assert torch.equal(got, expected.repeat(rows.shape[0] // 2, 1))
    for hopeless in (torch.nan, -torch.inf):
        assert ops.softmax(torch.full((1, 9), hopeless, device=device), 1.0, backend="triton").isnan().all()


@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["flat", "steep"])
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


# --- the largest numbers -----------------------------------------------------------------------------------------


def assert_selected(x: Tensor, selection: Selection) -> None:
    values, indices = ops.select(x, selection, backend="triton")
    want_values, want_indices = reference.select(x, selection)
    if selection.sorted:
        assert torch.equal(indices, want_indices)
        assert torch.equal(values, want_values)
        return
    assert torch.equal(indices.sort(1).values, want_indices.sort(1).values)
    starts = 0 if selection.starts is None else selection.starts[:, None]
    read = x.gather(1, (indices.clamp(min=0) + starts).long()).masked_fill(indices < 0, 0)
    assert torch.equal(values, read)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tie_break", [0, 1, 2])
def test_select_with_ties(tie_break: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randint(-9, 9, (4, 3000), device=device).to(dtype)
    x[3] = 1
    for k in (1, 77, 2500):
        assert_selected(x, Selection(k, tie_break))
    assert_selected(x, Selection(77, tie_break, sorted=True))


@pytest.mark.parametrize("k", [1, 64, 2048])
def test_select_from_large_rows(k: int, device: str) -> None:
    x = random_logits(2, LARGE, device)
    x[1, : LARGE // 2] = -torch.inf
    assert_selected(x, Selection(k))


def test_select_from_sorted_rows(device: str) -> None:
    """The candidates of a rising row crowd in the last groups: the bound fails, and more reads settle it."""
    x = torch.arange(LARGE, device=device, dtype=torch.float32)[None]
    assert_selected(x, Selection(2048))
    assert_selected((x / 4096).floor(), Selection(2048, 2))
    assert_selected((x / 4096).floor(), Selection(2048, 1))


def test_select_from_windows(device: str) -> None:
    """Windows shorter than k, empty, of exactly k, beginning anywhere."""
    x = random_logits(6, 4000, device)
    lengths = torch.tensor([0, 5, 64, 65, 2000, 3000], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 3995, 11, 1, 0, 1000], dtype=torch.int32, device=device)
    assert_selected(x, Selection(64, lengths=lengths))
    assert_selected(x, Selection(64, starts=starts, lengths=lengths))
    _, indices = ops.select(x, Selection(64, lengths=lengths), backend="triton")
    assert indices[1, :5].tolist() == [0, 1, 2, 3, 4] and (indices[1, 5:] == -1).all()


# --- verification ------------------------------------------------------------------------------------------------


def test_chain_follows_the_target(device: str) -> None:
    """What comes out first is distributed as the target, whatever the draft says; so is the next token after it."""
    n, vocab = (DRAWS, 6) if ON_GPU else (60, 3)
    draft, second = (torch.rand(1, 2, vocab, device=device).softmax(-1) for _ in range(2))
    goal = torch.cat([second, torch.rand(1, 1, vocab, device=device).softmax(-1)], 1)
    goal[0, 0, 0] = 0
    goal = goal / goal.sum(-1, keepdim=True)
    drafted = torch.stack([torch.multinomial(draft[0, i], n, replacement=True) for i in range(2)], 1).int()
    tokens, accepted, emitted = ops.verify_chain(
        draft.expand(n, 2, vocab).contiguous(),
        drafted,
        goal.expand(n, 3, vocab).contiguous(),
        Draws(fresh_seed(), 0, n),
        backend="triton",
    )
    first = torch.bincount(tokens[:, 0].long(), minlength=vocab)
    assert_counts(first, goal[0, 0])
    following = tokens[tokens[:, 1] >= 0, 1]
    assert_counts(torch.bincount(following.long(), minlength=vocab), goal[0, 1])
    last = tokens[tokens[:, 2] >= 0, 2]
    assert_counts(torch.bincount(last.long(), minlength=vocab), goal[0, 2])
    assert (accepted >= emitted).all()
    assert torch.equal((tokens >= 0).sum(1).int(), emitted + 1)


def test_chain_of_certain_drafts(device: str) -> None:
    """A draft equal to the target is accepted; one of probability 0 is not, and its row decides the next token."""
    eye = torch.eye(70, device=device)
    target_probs = torch.stack([eye[[3, 4, 5]], eye[[3, 9, 5]], eye[[8, 9, 5]]])
    drafts = torch.tensor([[3, 4], [3, 4], [3, 9]], device=device)
    tokens, accepted, emitted = ops.verify_chain(
        eye[drafts], drafts, target_probs, Draws(fresh_seed(), 0, 3), backend="triton"
    )
    assert tokens.tolist() == [[3, 4, 5], [3, 9, -1], [8, -1, -1]]
    assert emitted.tolist() == [2, 1, 0]
    assert accepted.tolist() == [2, 1, 1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tree_follows_the_target(backend: str, device: str) -> None:
    """Root with three children, one of which has a child: first and second tokens are distributed as the target."""
    n, vocab = (DRAWS, 6) if ON_GPU else (60, 3) if backend == "triton" else (40_000, 6)
    goal = torch.rand(1, 5, vocab, device=device).softmax(-1)
    links = torch.tensor([[1, 4, -1, -1, -1], [-1, 2, 3, -1, -1]], device=device)
    drafted = torch.tensor([0, 2, 0, 1, 1], device=device)
    tree = Tree(*(x.expand(n, 5).contiguous() for x in (drafted, links[0], links[1])))
    tokens, nodes, accepted = ops.verify_tree(
        tree, goal.expand(n, 5, vocab).contiguous(), Draws(fresh_seed(), 0, n), backend=backend
    )
    assert_counts(torch.bincount(tokens[:, 0], minlength=vocab), goal[0, 0])
    after_two = tokens[tokens[:, 0] == 2, 1]
    assert_counts(torch.bincount(after_two, minlength=vocab), goal[0, 1])
    walked = nodes[:, 0] == 1
    assert torch.equal(walked, tokens[:, 0] == 2)
    assert torch.equal((tokens >= 0).sum(1).int(), accepted + 1)
    assert ((nodes >= 0).sum(1).int() == accepted).all()


# --- on a GPU only -----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_deterministic() -> None:
    """Bitwise the same on every run, where several programs share a row too."""
    probs = random_logits(8, LARGE, "cuda", 1.0).softmax(-1)
    for filters in (*FILTERS.values(), *WIDE_FILTERS.values()):
        runs = [sample(probs, False, filters, Draws(3, 4, 8))[0] for _ in range(5)]
        assert all(torch.equal(runs[0], run) for run in runs)
    runs = [ops.renormalise(probs, Filters(top_p=0.9), backend="triton") for _ in range(5)]
    assert all(torch.equal(runs[0], run) for run in runs)


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
