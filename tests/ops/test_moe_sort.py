"""Pairs of tokens and experts in the order of experts, against torch's stable sort; exact."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from flashinfer.core.arch import arch_of
from flashinfer.core.scratch import Scratch
from flashinfer.ops.moe import MoESpec, Routes
from tests.ops.common import DEVICE

pytest.importorskip("triton")
from flashinfer.ops.moe.triton import configs, launch

ALONE, CHUNK = configs.SORT_ALONE, configs.SORT_CHUNK
# Sizes whose last chunk, last block or only block ends early, or just does not.
SIZES = (1, CHUNK - 1, CHUNK + 1, ALONE, ALONE + 1, 3 * CHUNK, 5 * CHUNK + 17)


def sorted_pairs(ids: torch.Tensor, num_experts: int, first: int) -> launch.Sorted:
    spec = MoESpec(*[None] * len(MoESpec._fields))._replace(num_experts=num_experts, top_k=ids.shape[1])  # type: ignore[arg-type]
    tensors = SimpleNamespace(x=ids, routes=Routes(ids, torch.empty(0, device=DEVICE), first))
    call = launch.Call(spec, arch_of(ids.device), tensors, Scratch(ids, None))  # type: ignore[arg-type]
    return launch.sort_pairs(call, order=True, tokens=True, rows=True)


def check(ids: torch.Tensor, num_experts: int, first: int = 0) -> None:
    found = sorted_pairs(ids, num_experts, first)
    local = ids.flatten().long() - first
    held = (local >= 0) & (local < num_experts)
    order = local.where(held, torch.tensor(num_experts, device=DEVICE)).argsort(stable=True)[: int(held.sum())]
    counts = local[held].bincount(minlength=num_experts)
    rows = torch.full_like(local, -1)
    rows[order] = torch.arange(len(order), device=DEVICE)
    assert found.order is not None and found.tokens is not None and found.rows is not None
    assert found.indptr.tolist() == [0, *counts.cumsum(0).tolist()]
    assert torch.equal(found.order[: len(order)].long(), order)
    assert torch.equal(found.tokens[: len(order)].long(), order // ids.shape[1])
    assert torch.equal(found.rows.long(), rows)


@pytest.mark.parametrize("num_pairs", SIZES)
@pytest.mark.parametrize("num_experts", [1, 8, 100, 257])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_random_pairs(num_pairs: int, num_experts: int, dtype: torch.dtype) -> None:
    check(torch.randint(0, num_experts, (num_pairs, 1), device=DEVICE).to(dtype), num_experts)


@pytest.mark.parametrize("num_pairs", [ALONE, 3 * CHUNK + 6])
def test_foreign_experts(num_pairs: int) -> None:
    """Those before and behind the ones held here, and negative ones."""
    check(torch.randint(-2, 70, (num_pairs // 2, 2), device=DEVICE).int(), 24, 13)
    check(torch.randint(-2, 13, (num_pairs // 2, 2), device=DEVICE).int(), 24, 13)


@pytest.mark.parametrize("num_experts", [5, 64])
def test_uneven_experts(num_experts: int, rng: random.Random) -> None:
    """All pairs to one, and most."""
    ids = torch.full((4 * CHUNK, 2), rng.randrange(num_experts), dtype=torch.int32, device=DEVICE)
    check(ids, num_experts)
    ids[::7] = rng.randrange(num_experts)
    check(ids, num_experts)


@pytest.mark.parametrize("most", [2, 4])
def test_several_chunks_of_a_block(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with very many pairs: `most` blocks, each of several chunks, and counts read in rounds."""
    monkeypatch.setattr(configs, "MAX_SORT_BLOCKS", most)
    monkeypatch.setattr(configs, "SORT_TILE", 64)
    ids = torch.randint(0, 40, (3 * CHUNK + 5, 4), device=DEVICE).int()
    assert configs.sort_blocks(ids.numel())[0] == most
    check(ids, 40)


@pytest.mark.gpu
@pytest.mark.parametrize("num_pairs", [32_768, 131_072, 1_000_003])
def test_very_many_pairs(num_pairs: int) -> None:
    for num_experts in (128, 256, 1024):
        check(torch.randint(0, num_experts, (num_pairs, 1), device=DEVICE).int(), num_experts)
