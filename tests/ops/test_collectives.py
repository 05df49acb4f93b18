"""Collectives of several ranks: torch.distributed's against plain sums, the kernels against these."""

from __future__ import annotations

import gc
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flashinfer.core.peers import PeerError, Peers
from flashinfer.ops import collectives
from flashinfer.ops.collectives import Mix, Reduce, Workspace
from flashinfer.ops.collectives.reference import rounded_to_fp8
from tests.ops.allreduce_checks import fp8_bound
from tests.ranks import outcomes, poisoned, run_ranks, skip_interpreter, two_gpus

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, world_size: int, seed: int) -> list[torch.Tensor]:
    """The inputs of all ranks, known to each; with zeros of both signs, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(world_size)]
    for rank, x in enumerate(inputs):
        flat = x.view(-1)
        flat[rank::7] = 0.0
        flat[rank::11] = -0.0
    return inputs


def _reduce_cases(rank: int, world_size: int, device: torch.device, backend: str, seed: int, cases: list[Any]) -> None:
    workspace = Workspace(Peers(None, device), 1 << 16)
    for i, (num_rows, hidden_size, dtype, two_shot) in enumerate(cases):
        inputs = _inputs((num_rows, hidden_size), dtype, world_size, seed + i)
        x = inputs[rank].to(device)
        total = torch.full_like(x, float("nan"))
        collectives.reduce(Reduce(x, total), workspace, two_shot=two_shot, backend=backend)
        expected = sum(y.float() for y in inputs).to(dtype)
        where = f"{cases[i]} on rank {rank}, call {i}"
        torch.testing.assert_close(total.cpu(), expected, rtol=0, atol=0, msg=lambda m, w=where: f"{w}: {m}")
        assert torch.equal(x.cpu(), inputs[rank])
    workspace.check()
    workspace.close()


def _random_cases(seed: int, count: int) -> list[Any]:
    """Some of many shapes, then one so often that all turns of its mailboxes come again."""
    rng = random.Random(seed)
    often = [(2, 300, FP16, i % 2 == 0) for i in range(10)]
    shapes = [(1, 1), (1, 8), (3, 5), (2, 4096), (7, 1000), (1, 8192), (5, 4099), (16, 2048)]
    return [(*rng.choice(shapes), rng.choice((FP16, FP32)), rng.choice((True, False))) for _ in range(count)] + often


def _norm_cases(rank: int, world_size: int, device: torch.device, backend: str, seed: int, cases: list[Any]) -> None:
    workspace = Workspace(Peers(None, device), 1 << 16)
    generator = torch.Generator().manual_seed(seed)
    for i, (num_rows, hidden_size, dtype, two_shot, quantised) in enumerate(cases):
        inputs = _inputs((num_rows, hidden_size), dtype, world_size, seed + i)
        residual = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
        weight = torch.rand(hidden_size, generator=generator).to(dtype)
        scale = torch.rand(1, generator=generator) + 0.1
        x = inputs[rank].to(device)
        empty = [torch.full_like(x, float("nan")) for _ in range(3)]
        codes = torch.full_like(x, float("nan")).to(torch.float8_e4m3fn) if quantised else None
        tensors = Reduce(
            x, empty[0], residual.to(device), empty[1], empty[2], weight.to(device), codes, scale.to(device)
        )
        collectives.reduce(tensors, workspace, 1e-6, 1.0, two_shot, backend=backend)
        exact = sum(y.double() for y in inputs)
        tolerance = {"rtol": 2**-9 if dtype == FP16 else 2**-6 if dtype == BF16 else 1e-5, "atol": 2e-3}
        torch.testing.assert_close(empty[0].cpu().double(), exact, **tolerance)
        exact = exact + residual.double()
        torch.testing.assert_close(empty[1].cpu().double(), exact, **tolerance)
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6) * (weight.double() + 1.0)
        torch.testing.assert_close(empty[2].cpu().double(), exact, **{**tolerance, "atol": 4e-3})
        if codes is not None:
            torch.testing.assert_close(codes.cpu().double(), exact / scale.double(), rtol=2**-3, atol=2**-6)
    workspace.check()
    workspace.close()
    _many_rows(rank, world_size, device, backend, seed)


def _many_rows(rank: int, world_size: int, device: torch.device, backend: str, seed: int) -> None:
    """Codes with a scale for each row, of more rows than go through the mailboxes at once."""
    workspace = Workspace(Peers(None, device), 1 << 12)
    inputs = _inputs((20, 128), FP32, world_size, seed)
    codes, scales = torch.empty(20, 128, dtype=torch.float8_e4m3fn, device=device), torch.empty(20, device=device)
    weight = torch.linspace(0.5, 2.0, 128, device=device)
    tensors = Reduce(inputs[rank].to(device), weight=weight, quantised=codes, scales=scales)
    collectives.reduce(tensors, workspace, 1e-6, backend=backend)
    exact = sum(x.double() for x in inputs)
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6) * weight.cpu().double()
    torch.testing.assert_close(scales.cpu().double(), exact.abs().amax(-1) / 448, rtol=1e-4, atol=0)
    got = codes.cpu().double() * scales.cpu().double()[:, None]
    torch.testing.assert_close(got, exact, rtol=2.0**-4 + 1e-3, atol=1e-4)
    workspace.check()
    workspace.close()


NORM_CASES = [
    (3, 64, FP32, False, False),
    (5, 128, FP16, True, True),
    (1, 2880, FP16, False, True),
    (4, 96, FP32, True, False),
]


def _share_cases(rank: int, world_size: int, device: torch.device, backend: str, seed: int, cases: list[Any]) -> None:
    workspace = Workspace(Peers(None, device), 1 << 16)
    for i, (num_rows, hidden_size, dtype) in enumerate(cases):
        inputs = _inputs((num_rows, hidden_size), dtype, world_size, seed + i)
        x = inputs[rank].to(device)
        out = torch.full((world_size * num_rows, hidden_size), float("nan"), dtype=dtype, device=device)
        collectives.share("all_gather", out, x, workspace, backend)
        assert torch.equal(out.cpu(), torch.cat(inputs)), (cases[i], rank)
        whole = _inputs((world_size * num_rows, hidden_size), dtype, world_size, seed + i)
        part = torch.full((num_rows, hidden_size), float("nan"), dtype=dtype, device=device)
        collectives.share("reduce_scatter", part, whole[rank].to(device), workspace, backend)
        expected = sum(y.float() for y in whole).view(world_size, num_rows, hidden_size)[rank].to(dtype)
        assert torch.equal(part.cpu(), expected), (cases[i], rank)
    workspace.check()
    workspace.close()


SHARE_CASES = [(1, 1, FP16), (3, 5, FP32), (2, 4096, FP16), (7, 1234, FP32), (33, 1000, FP16)]


def _mix_cases(rank: int, world_size: int, device: torch.device, backend: str, seed: int, cases: list[Any]) -> None:
    """Rows that are sums over experts: of all experts' rows, or of those a table names, some of them nowhere."""
    workspace = Workspace(Peers(None, device), 1 << 14)
    generator = torch.Generator().manual_seed(seed)
    for num_rows, hidden_size, num_parts, dtype, by_table, two_shot in cases:
        shape = (num_rows + 3 if by_table else num_rows * num_parts, hidden_size)
        rows = [torch.randn(shape, generator=generator).to(dtype) for _ in range(world_size)]
        added = [torch.randn(num_rows, hidden_size, generator=generator).to(dtype) for _ in range(world_size)]
        factors = torch.rand((num_rows, num_parts) if by_table else (num_parts, num_rows), generator=generator)
        table = torch.randint(-1, shape[0], (num_rows, num_parts), generator=generator, dtype=torch.int32)
        parts = [y.double() for y in added]
        for x, part in zip(rows, parts, strict=True):
            for i in range(num_rows):
                for j in range(num_parts):
                    place, factor = (table[i, j], factors[i, j]) if by_table else (j * num_rows + i, factors[j, i])
                    if place >= 0:
                        part[i] += 2.5 * factor.double() * x[place].double()
        out = torch.full((num_rows, hidden_size), float("nan"), dtype=dtype, device=device)
        given = (table.to(device) if by_table else None, factors.to(device), added[rank].to(device))
        mix = Mix(num_rows, num_parts, *given, 2.5)
        collectives.reduce(Reduce(rows[rank].to(device), out), workspace, two_shot=two_shot, mix=mix, backend=backend)
        exact = sum(parts, torch.zeros(num_rows, hidden_size, dtype=torch.float64))
        # Each part and the sum are rounded once; in fp32, terms that are larger than their sum as well.
        bound = torch.finfo(dtype).eps * (sum(part.abs() for part in parts) + exact.abs()) + 1e-5
        over = (out.cpu().double() - exact).abs() - bound
        assert over.max() <= 0, (rank, num_rows, hidden_size, over.max())
    workspace.check()
    workspace.close()


