"""Triton's selection of largest numbers and verification of drafts against torch: interpreted, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from flashinfer.ops import sampling as ops
from flashinfer.ops.sampling import Draws, Selection, Tree, reference
from tests.ops.sampling_checks import CALLS, DRAWS, DTYPES, LARGE, ON_GPU, assert_counts, fresh_seed, random_logits

Tensor = torch.Tensor


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
    x = torch.randint(-9, 9, (4 if ON_GPU else 2, 3000), device=device).to(dtype)
    x[-1] = 1
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
    """What comes out is distributed as the target at each place, whatever the draft says; a million requests."""
    n, vocab = (DRAWS, 6) if ON_GPU else (24, 3)
    draft, second = (torch.rand(1, 2, vocab, device=device).softmax(-1) for _ in range(2))
    goal = torch.cat([second, torch.rand(1, 1, vocab, device=device).softmax(-1)], 1)
    goal[0, 0, 0] = 0
    goal = goal / goal.sum(-1, keepdim=True)
    rows = (draft.expand(n, 2, vocab).contiguous(), goal.expand(n, 3, vocab).contiguous())
    counts, seed = torch.zeros(3, vocab + 1, dtype=torch.long, device=device), fresh_seed()
    for call in range(CALLS):
        drafted = torch.stack([torch.multinomial(draft[0, i], n, replacement=True) for i in range(2)], 1).int()
        tokens, accepted, emitted = ops.verify_chain(rows[0], drafted, rows[1], Draws(seed, call, n), backend="triton")
        assert (accepted >= emitted).all()
        assert torch.equal((tokens >= 0).sum(1).int(), emitted + 1)
        for i in range(3):
            counts[i] += torch.bincount(tokens[:, i].long() + 1, minlength=vocab + 1)
    for i in range(3):
        assert_counts(counts[i, 1:], goal[0, i])


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
    n, vocab = (DRAWS, 6) if ON_GPU else (24, 3) if backend == "triton" else (40_000, 6)
    goal = torch.rand(1, 5, vocab, device=device).softmax(-1)
    links = torch.tensor([[1, 4, -1, -1, -1], [-1, 2, 3, -1, -1]], device=device)
    drafted = torch.tensor([0, 2, 0, 1, 1], device=device)
    tree = Tree(*(x.expand(n, 5).contiguous() for x in (drafted, links[0], links[1])))
    rows, seed = goal.expand(n, 5, vocab).contiguous(), fresh_seed()
    first, after_two = torch.zeros(2, vocab, dtype=torch.long, device=device)
    for call in range(CALLS):
        tokens, nodes, accepted = ops.verify_tree(tree, rows, Draws(seed, call, n), backend=backend)
        first += torch.bincount(tokens[:, 0], minlength=vocab)
        after_two += torch.bincount(tokens[tokens[:, 0] == 2, 1], minlength=vocab)
        assert torch.equal(nodes[:, 0] == 1, tokens[:, 0] == 2)
        assert torch.equal((tokens >= 0).sum(1).int(), accepted + 1)
        assert ((nodes >= 0).sum(1).int() == accepted).all()
    assert_counts(first, goal[0, 0])
    assert_counts(after_two, goal[0, 1])
