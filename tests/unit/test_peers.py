"""The ranks of a group: what they agree on, and memory that all of them see."""

from __future__ import annotations

import os
import time

import pytest
import torch

from flashinfer.core.peers import PeerError, Peers
from tests.ranks import RankError, outcomes, run_ranks


def _agree(rank: int, world_size: int, device: torch.device) -> list[int]:
    peers = Peers(None, device)
    peers.exchange("call", shape=torch.Size([3, 4]), dtype=torch.float16)
    for word in range(5):
        assert peers.gather("word", [rank, word]) == [[r, word] for r in range(world_size)]
    again = Peers(None, device)
    return again.gather("again", rank)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_agree(world_size: int) -> None:
    assert run_ranks(_agree, world_size) == [list(range(world_size))] * world_size


def _disagree(rank: int, world_size: int, device: torch.device) -> None:
    Peers(None, device).exchange("allreduce", shape=(4, 8 + (rank == 1)), dtype=torch.float16)


def test_who_disagrees_about_what_is_named() -> None:
    first, second = outcomes(_disagree, 2)
    for error in (first, second):
        assert isinstance(error, RankError)
        assert "PeerError" in str(error) and "allreduce, shape" in str(error)
        assert "[4, 8]" in str(error) and "[4, 9]" in str(error) and "rank 1" in str(error)


def _other_call(rank: int, world_size: int, device: torch.device) -> None:
    Peers(None, device).exchange("dispatch" if rank else "combine", tokens=3)


def test_another_call_is_named() -> None:
    for error in outcomes(_other_call, 2):
        assert isinstance(error, RankError) and "dispatch" in str(error) and "combine" in str(error)


def _missing(rank: int, world_size: int, device: torch.device) -> float:
    peers = Peers(None, device, timeout=1.0)
    if rank == 2:
        os._exit(7)
    begin = time.monotonic()
    with pytest.raises(PeerError, match=r"step: nothing from rank 2 within 1 s"):
        peers.gather("step", None)
    return time.monotonic() - begin


def test_a_dead_rank_is_named_in_time() -> None:
    *living, dead = outcomes(_missing, 3)
    assert "exit code 7" in str(dead)
    assert all(0.9 < seconds < 10 for seconds in living), living


def _memory(rank: int, world_size: int, device: torch.device) -> None:
    peers = Peers(None, device)
    assert peers.unreachable() is None
    buffers = peers.allocate(64)
    assert len(buffers) == world_size and all(b.shape == (64,) and not b.any() for b in buffers)
    peers.gather("zeros were seen", None)
    for other, buffer in enumerate(buffers):
        buffer[rank] = 10 * rank + other + 1
    peers.gather("written", None)
    assert buffers[rank].tolist() == [10 * r + rank + 1 for r in range(world_size)] + [0] * (64 - world_size)
    peers.close()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_memory_of_all_ranks(world_size: int) -> None:
    run_ranks(_memory, world_size)


def _sizes(rank: int, world_size: int, device: torch.device) -> None:
    Peers(None, device).allocate(64 + 64 * rank)


def test_memory_of_unequal_sizes_is_refused() -> None:
    assert all("allocate, num_bytes" in str(error) for error in outcomes(_sizes, 2))


def test_a_group_is_needed() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        Peers(None, torch.device("cpu"))
