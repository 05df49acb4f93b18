"""Speculative sampling: tokens distributed as the target's, counts, buffers, errors; on the device there is."""

from __future__ import annotations

import pytest
import torch

from flashinfer.sampling import chain_speculative_sampling, tree_speculative_sampling
from tests.ops.sampling_checks import assert_distributed

DRAWS = 40_000


@pytest.mark.parametrize("length", [0, 1, 3])
def test_chain(length: int, device: str) -> None:
    """Every position that is reached holds the target's distribution; nothing tells that a draft was there."""
    vocab = 5
    draft = torch.rand(length, vocab, device=device).softmax(-1)
    goal = torch.rand(length + 1, vocab, device=device).add(0.2)
    goal = goal / goal.sum(-1, keepdim=True)
    drafted = torch.empty(DRAWS, length, dtype=torch.int64, device=device)
    for i in range(length):
        drafted[:, i] = torch.multinomial(draft[i], DRAWS, replacement=True)
    tokens, accepted, emitted = chain_speculative_sampling(
        draft.expand(DRAWS, length, vocab), drafted, goal.expand(DRAWS, length + 1, vocab)
    )
    assert tokens.shape == (DRAWS, length + 1) and tokens.dtype == torch.int64
    for i in range(length + 1):
        reached = tokens[tokens[:, i] >= 0, i]
        assert_distributed(reached, goal[i])
    assert (accepted >= emitted).all() and accepted.dtype == emitted.dtype == torch.int32
    assert torch.equal((tokens >= 0).sum(1).int(), emitted + 1)
    taken = torch.arange(length, device=device) < emitted[:, None]
    assert torch.equal(tokens[:, :length][taken], drafted[taken])


def test_chain_accepts_as_often_as_it_can(device: str) -> None:
    """A draft is taken with probability sum of min(draft, target), the most there is (Leviathan et al., 3.5)."""
    draft, goal = torch.rand(2, 4, device=device).add(0.1)
    draft, goal = draft / draft.sum(), goal / goal.sum()
    drafted = torch.multinomial(draft, DRAWS, replacement=True)[:, None].int()
    _, _, emitted = chain_speculative_sampling(
        draft.expand(DRAWS, 1, 4), drafted, torch.stack([goal, goal]).expand(DRAWS, 2, 4)
    )
    rate = torch.minimum(draft, goal).sum()
    assert_distributed(emitted, torch.stack([1 - rate, rate]))


def test_chain_counts_are_added(device: str) -> None:
    eye = torch.eye(4, device=device)
    drafted = torch.tensor([[1, 2]], dtype=torch.int32, device=device)
    counts = [torch.full((1,), 10, dtype=torch.int32, device=device) for _ in range(2)]
    for _ in range(2):
        tokens, accepted, emitted = chain_speculative_sampling(
            eye[drafted.long()], drafted, eye[torch.tensor([[3, 2, 1]])], *counts
        )
    assert tokens.tolist() == [[3, -1, -1]]
    assert accepted is counts[0] and emitted is counts[1]
    assert accepted.tolist() == [12] and emitted.tolist() == [10]


def test_no_requests(device: str) -> None:
    probs, ids = torch.rand(0, 3, 7, device=device), torch.zeros(0, 2, dtype=torch.int64, device=device)
    tokens, accepted, emitted = chain_speculative_sampling(probs[:, :2], ids, probs)
    assert tokens.shape == (0, 3) and accepted.shape == emitted.shape == (0,)
    ids = torch.zeros(0, 3, dtype=torch.int32, device=device)
    tokens, nodes, accepted = tree_speculative_sampling(ids, ids, ids, probs)
    assert tokens.shape == (0, 3) and nodes.shape == (0, 2) and accepted.shape == (0,)


