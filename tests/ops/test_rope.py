"""RoPE against fp64 rotations by complex numbers, with a plain torch rotation in the same dtype as the measure."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from flashinfer import rope
from flashinfer.testing import assert_close_to_oracle
from tests.ops.backends import IMPLEMENTATIONS, force

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Heads = torch.Tensor


def frequencies(rotary_dim: int, scale: float, theta: float, llama31: tuple[float, float, float] | None) -> Heads:
    """fp64 radians a token, one pair at a time, as the papers write them."""
    result = []
    for d in range(rotary_dim // 2):
        frequency = theta ** (-2 * d / rotary_dim)
        if llama31 is None:
            result.append(frequency / scale)
            continue
        low, high, context = llama31
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            result.append(frequency)
        elif wavelength > context / low:
            result.append(frequency / scale)
        else:
            smooth = (context / wavelength - low) / (high - low)
            result.append((1 - smooth) * frequency / scale + smooth * frequency)
    return torch.tensor(result, dtype=torch.float64)


def rotated(x: Heads, angle: Heads, interleave: bool) -> Heads:
    """Rotation of `x` in x's dtype; angle `[nnz, rotary_dim / 2]`."""
    rotary_dim = 2 * angle.shape[-1]
    head, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    pairs = head.unflatten(-1, (-1, 2)) if interleave else torch.stack(head.chunk(2, dim=-1), dim=-1)
    cos, sin = (f(angle)[:, None, :].to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = pairs.unbind(-1)
    new = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(new, dim=-1).flatten(-2) if interleave else torch.cat(new, dim=-1)
    return torch.cat([joined, rest], dim=-1)


def check(got: Heads, x: Heads, positions: Heads, frequency: Heads, interleave: bool) -> None:
    frequency = frequency.to(x.device)
    exact = positions.double()[:, None] * frequency
    coarse = positions.float()[:, None] * frequency.float()
    assert_close_to_oracle(got, rotated(x.double(), exact, interleave), rotated(x, coarse, interleave))


def heads(nnz: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: str) -> Heads:
    """A view into a wider buffer, as the q and k of a fused projection are."""
    wide = torch.randn(nnz, num_heads * head_dim + 24, device=device).to(dtype)
    return wide[:, 8 : 8 + num_heads * head_dim].view(nnz, num_heads, head_dim)


def requests(lengths: list[int], device: str) -> tuple[Heads, Heads, Heads]:
    """(indptr, offsets, positions) of requests that already hold random numbers of tokens."""
    indptr = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    offsets = torch.randint(0, 500, (len(lengths),), dtype=torch.int32)
    positions = torch.cat([offset + torch.arange(n) for offset, n in zip(offsets, lengths, strict=True)])
    return indptr.to(device), offsets.to(device), positions.to(device)


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test on every implementation, through the public functions."""
    return force(monkeypatch, "rope", request.param)


LLAMA31 = {"low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
VARIANTS = {
    "plain": (rope.apply_rope, rope.apply_rope_pos_ids, {"rope_scale": 1, "rope_theta": 1e4}, None),
    "scaled": (rope.apply_rope, rope.apply_rope_pos_ids, {"rope_scale": 2.5, "rope_theta": 1e6}, None),
    "llama31": (
        rope.apply_llama31_rope,
        rope.apply_llama31_rope_pos_ids,
        {"rope_scale": 8, "rope_theta": 5e5, **LLAMA31},
        (1, 4, 8192),
    ),
}
INPLACE = {
    rope.apply_rope: rope.apply_rope_inplace,
    rope.apply_rope_pos_ids: rope.apply_rope_pos_ids_inplace,
    rope.apply_llama31_rope: rope.apply_llama31_rope_inplace,
    rope.apply_llama31_rope_pos_ids: rope.apply_llama31_rope_pos_ids_inplace,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, None), (128, 64), (10, 6), (72, None), (2, 2)])
def test_rope(
    variant: str, dtype: torch.dtype, interleave: bool, head_dim: int, rotary_dim: int | None, device: str
) -> None:
    by_request, by_position, options, llama31 = VARIANTS[variant]
    indptr, offsets, positions = requests([3, 0, 1, 9], device)
    q, k = heads(13, 6, head_dim, dtype, device), heads(13, 2, head_dim, dtype, device)
    frequency = frequencies(rotary_dim or head_dim, options["rope_scale"], options["rope_theta"], llama31)
    keywords = {"rotary_dim": rotary_dim, "interleave": interleave, **options}
    calls = [
        (partial(by_request, **keywords), partial(INPLACE[by_request], **keywords), (indptr, offsets)),
        (partial(by_position, **keywords), partial(INPLACE[by_position], **keywords), (positions.int(),)),
        (partial(by_position, **keywords), partial(INPLACE[by_position], **keywords), (positions.long(),)),
    ]
    for copying, inplace, where in calls:
        before = q.clone(), k.clone()
        results = copying(q, k, *where)
        assert torch.equal(q, before[0]) and torch.equal(k, before[1])
        for got, x in zip(results, before, strict=True):
            assert got.dtype == dtype
            check(got, x, positions, frequency, interleave)
        views = heads(13, 6, head_dim, dtype, device), heads(13, 2, head_dim, dtype, device)
        for view, x in zip(views, before, strict=True):
            view.copy_(x)
        assert inplace(*views, *where) is None
        for view, got in zip(views, results, strict=True):
            assert torch.equal(view, got)


def test_defaults(device: str) -> None:
    q = torch.randn(4, 1, 64, device=device)
    positions = torch.tensor([0, 5, 1000, 100_000], device=device, dtype=torch.int32)
    for function, frequency in (
        (rope.apply_rope_pos_ids, frequencies(64, 1, 1e4, None)),
        (rope.apply_llama31_rope_pos_ids, frequencies(64, 8, 5e5, (1, 4, 8192))),
    ):
        for got in function(q, q, positions):
            check(got, q, positions, frequency, interleave=False)


def test_only_rotated_components_change(device: str) -> None:
    wide = torch.randn(5, 4, 40, device=device)
    before = wide.clone()
    positions = torch.arange(1, 6, device=device)
    rope.apply_rope_pos_ids_inplace(wide[:, :2, :32], wide[:, 2:3, :32], positions, rotary_dim=16)
    assert torch.equal(wide[..., 16:], before[..., 16:])
    assert torch.equal(wide[:, 3], before[:, 3])
    assert (wide[:, :3, :16] != before[:, :3, :16]).all()


def test_padding_rows_are_kept(device: str) -> None:
    q, k = torch.randn(6, 2, 8, device=device), torch.randn(6, 1, 8, device=device)
    indptr, offsets = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 4], [7, 9]))
    new_q, new_k = rope.apply_rope(q, k, indptr, offsets)
    assert torch.equal(new_q[4:], q[4:]) and torch.equal(new_k[4:], k[4:])
    assert (new_q[:4] != q[:4]).all()
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    unchanged, _ = rope.apply_rope(q, k, indptr[:1], nothing)
    assert torch.equal(unchanged, q)


def test_empty(device: str) -> None:
    q, k = torch.empty(0, 4, 16, device=device), torch.empty(0, 0, 16, device=device)
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    new_q, new_k = rope.apply_rope_pos_ids(q, k, nothing)
    assert new_q.shape == q.shape and new_k.shape == k.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(64, 64), (128, 32), (10, 4)])
def test_cos_sin_cache(dtype: torch.dtype, is_neox: bool, head_size: int, rotary_dim: int, device: str) -> None:
    frequency = frequencies(rotary_dim, 1, 1e4, None).to(device)
    angle = torch.arange(300, device=device).double()[:, None] * frequency
    cache = torch.cat([angle.cos(), angle.sin()], dim=-1).float()
    positions = torch.randint(0, 300, (11,), device=device)
    q, k = (heads(11, n, head_size, dtype, device).flatten(1) for n in (5, 2))
    fused = torch.randn(11, 7 * head_size, device=device).to(dtype)
    for index in (positions, positions.int()):
        new_q, new_k = rope.apply_rope_with_cos_sin_cache(index, q, k, head_size, cache, is_neox)
        for got, x in ((new_q, q), (new_k, k)):
            check(got.unflatten(1, (-1, head_size)), x.unflatten(1, (-1, head_size)), positions, frequency, not is_neox)
        fused[:, : 5 * head_size], fused[:, 5 * head_size :] = q, k
        views = fused.split([5 * head_size, 2 * head_size], dim=1)
        assert rope.apply_rope_with_cos_sin_cache_inplace(index, *views, head_size, cache, is_neox) is None
        assert torch.equal(fused, torch.cat([new_q, new_k], dim=1))


def test_errors(device: str) -> None:
    q, k = torch.randn(4, 2, 16, device=device), torch.randn(4, 1, 16, device=device)
    positions = torch.arange(4, device=device)
    apply = rope.apply_rope_pos_ids_inplace
    with pytest.raises(TypeError, match=r"q: got list"):
        apply([0.0], k, positions)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"q: got dtype torch.float64"):
        apply(q.double(), k, positions)
    with pytest.raises(ValueError, match=r"q: got 2 dimensions"):
        apply(q[0], k, positions)
    with pytest.raises(ValueError, match=r"k: got shape \[3, 1, 16\], expected shape \[4, any, 16\]"):
        apply(q, k[:3], positions)
    with pytest.raises(ValueError, match=r"k: got shape \[4, 1, 8\]"):
        apply(q, k[..., :8], positions)
    with pytest.raises(ValueError, match=r"k: got a tensor on meta while q is on"):
        apply(q, k.to("meta"), positions)
    with pytest.raises(ValueError, match=r"innermost stride must be 1"):
        apply(q[..., ::2], k[..., ::2], positions)
    with pytest.raises(ValueError, match=r"pos_ids: got dtype torch.float32"):
        apply(q, k, positions.float())
    with pytest.raises(ValueError, match=r"pos_ids: got shape \[3\], expected shape \[4\]"):
        apply(q, k, positions[:3])
    for bad in (0, 3, 18):
        with pytest.raises(ValueError, match=rf"rotary_dim: got {bad}, expected an even number from 2 to head_dim 16"):
            apply(q, k, positions, rotary_dim=bad)
    with pytest.raises(ValueError, match=r"rope_scale: got 0"):
        apply(q, k, positions, rope_scale=0)
    with pytest.raises(ValueError, match=r"rope_theta: got -1"):
        apply(q, k, positions, rope_theta=-1)
    with pytest.raises(ValueError, match=r"low_freq_factor: got 4 with high_freq_factor 4"):
        rope.apply_llama31_rope_pos_ids(q, k, positions, low_freq_factor=4)
    with pytest.raises(ValueError, match=r"offsets: got shape \[4\], expected shape \[3\]"):
        rope.apply_rope(q, k, positions, positions)


def test_cos_sin_cache_errors(device: str) -> None:
    q, k = torch.randn(4, 32, device=device), torch.randn(4, 16, device=device)
    positions, cache = torch.arange(4, device=device), torch.randn(9, 8, device=device)
    apply = rope.apply_rope_with_cos_sin_cache
    with pytest.raises(ValueError, match=r"cos_sin_cache: got dtype torch.float16, expected torch.float32"):
        apply(positions, q, k, 16, cache.half())
    with pytest.raises(ValueError, match=r"last dimension of query: got 32 with head_size 12"):
        apply(positions, q, k, 12, cache)
    with pytest.raises(ValueError, match=r"head_size: got 0"):
        apply(positions, q, k, 0, cache)
    with pytest.raises(ValueError, match=r"rotary_dim: got 8"):
        apply(positions, q[:, :8], k[:, :8], 4, cache)
    with pytest.raises(ValueError, match=r"key: got shape \[3, 16\]"):
        apply(positions, q, k[:3], 16, cache)
    with pytest.raises(ValueError, match=r"positions: got shape \[3\]"):
        apply(positions[:3], q, k, 16, cache)
    with pytest.raises(TypeError, match=r"query: got NoneType"):
        apply(positions, None, k, 16, cache)  # type: ignore[arg-type]


def test_range_errors() -> None:
    """What only the host can see is checked on the host."""
    q, k = torch.randn(4, 1, 16), torch.randn(4, 1, 16)
    offsets = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"indptr: got values from 0 to 5, expected values in \[0, 5\)"):
        rope.apply_rope(q, k, torch.tensor([0, 1, 5]), offsets)
    with pytest.raises(ValueError, match=r"indptr: got values that do not rise from 0"):
        rope.apply_rope(q, k, torch.tensor([0, 3, 1]), offsets)
    with pytest.raises(ValueError, match=r"positions: got values from 0 to 9, expected values in \[0, 9\)"):
        rope.apply_rope_with_cos_sin_cache(
            torch.tensor([0, 1, 2, 9]), q.flatten(1), k.flatten(1), 16, torch.randn(9, 8)
        )
