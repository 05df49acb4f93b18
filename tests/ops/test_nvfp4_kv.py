"""NVFP4 paged KV against loops over tokens."""

from __future__ import annotations

import random

import pytest
import torch

from flashinfer.page import (
    nvfp4_quantize_append_paged_kv_cache,
    nvfp4_quantize_append_paged_kv_cache_with_slot_mapping,
)
from flashinfer.quantization import nvfp4_kv_dequantize_paged
from flashinfer.testing import assert_close_to_oracle
from tests.ops.common import IMPLEMENTATIONS, force

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
PAGES, PAGE_SIZE, MAX_LEN = 9, 4, 11
LENS = [5, 0, 11, 8]


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test on every implementation, through the public functions."""
    force(monkeypatch, "page", request.param)
    return force(monkeypatch, "quantization", request.param)


def cache(num_heads: int, head_dim: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(bytes of codes, bytes of e4m3 scales, their product in fp64), NHD."""
    codes = torch.randint(0, 16, (PAGES, PAGE_SIZE, num_heads, head_dim))
    scales = torch.randint(0, 127, (PAGES, PAGE_SIZE, num_heads, head_dim // 16)).to(torch.uint8)
    exact = VALUES.double()[codes] * scales.view(torch.float8_e4m3fn).double().repeat_interleave(16, dim=-1)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed.to(device), scales.to(device), exact.to(device)


def form(k: torch.Tensor, v: torch.Tensor, name: str, layout: str) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The forms in which callers hand over a cache."""
    if layout == "HND":
        k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    return torch.stack([k, v], dim=1) if name == "stacked" else (k, v)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("name", ["tuple", "stacked"])
@pytest.mark.parametrize("head_dim", [16, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_paged(
    dtype: torch.dtype, head_dim: int, name: str, layout: str, rng: random.Random, device: str
) -> None:
    num_heads = rng.choice([1, 3])
    k, v = (cache(num_heads, head_dim, device) for _ in range(2))
    table = torch.tensor([rng.sample(range(PAGES), 3) for _ in LENS], device=device)
    lens = torch.tensor(LENS, dtype=torch.int32, device=device)
    scales = torch.rand(2, 1, device=device) + 0.5
    wide = torch.full((2, len(LENS), MAX_LEN, num_heads, head_dim + 8), 7.0, dtype=dtype, device=device)
    outs = wide[..., :head_dim]
    codes, factors = (form(k[i], v[i], name, layout) for i in range(2))
    if rng.random() < 0.5:
        table = table.int()
        view = torch.float8_e4m3fn
        factors = factors.view(view) if isinstance(factors, torch.Tensor) else tuple(x.view(view) for x in factors)
    nvfp4_kv_dequantize_paged(codes, factors, table, lens, *scales, *outs, kv_layout=layout)
    assert (wide[..., head_dim:] == 7).all()
    for out, (_, _, exact), scale in zip(outs, (k, v), scales, strict=True):
        for request, length in enumerate(LENS):
            assert (out[request, length:] == 7).all()
            places = [(int(table[request, t // PAGE_SIZE]), t % PAGE_SIZE) for t in range(length)]
            if places:
                wanted = torch.stack([exact[place] for place in places]) * scale.double()
                assert_close_to_oracle(out[request, :length], wanted, wanted.to(dtype))


def test_nothing(device: str) -> None:
    k, factors, _ = cache(2, 16, device)
    out = torch.full((0, 3, 2, 16), 7.0, device=device)
    one, table = torch.ones(1, device=device), torch.zeros(0, 2, dtype=torch.int32, device=device)
    nvfp4_kv_dequantize_paged((k, k), (factors, factors), table, table[:, 0], one, one, out, out)
    out = torch.full((2, 3, 2, 16), 7.0, device=device)
    table = torch.zeros(2, 0, dtype=torch.int32, device=device)
    lens = torch.zeros(2, dtype=torch.int32, device=device)
    nvfp4_kv_dequantize_paged((k, k), (factors, factors), table, lens, one, one, out, out)
    assert (out == 7).all()


def test_errors(device: str) -> None:
    k, factors, _ = cache(2, 32, device)
    out, one = torch.empty(1, 8, 2, 32, device=device), torch.ones(1, device=device)
    table, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([[3, 1]], [5]))
    caches = (k, k), (factors, factors)
    with pytest.raises(ValueError, match=r"paged_kv_cache: got dtype torch.int8"):
        nvfp4_kv_dequantize_paged((k.view(torch.int8), k), caches[1], table, lens, one, one, out, out)
    with pytest.raises(ValueError, match=r"kv_cache_sf: got shape \[9, 4, 2, 1\]"):
        nvfp4_kv_dequantize_paged(caches[0], (factors[..., :1], factors), table, lens, one, one, out, out)
    with pytest.raises(ValueError, match=r"output_v: got dtype torch.int64"):
        nvfp4_kv_dequantize_paged(*caches, table, lens, one, one, out, out.long())
    with pytest.raises(ValueError, match=r"v_scale: got float"):
        nvfp4_kv_dequantize_paged(*caches, table, lens, one, 1.0, out, out)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="kv_layout"):
        nvfp4_kv_dequantize_paged(*caches, table, lens, one, one, out, out, "NDH")
    if device == "cpu":
        with pytest.raises(ValueError, match=r"block_tables: got values from 3 to 9"):
            nvfp4_kv_dequantize_paged(*caches, table.where(table > 1, 9), lens, one, one, out, out)
        with pytest.raises(ValueError, match=r"seq_lens: got values from 9 to 9, expected values in \[0, 9\)"):
            nvfp4_kv_dequantize_paged(*caches, table, lens + 4, one, one, out, out)


# ---- the append


def encoded(x: torch.Tensor, scale: float) -> tuple[list[int], int]:
    """(codes, byte of the scale) of 16 numbers, one at a time; of two equally near codes the even one."""
    largest = max((abs(float(v)) for v in x if not v.isnan()), default=0.0)
    # fp32, as the kernel: two divisions, each rounded.
    stored = (torch.tensor(largest) / torch.tensor(6.0) / torch.tensor(scale)).clamp(max=448).to(torch.float8_e4m3fn)
    factor = stored.float() * torch.tensor(scale)
    codes = []
    for v in x.float():
        ratio = 0.0 if factor == 0 else float(v / factor)
        magnitudes = VALUES[:8].tolist()
        nearest = 7 if ratio != ratio else min(range(8), key=lambda i: (abs(magnitudes[i] - min(abs(ratio), 6)), i % 2))
        codes.append(nearest + 8 * (ratio == ratio and (float(v) < 0 or str(float(v)) == "-0.0")))
    return codes, int(stored.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("addressed", ["table", "slots"])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 16), (3, 48), (2, 128)])
def test_append(
    num_heads: int, head_dim: int, addressed: str, dtype: torch.dtype, rng: random.Random, device: str
) -> None:
    """Every written byte is that of a loop over numbers, every other byte stays."""
    layout, name = rng.choice(["NHD", "HND"]), rng.choice(["tuple", "stacked"])
    nnz, scales = 7, (0.25, 1.7)
    wide = torch.randn(2, nnz, num_heads, head_dim + 8, device=device).to(dtype)
    wide[0, 0, 0, :7] = torch.tensor([0.0, -0.0, 1e-7, 2.5, -5.0, float("nan"), 0.75], device=device)
    wide[1, 1] = 0
    wide[1, 2, 0, 3] = float("inf")
    key, value = wide[..., :head_dim]
    k, v = (cache(num_heads, head_dim, device) for _ in range(2))
    codes, factors = (form(k[i].clone(), v[i].clone(), name, layout) for i in range(2))
    slots = rng.sample(range(PAGES * PAGE_SIZE), nnz)
    slots[3] = -1
    if addressed == "slots":
        where = torch.tensor(slots, device=device, dtype=rng.choice([torch.int32, torch.int64]))
        nvfp4_quantize_append_paged_kv_cache_with_slot_mapping(
            key, value, where, codes, factors, *scales, kv_layout=layout
        )
    else:
        # A request of one page for each token.
        pages = torch.tensor([max(s, 0) // PAGE_SIZE for s in slots], dtype=torch.int32, device=device)
        count = torch.arange(nnz + 1, dtype=torch.int32, device=device)
        batch_indices = torch.where(torch.tensor(slots, device=device) < 0, -1, count[:nnz])
        positions = torch.tensor([s % PAGE_SIZE for s in slots], dtype=torch.int32, device=device)
        table = (batch_indices.int(), positions, codes, factors, pages, count, positions + 1)
        nvfp4_quantize_append_paged_kv_cache(key, value, *table, *scales, kv_layout=layout)
    for i, (rows, before) in enumerate(((key, k), (value, v))):
        found = [x[:, i] if isinstance(x, torch.Tensor) else x[i] for x in (codes, factors)]
        got_codes, got_factors = (x if layout == "NHD" else x.transpose(1, 2) for x in found)
        wanted_codes, wanted_factors = before[0].cpu().clone(), before[1].cpu().clone()
        for token, slot in enumerate(slots):
            for head in range(num_heads if slot >= 0 else 0):
                for j in range(head_dim // 16):
                    ours, byte = encoded(rows[token, head, 16 * j : 16 * j + 16].cpu(), scales[i])
                    packed = [a | b << 4 for a, b in zip(ours[::2], ours[1::2], strict=True)]
                    place = (slot // PAGE_SIZE, slot % PAGE_SIZE, head)
                    wanted_codes[(*place, slice(8 * j, 8 * j + 8))] = torch.tensor(packed, dtype=torch.uint8)
                    wanted_factors[(*place, j)] = byte
        assert torch.equal(got_codes.cpu(), wanted_codes)
        assert torch.equal(got_factors.cpu(), wanted_factors)


def test_append_then_dequantize(device: str) -> None:
    """What comes back is off by half a step of the codes, and the rounding of the scale, at most."""
    x, slots = torch.randn(12, 2, 32, device=device), torch.arange(12, device=device)
    codes = torch.zeros(2, 3, 4, 2, 16, dtype=torch.uint8, device=device)
    factors = torch.zeros(2, 3, 4, 2, 2, dtype=torch.uint8, device=device)
    caches = (codes[0], codes[1]), (factors[0], factors[1])
    nvfp4_quantize_append_paged_kv_cache_with_slot_mapping(x, x, slots, *caches, 0.01, 0.01)
    table, lens = torch.tensor([[0, 1, 2]], device=device), torch.tensor([12], dtype=torch.int32, device=device)
    out, scale = torch.empty(2, 1, 12, 2, 32, device=device), torch.tensor([0.01], device=device)
    nvfp4_kv_dequantize_paged(*caches, table, lens, scale, scale, *out)
    largest = x.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True).expand(-1, -1, -1, 16).flatten(-2)
    assert ((out[0, 0] - x).abs() <= largest * (1 / 6 + 2**-4)).all()
    assert torch.equal(out[0], out[1])


def test_append_errors(device: str) -> None:
    x, slots = torch.randn(3, 2, 32, device=device), torch.arange(3, device=device)
    codes = torch.zeros(3, 4, 2, 16, dtype=torch.uint8, device=device)
    factors = torch.zeros(3, 4, 2, 2, dtype=torch.uint8, device=device)
    append = nvfp4_quantize_append_paged_kv_cache_with_slot_mapping
    with pytest.raises(ValueError, match=r"k_scale: got 0.0, expected a number above 0"):
        append(x, x, slots, (codes, codes), (factors, factors), 0.0, 1.0)
    with pytest.raises(ValueError, match=r"last dimension of append_key: got 24"):
        append(x[..., :24], x[..., :24], slots, (codes, codes), (factors, factors), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"kv_cache_sf: got shape"):
        append(x, x, slots, (codes, codes), (codes, codes), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"append_key: got 3 rows for 4 slots"):
        append(x, x, torch.arange(4, device=device), (codes, codes), (factors, factors), 1.0, 1.0)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"slot_mapping: got values from 10 to 12"):
            append(x, x, slots + 10, (codes, codes), (factors, factors), 1.0, 1.0)
