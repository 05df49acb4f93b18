"""Appends by slots, with scales, and of latent KV; index functions on every implementation; graphs."""

from __future__ import annotations

import random

import pytest
import torch

from flashinfer import page
from tests.ops.backends import IMPLEMENTATIONS, force
from tests.ops.fp8_codes import FP8, nearest, same

CODES = (*FP8, torch.int8)


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test on every implementation, through the public functions."""
    return force(monkeypatch, "page", request.param)


def int32(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def coded(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `x` over `scale` in the dtype of the cache."""
    x = x.float() / scale
    if dtype == torch.int8:
        return x.nan_to_num(nan=0.0).double().round().clamp(-128, 127).to(torch.int8)
    return nearest(x, dtype) if dtype in FP8 else x.to(dtype)


def rows_and_cache(
    num_tokens: int, pages: int, page_size: int, cache_dtype: torch.dtype, device: str, layout: str = "NHD"
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values with large, tiny and NaN components, and a cache (k, v) as views of wider pages."""
    key, value = torch.randn(2, num_tokens, 3, 24, device=device).half() * 40
    key[..., 0], key[..., 1], value[..., 2] = torch.nan, torch.inf, 1e-4
    inner = (page_size, 3) if layout == "NHD" else (3, page_size)
    wide = torch.randint(-9, 9, (pages, *inner, 2 * 24), device=device).to(cache_dtype)
    return key, value, (wide[..., :24], wide[..., 24:])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.float32, *CODES])
@pytest.mark.parametrize("scale", ["one", "number", "tensor", "heads"])
def test_slot_mapping(
    rng: random.Random, device: str, cache_dtype: torch.dtype, scale: str, layout: str, backend: str
) -> None:
    num_tokens, pages, page_size = 13, 7, 4
    key, value, cache = rows_and_cache(num_tokens + 2, pages, page_size, cache_dtype, device, layout)
    slots = rng.sample(range(pages * page_size), num_tokens)
    slots[4], slots[9] = -1, -7
    scales = {
        "one": (1.0, 1.0),
        "number": (0.37, 2.5),
        "tensor": tuple(torch.tensor([[0.37], [2.5]], device=device)),
        "heads": tuple(torch.rand(2, 3, device=device) + 0.1),
    }[scale]
    views = [x if layout == "NHD" else x.transpose(1, 2) for x in cache]
    expected = [x.clone() for x in views]
    for want, row, divisor in zip(expected, (key, value), scales, strict=True):
        divisor = torch.as_tensor(divisor, dtype=torch.float32, device=device).reshape(-1, 1)
        stored = coded(row, divisor, cache_dtype)
        for i, slot in enumerate(slots):
            if slot >= 0:
                want[slot // page_size, slot % page_size] = stored[i]
    for dtype in (torch.int32, torch.int64):
        mapping = torch.tensor(slots, dtype=dtype, device=device)
        page.append_paged_kv_cache_with_slot_mapping(key, value, mapping, cache, *scales, layout)
        for got, want in zip(views, expected, strict=True):
            assert same(got, want)


@pytest.mark.parametrize("cache_dtype", CODES)
def test_scales_through_a_page_table(device: str, cache_dtype: torch.dtype) -> None:
    key, value, cache = rows_and_cache(4, 6, 2, cache_dtype, device)
    before = [x.clone() for x in cache]
    where = int32([0, 0, -1, 1], device), int32([0, 1, 3, 2], device)
    table = int32([5, 2, 0], device), int32([0, 1, 3], device), int32([2, 1], device)
    page.quantize_append_paged_kv_cache(key, value, *where, cache, *table, 0.5, 3.0)
    for got, row, old, scale in zip(cache, (key, value), before, (0.5, 3.0), strict=True):
        stored = coded(row, torch.tensor(scale, device=device), cache_dtype)
        old[5], old[0, 0] = stored[:2], stored[3]
        assert same(got, old)


@pytest.mark.parametrize("cache_dtype", [torch.float16, *FP8])
@pytest.mark.parametrize("dims", [(512, 64), (24, 8)])
def test_mla(device: str, cache_dtype: torch.dtype, dims: tuple[int, int]) -> None:
    rows = [torch.randn(5, dim, device=device).half() for dim in dims]
    caches = [torch.randn(4, 3, dim + 8, device=device).to(cache_dtype)[..., :dim] for dim in dims]
    expected = [x.clone() for x in caches]
    batch_indices, positions = int32([0, 1, 1, -3, 1], device), int32([2, 0, 1, 9, 3], device)
    table = int32([1, 3, 0], device), int32([0, 1, 3], device), int32([3, 1], device)
    page.append_paged_mla_kv_cache(*rows, batch_indices, positions, *caches, *table)
    for got, want, row in zip(caches, expected, rows, strict=True):
        stored = coded(row, torch.ones(1, device=device), cache_dtype)
        want[1, 2], want[3, :2], want[0, 0] = stored[0], stored[1:3], stored[4]
        assert same(got, want)


@pytest.mark.parametrize("batch_size", [0, 1, 5, 300])
def test_index_functions(rng: random.Random, device: str, batch_size: int) -> None:
    appended = [rng.choice([0, 0, 1, 3]) for _ in range(batch_size)]
    lengths = [n + rng.randint(0, 40) for n in appended]
    pages = [-(-n // 4) for n in lengths]
    page_indptr = int32([0, *torch.tensor(pages).cumsum(0).tolist()], device)
    last = int32([(n - 1) % 4 + 1 if n else 3 for n in lengths], device)
    got = page.get_seq_lens(page_indptr, last, 4)
    assert got.dtype == torch.int32 and got.tolist() == lengths
    indptr = int32([0, *torch.tensor(appended).cumsum(0).tolist()], device)
    nnz = sum(appended)
    batch_indices, positions = page.get_batch_indices_positions(indptr, got, nnz + 3)
    expected = [(i, lengths[i] - n + j) for i, n in enumerate(appended) for j in range(n)] + 3 * [(-1, 0)]
    assert list(zip(batch_indices.tolist(), positions.tolist(), strict=True)) == expected


def test_slot_mapping_errors(device: str) -> None:
    key, value, cache = rows_and_cache(3, 2, 2, torch.float8_e4m3fn, device)
    append = page.append_paged_kv_cache_with_slot_mapping
    slots = torch.tensor([0, 1, 2], device=device)
    with pytest.raises(ValueError, match=r"slot_mapping: got dtype torch.float32"):
        append(key, value, slots.float(), cache)
    with pytest.raises(ValueError, match=r"append_key: got 2 rows for 3 slots"):
        append(key[:2], value[:2], slots, cache)
    with pytest.raises(TypeError, match=r"v_scale: got float, expected the type of k_scale"):
        append(key, value, slots, cache, torch.ones(1, device=device), 2.0)
    with pytest.raises(ValueError, match=r"k_scale: got shape \[2\], expected shape \[3\]"):
        append(key, value, slots, cache, *torch.ones(2, 2, device=device))
    if device == "cpu":
        with pytest.raises(ValueError, match=r"slot_mapping: got values from 0 to 4, expected values in \[0, 4\)"):
            append(key, value, torch.tensor([0, 4, -1]), cache)
    with pytest.raises(ValueError, match=r"K cache: got dtype torch.float16"):
        page.quantize_append_paged_kv_cache(
            key, value, slots.int(), slots.int(), tuple(x.half() for x in cache), *[slots.int()] * 3, 1.0, 1.0
        )


def test_compiled_without_a_break(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile(fullgraph=True)` of a step's index functions and appends gives what eager gives."""
    monkeypatch.undo()  # the compiler cannot look into the poisoned torch.empty
    force(monkeypatch, "page", backend)
    torch.compiler.reset()
    key, value, cache = rows_and_cache(4, 6, 2, torch.float8_e4m3fn, device)
    other = tuple(x.clone() for x in cache)
    indptr, last = int32([0, 1, 3], device), int32([2, 1], device)

    def step(caches: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
        lengths = page.get_seq_lens(indptr, last, 2)
        where = page.get_batch_indices_positions(int32([0, 1, 4], device), lengths, 4)
        page.append_paged_kv_cache(key, value, *where, caches, int32([5, 2, 0], device), indptr, last)
        page.append_paged_kv_cache_with_slot_mapping(key, value, slots, caches, 2.0, 3.0)
        return lengths

    slots = torch.tensor([3, -1, 0, 6], device=device)
    expected = step(cache, slots)
    got = torch.compile(step, fullgraph=True, backend="eager")(other, slots)
    assert torch.equal(got, expected)
    assert all(same(x, y) for x, y in zip(cache, other, strict=True))


@pytest.mark.gpu
def test_graph_replay(backend: str) -> None:
    """A captured append writes what its tensors hold at the replay, and needs no host."""
    key, value, cache = rows_and_cache(6, 5, 4, torch.float8_e4m3fn, "cuda")
    slots = torch.arange(6, device="cuda")
    page.append_paged_kv_cache_with_slot_mapping(key, value, slots, cache, 2.0, 2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        page.append_paged_kv_cache_with_slot_mapping(key, value, slots, cache, 2.0, 2.0)
    expected = tuple(x.clone() for x in cache)
    key.normal_(), slots.add_(7)
    page.append_paged_kv_cache_with_slot_mapping(key, value, slots, expected, 2.0, 2.0)
    graph.replay()
    assert all(same(x, y) for x, y in zip(cache, expected, strict=True))