MIX_CASES = [
    (3, 64, 2, FP32, True, False),
    (5, 96, 3, FP16, False, True),
    (17, 2048, 3, FP16, True, None),  # more than goes through the mailboxes at once
    (4, 128, 1, FP32, False, None),
]


def _fp8_cases(rank: int, world_size: int, device: torch.device, backend: str, seed: int, cases: list[Any]) -> None:
    workspace = Workspace(Peers(None, device), 1 << 14)
    for i, (shape, group_size, dtype) in enumerate(cases):
        inputs = _inputs(shape, dtype, world_size, seed + i)
        out = torch.full(shape, float("nan"), dtype=dtype, device=device)
        collectives.reduce_in_fp8(out, inputs[rank].to(device), group_size, workspace, backend)
        error = (out.cpu().double() - sum(x.double() for x in inputs)).abs()
        over = error - fp8_bound(inputs, group_size)
        assert over.max() <= 0, (cases[i], rank, over.max())
        assert error.max() > 0 or out.numel() < 10  # it was rounded
        # The very numbers, but for those whose quotient lies between two codes.
        expected = rounded_to_fp8(sum(rounded_to_fp8(x.float(), group_size) for x in inputs), group_size).to(dtype)
        assert (out.cpu() != expected).float().mean() <= 0.02, (cases[i], rank)
        everyone = workspace.peers.gather("bits", out.float().sum().item())
        assert len(set(everyone)) == 1  # all ranks have the same
    workspace.check()
    workspace.close()


