"""Repeated dispatches and combines: their launches are those of calls with checks, without words between ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashinfer import comm
from flashinfer.core import replay
from flashinfer.ops import alltoall as ops
from flashinfer.ops.alltoall import Room
from tests.ops.common import force
from tests.ops.test_replay import Compiled, log_launches


class Neighbours:
    """Stands for the Peers of two ranks, one of which is only memory."""

    rank, world_size, timeout, device = 0, 2, 1.0, torch.device("cpu")

    def __init__(self) -> None:
        self.words = 0

    def exchange(self, what: str, **values: Any) -> None:
        self.words += 1

    def gather(self, what: str, value: Any) -> list[Any]:
        return [value, value]

    def unreachable(self) -> None:
        return None

    def allocate(self, num_bytes: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2))

    def close(self) -> None:
        return None


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize("others", [0, 2])
def test_repeated_calls_launch_what_checked_calls_would(others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call in each half on, whatever tensors of the same layouts come; no words between ranks."""
    force(monkeypatch, "alltoall", "triton", skip=False)
    log = Compiled()
    kinds: list[list[str]] = []
    log_launches(monkeypatch, log)
    peers = Neighbours()
    room = Room(peers, 9, ops.room_bytes(2, 9, 2048, 1024))  # type: ignore[arg-type]

    def pair(tokens: int, x: torch.Tensor, ids: torch.Tensor) -> list[Any]:
        log.log.clear()
        payloads = [x[:tokens], ids[:tokens], x[:tokens, 0]][: 1 + others]
        sent = comm.dispatch(room, ids[:tokens], payloads, 8, 9)
        assert [y.shape[:2] for y in sent.received] == [(2, 9)] * len(payloads) and len(sent.slots) == tokens
        assert comm.combine(room, sent, sent.received[0]).shape == (tokens, 16)
        kinds.append([entry[0] for entry in log.log])
        return [entry[1:] for entry in log.log]

    def fresh() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(9, 16).half(), torch.zeros(9, 2, dtype=torch.int32)

    for _ in range(4):
        tensors = fresh()
        last = pair(7, *tensors)
    words = peers.words
    pair(7, *tensors)
    assert kinds == [["first"] * 2] * 2 + [["again"] * 2] * 3 and peers.words == words
    replay.forget()
    checked = pair(7, *tensors)
    pair(5, *tensors)
    assert kinds[5:] == [["first"] * 2] * 2
    # All but the sum's new tensor.
    assert last[0] == checked[0]
    assert (last[1][0], last[1][1][0], last[1][1][2:]) == (checked[1][0], checked[1][1][0], checked[1][1][2:])
    wrong = fresh()[1].long()
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        pair(7, tensors[0], wrong)
    room.close()
    with pytest.raises(RuntimeError, match="closed"):
        pair(7, *tensors)
