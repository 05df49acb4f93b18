"""Ranks and groups of flashinfer.comm.Mapping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.comm import Mapping

AXES = ("tp", "cp", "pp", "moe_tp", "moe_ep", "moe_cluster")


def groups(axis: str, **sizes: int) -> list[list[int]]:
    """The distinct groups of all ranks, in order."""
    found = [getattr(Mapping(rank=rank, **sizes), f"{axis}_group") for rank in range(sizes["world_size"])]
    return sorted({tuple(g): list(g) for g in found}.values())


# FlashInfer's documentation of Mapping gives these.
@pytest.mark.parametrize(
    ("sizes", "axis", "want"),
    [
        ({"world_size": 8, "tp_size": 4, "pp_size": 2}, "tp", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"world_size": 8, "tp_size": 4, "pp_size": 2}, "pp", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ({"world_size": 8, "tp_size": 4, "cp_size": 2}, "cp", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (
            {"world_size": 8, "tp_size": 8, "moe_tp_size": 2, "moe_ep_size": 4},
            "moe_tp",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        ({"world_size": 8, "tp_size": 8, "moe_tp_size": 2, "moe_ep_size": 4}, "moe_ep", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (
            {"world_size": 16, "tp_size": 8, "pp_size": 2, "moe_tp_size": 2, "moe_ep_size": 4},
            "moe_tp",
            [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]],
        ),
        ({"world_size": 8, "tp_size": 2, "pp_size": 2, "cp_size": 2}, "tp", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ({"world_size": 8, "tp_size": 2, "pp_size": 2, "cp_size": 2}, "pp", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ({"world_size": 8, "tp_size": 2, "pp_size": 2, "cp_size": 2}, "cp", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_documented_groups(sizes: dict[str, int], axis: str, want: list[list[int]]) -> None:
    assert groups(axis, **sizes) == want


small = st.integers(1, 3)


@settings(deadline=None, max_examples=40)
@given(small, small, small, small, small)
def test_groups_part_the_ranks(cp: int, pp: int, moe_tp: int, moe_ep: int, cluster: int) -> None:
    tp = moe_tp * moe_ep * cluster
    sizes = {"tp_size": tp, "cp_size": cp, "pp_size": pp, "moe_ep_size": moe_ep, "moe_cluster_size": cluster}
    ranks = [Mapping(tp * cp * pp, rank, **sizes) for rank in range(tp * cp * pp)]
    for axis in AXES:
        size = getattr(ranks[0], f"{axis}_size")
        for mapping in ranks:
            group, place = getattr(mapping, f"{axis}_group"), getattr(mapping, f"{axis}_rank")
            assert len(group) == size and group[place] == mapping.rank
            assert all(getattr(ranks[other], f"{axis}_group") == group for other in group)
    place = [(m.pp_rank, m.cp_rank, m.tp_rank) for m in ranks]
    assert place == sorted(place) and len(set(place)) == len(ranks)
    within = {(m.tp_rank, m.moe_tp_rank, m.moe_ep_rank, m.moe_cluster_rank) for m in ranks}
    assert len(within) == tp
    for mapping in ranks:
        assert ranks[mapping.next_pp_rank()].prev_pp_rank() == mapping.rank
        assert Mapping.from_dict(mapping.to_dict()) == mapping
        assert mapping.is_last_pp_rank() == (ranks[mapping.next_pp_rank()].is_first_pp_rank())
        assert mapping.is_second_last_pp_rank() == (pp > 1 and ranks[mapping.next_pp_rank()].is_last_pp_rank())


@given(st.integers(0, 40), st.integers(1, 7))
def test_layers_are_shared_out(num_layers: int, pp: int) -> None:
    shares = [Mapping(pp, rank, pp_size=pp).pp_layers(num_layers) for rank in range(pp)]
    assert [layer for share in shares for layer in share] == list(range(num_layers))
    lengths = [len(share) for share in shares]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1


def test_experts_nodes_and_defaults() -> None:
    mapping = Mapping(16, 13, 8, tp_size=8, pp_size=2, moe_ep_size=4)
    assert (mapping.moe_tp_size, mapping.moe_cluster_size, mapping.moe_ep_rank) == (2, 1, 1)
    assert mapping.ep_experts(8) == [2, 3]
    assert (mapping.node_rank, mapping.local_rank, mapping.is_multi_node()) == (1, 5, True)
    assert (mapping.attn_tp_size, mapping.attn_cp_size) == (8, 1)
    assert (mapping.has_tp(), mapping.has_cp(), mapping.has_pp()) == (True, False, True)
    assert (mapping.has_moe_tp(), mapping.has_moe_ep(), mapping.has_moe_cluster()) == (True, True, False)
    alone = Mapping()
    assert (alone.tp_group, alone.moe_ep_group, alone.next_pp_rank()) == ([0], [0], 0)
    with pytest.raises(ValueError, match="num_experts: got 6 with moe_ep_size 4"):
        mapping.ep_experts(6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mapping.rank = 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mapping(4, 4, tp_size=4), "rank: got 4"),
        (lambda: Mapping(4, -1, tp_size=4), "rank: got -1"),
        (lambda: Mapping(4, 0, tp_size=2), "world_size: got 4 with pp_size 1, cp_size 1, tp_size 2"),
        (lambda: Mapping(4, 0, tp_size=0), "tp_size: got 0"),
        (lambda: Mapping(4, 0, tp_size=4, moe_ep_size=3), "tp_size: got 4, expected moe_tp_size 1 . moe_ep_size 3"),
        (lambda: Mapping(4, 0, tp_size=4, moe_ep_size=0), "moe_ep_size: got 0"),
        (lambda: Mapping(4, 0, tp_size=4, moe_cluster_size=3), "moe_cluster_size 3"),
        (lambda: Mapping(4, 0, cp_size=4, attn_cp_size=3), "attn_cp_size 3"),
    ],
)
def test_sizes_that_do_not_fit(make: Callable[[], Mapping], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_auto_parallel_leaves_sizes_open() -> None:
    assert Mapping(8, 5, auto_parallel=True).world_size == 8