FP8_CASES = [((1, 8), 8, FP32), ((7, 300), 128, FP16), ((3, 4096), 256, FP32), ((5, 5000), 256, FP16)]


def _everything(rank: int, world_size: int, device: torch.device, backend: str, seed: int) -> None:
    """All collectives in one process a rank: starting one takes longer."""
    ranks = (rank, world_size, device, backend, seed)
    with poisoned():
        _reduce_cases(*ranks, _random_cases(seed, 8))
        _norm_cases(*ranks, NORM_CASES)
        _share_cases(*ranks, SHARE_CASES)
        _mix_cases(*ranks, MIX_CASES)
        _fp8_cases(*ranks, FP8_CASES)


@pytest.mark.parametrize(
    ("backend", "world_size"), [("torch", 1), ("torch", 2), ("torch", 4), ("triton", 2), ("triton", 3)]
)
def test_collectives(backend: str, world_size: int, rng: random.Random) -> None:
    skip_interpreter(backend)
    run_ranks(_everything, world_size, backend, rng.randrange(1000))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_collectives_on_gpus(backend: str, rng: random.Random) -> None:
    run_ranks(_everything, two_gpus(), backend, rng.randrange(1000), device="cuda")


def _other_shape(rank: int, world_size: int, device: torch.device, backend: str) -> str:
    workspace = Workspace(Peers(None, device, timeout=4.0), 1 << 16)
    if backend == "triton":
        workspace.room(torch.float32, 2048)  # the ranks meet
    x = torch.ones(2 + rank, 64, device=device)
    try:
        for _ in range(2):  # the kernels tell of the first call when the next one is made
            collectives.reduce(Reduce(x, torch.empty_like(x)), workspace, backend=backend)
            if device.type == "cuda":
                torch.cuda.synchronize()
            workspace.check()
    except PeerError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ranks_with_other_shapes_are_named(backend: str) -> None:
    skip_interpreter(backend)
    _check_named(*run_ranks(_other_shape, 2, backend))


@pytest.mark.gpu
def test_ranks_with_other_shapes_are_named_on_gpus() -> None:
    _check_named(*run_ranks(_other_shape, two_gpus(), "triton", device="cuda"))


def _check_named(first: str, second: str) -> None:
    assert "rank 1 made another call; number of elements: 128 here, 192 there" in first, first
    assert "rank 0 made another call; number of elements: 192 here, 128 there" in second, second


def _missing(rank: int, world_size: int, device: torch.device, backend: str) -> tuple[str, float]:
    workspace = Workspace(Peers(None, device, timeout=3.0), 1 << 16)
    x = torch.ones(4, 64, device=device)
    collectives.reduce(Reduce(x, torch.empty_like(x)), workspace, backend=backend)
    if rank == 1:
        os._exit(5)
    begin = time.monotonic()
    try:
        for _ in range(50):
            collectives.reduce(Reduce(x, torch.empty_like(x)), workspace, backend=backend)
        if device.type == "cuda":
            torch.cuda.synchronize()
        workspace.check()
    except PeerError as error:
        return str(error), time.monotonic() - begin
    return "no error", 0.0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_rank_that_died_is_named_in_time(backend: str) -> None:
    skip_interpreter(backend)
    _check_dead(*outcomes(_missing, 2, backend))


@pytest.mark.gpu
def test_a_rank_that_died_is_named_in_time_on_gpus() -> None:
    _check_dead(*outcomes(_missing, two_gpus(), "triton", device="cuda"))


def _check_dead(survivor: Any, dead: Any) -> None:
    message, seconds = survivor
    assert "exit code 5" in str(dead)
    assert "rank 1" in message and seconds < 30, (message, seconds)


def _rounds(rank: int, world_size: int, device: torch.device) -> int:
    peers = Peers(None, device)
    for _ in range(5):
        workspace = Workspace(Peers(None, device), 1 << 14)
        x = torch.ones(4, 64)
        for call in range(1, 6):
            collectives.reduce(Reduce(x, x), workspace, backend="triton")
            assert (x == world_size**call).all()
        # Places keep their turn: a count of uses would pass 2^31 after some days.
        room = workspace.room(torch.float32, 2048)
        assert all((uses >= 0).all() and (uses < 3).all() for uses in (*room.uses, room.greeted))
        del room
        workspace.close()
        with pytest.raises(RuntimeError, match="destroyed"):
            workspace.check()
    peers.gather("end", None)
    gc.collect()
    return sum("flashinfer-" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_workspaces_leave_nothing() -> None:
    skip_interpreter("triton")
    assert run_ranks(_rounds, 2) == [0, 0]
