"""NVFP4 paged KV against loops over tokens."""

from __future__ import annotations

import random

import pytest
import torch

from flashinfer.quantization import nvfp4_kv_dequantize_paged
from flashinfer.testing import assert_close_to_oracle
from tests.ops.common import IMPLEMENTATIONS, force

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
PAGES, PAGE_SIZE, MAX_LEN = 9, 4, 11
LENS = [5, 0, 11, 8]


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test on every implementation, through the public functions."""
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