def test_seeds_repeat(device: str) -> None:
    draft = torch.rand(50, 3, 20, device=device).softmax(-1)
    goal = torch.rand(50, 4, 20, device=device).softmax(-1)
    drafted = torch.randint(20, (50, 3), device=device)
    first = chain_speculative_sampling(draft, drafted, goal, seed=3, offset=4)
    again = chain_speculative_sampling(draft, drafted, goal, seed=3, offset=4)
    other = chain_speculative_sampling(draft, drafted, goal, seed=3, offset=5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_tree_of_one_node(device: str) -> None:
    """Without drafts it is plain sampling."""
    goal = torch.rand(1, 1, 6, device=device).add(0.1)
    links = torch.full((DRAWS, 1), -1, dtype=torch.int32, device=device)
    tokens, nodes, accepted = tree_speculative_sampling(links, links, links, goal.expand(DRAWS, 1, 6))
    assert_distributed(tokens[:, 0], goal[0, 0])
    assert nodes.shape == (DRAWS, 0) and not accepted.any()


def test_tree_walks_to_a_leaf(device: str) -> None:
    """Certain targets lead along one path: root, node 2 (second child), node 3."""
    eye = torch.eye(8, device=device)
    tokens = torch.tensor([[0, 4, 5, 6]], device=device)
    first_child = torch.tensor([[1, -1, 3, -1]], device=device)
    next_sibling = torch.tensor([[-1, 2, -1, -1]], device=device)
    got, nodes, accepted = tree_speculative_sampling(
        tokens, first_child, next_sibling, eye[torch.tensor([[5, 0, 6, 7]])]
    )
    assert got.tolist() == [[5, 6, 7, -1]]
    assert nodes.tolist() == [[2, 3, -1]] and accepted.tolist() == [2]


def test_nothing_left_by_rounding(device: str) -> None:
    """Where a draft is refused and no residual is left, the token is one that the target allows, never just any."""
    goal = torch.zeros(1, 2, 9, device=device)
    goal[..., [5, 7]] = 0.25
    drafted = torch.zeros(200, 1, dtype=torch.int32, device=device)
    # The draft is larger everywhere, and gave a token that the target excludes.
    tokens, _, emitted = chain_speculative_sampling(
        (goal[:, :1] + 0.1).expand(200, 1, 9), drafted, goal.expand(200, 2, 9), seed=5, offset=6
    )
    assert not emitted.any() and set(tokens[:, 0].tolist()) == {5, 7}
    # All that the target allows are children, and weigh half together.
    nodes = torch.tensor([[0, 5, 7]], dtype=torch.int32, device=device).expand(200, 3)
    first_child = torch.tensor([[1, -1, -1]], dtype=torch.int32, device=device).expand(200, 3)
    sibling = torch.tensor([[-1, 2, -1]], dtype=torch.int32, device=device).expand(200, 3)
    tokens, _, accepted = tree_speculative_sampling(
        nodes, first_child, sibling, goal[:, :1].expand(200, 3, 9), seed=5, offset=6
    )
    assert set(accepted.tolist()) == {0, 1} and set(tokens[:, 0].tolist()) == {5, 7}


def test_tree_with_a_circle_stays_in_bounds(device: str) -> None:
    """A link back is none; the memory behind the rows is untouched."""
    eye = torch.eye(6, device=device)[None, [1, 1, 1]].expand(4, 3, 6)
    nodes, links = (torch.ones(4, 3, dtype=torch.int32, device=device) for _ in range(2))
    tokens, path, accepted = tree_speculative_sampling(nodes, links, links, eye)
    assert tokens.tolist() == [[1, 1, -1]] * 4
    assert path.tolist() == [[1, -1]] * 4 and accepted.tolist() == [1] * 4


def test_errors(device: str) -> None:
    probs = torch.rand(2, 3, 6, device=device)
    ids = torch.zeros(2, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"draft_probs: got shape \[2, 3, 6\]"):
        chain_speculative_sampling(probs, ids, probs)
    with pytest.raises(ValueError, match=r"draft_token_ids: got shape \[2, 1\]"):
        chain_speculative_sampling(probs[:, :2], ids[:, :1], probs)
    with pytest.raises(ValueError, match=r"maybe_output_accepted_token_num: got dtype torch.float32"):
        chain_speculative_sampling(probs[:, :2], ids, probs, torch.zeros(2, device=device))
    with pytest.raises(ValueError, match=r"first_child: got shape \[2, 2\]"):
        tree_speculative_sampling(torch.zeros(2, 3, dtype=torch.int32, device=device), ids, ids, probs)
