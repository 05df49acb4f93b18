"""merge_state, merge_state_in_place and merge_states against the definition and against whole attention."""

from __future__ import annotations

import math

import pytest
import torch

import flashinfer
from flashinfer.testing import AttentionOptions, assert_close_to_oracle, assert_lse_close_to_oracle, attention
from tests.ops.common import force, skip_unless_runs

from .common import ALL_DTYPES, DEVICE, size

SHAPES = [(1, 1, 8), (7, 3, 40), (size(33, 1000), 5, 64), (3, 2, 192), (0, 4, 16)]


@pytest.fixture(params=["torch", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return force(monkeypatch, "merge", request.param)


def merged(v: torch.Tensor, s: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, v `[n, S, H, D]`, s `[n, S, H]` base 2, in `dtype` (weights in float32 at least)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    s = s.to(wide)
    top = s.amax(dim=1, keepdim=True)
    weights = torch.exp2(s - top.masked_fill(top == -math.inf, 0.0))
    total = weights.sum(dim=1)
    out = (v.to(wide) * weights[..., None]).sum(dim=1) / total.masked_fill(total == 0, 1.0)[..., None]
    return out.to(dtype), top[:, 0] + torch.log2(total)


def states(n: int, num_states: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random states; some of them empty (value 0, lse -inf), some rows wholly."""
    v = torch.randn(n, num_states, heads, dim, device=DEVICE).to(dtype)
    s = torch.randn(n, num_states, heads, device=DEVICE) * 6
    empty = torch.rand(n, num_states, heads, device=DEVICE) < 0.2
    empty |= torch.rand(n, 1, heads, device=DEVICE) < 0.1
    return v.masked_fill(empty[..., None], 0.0), s.masked_fill(empty, -math.inf)


def compare(got, v, s, dtype) -> None:
    oracle, oracle_lse = merged(v, s, torch.float64)
    twin, twin_lse = merged(v, s, dtype)
    assert_close_to_oracle(got[0], oracle, twin, "v")
    assert_lse_close_to_oracle(got[1], oracle_lse, twin_lse, "s")


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_state(shape, dtype, implementation):
    skip_unless_runs(implementation, dtype)
    n, heads, dim = shape
    v, s = states(n, 2, heads, dim, dtype)
    inputs = [x.clone() for x in (v[:, 0], s[:, 0], v[:, 1], s[:, 1])]
    compare(flashinfer.merge_state(*inputs), v, s, dtype)
    for now, then in zip(inputs, (v[:, 0], s[:, 0], v[:, 1], s[:, 1]), strict=True):
        assert now.equal(then)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("num_states", [1, 2, 9, size(40, 700)])
def test_merge_states(num_states, dtype, implementation):
    skip_unless_runs(implementation, dtype)
    v, s = states(11, num_states, 3, 40, dtype)
    compare(flashinfer.merge_states(v, s), v, s, dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_state_in_place(shape, dtype, implementation):
    skip_unless_runs(implementation, dtype)
    n, heads, dim = shape
    v, s = states(n, 2, heads, dim, dtype)
    mine, mine_s = v[:, 0].clone(), s[:, 0].clone()
    assert flashinfer.merge_state_in_place(mine, mine_s, v[:, 1].clone(), s[:, 1].clone()) is None
    compare((mine, mine_s), v, s, dtype)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8])
def test_merge_state_in_place_with_a_mask(mask_dtype):
    """Rows whose mask is 0 stay bit for bit, even where the other state is NaN."""
    v, s = states(20, 2, 3, 16, torch.float16)
    mask = torch.rand(20, device=DEVICE) < 0.5
    mask[:2] = torch.tensor([True, False])
    other = v[:, 1].clone()
    other[~mask] = math.nan
    mine, mine_s = v[:, 0].clone(), s[:, 0].clone()
    flashinfer.merge_state_in_place(mine, mine_s, other, s[:, 1].clone(), mask.to(mask_dtype))
    compare((mine[mask], mine_s[mask]), v[mask], s[mask], torch.float16)
    assert mine[~mask].equal(v[:, 0][~mask]) and mine_s[~mask].equal(s[:, 0][~mask])


def test_empty_is_the_neutral_element():
    v, s = states(9, 2, 2, 16, torch.float32)
    v[:, 1], s[:, 1] = 0.0, -math.inf
    for first, second in ((0, 1), (1, 0)):
        out, lse = flashinfer.merge_state(v[:, first], s[:, first], v[:, second], s[:, second])
        assert out.equal(v[:, 0]) and lse.equal(s[:, 0])


def test_far_apart_states_do_not_overflow():
    v = torch.randn(4, 2, 2, 16, device=DEVICE)
    for low, high in ((-3e4, 3e4), (3e4, -3e4), (2e4, 2e4)):
        s = torch.tensor([low, high], device=DEVICE)[None, :, None].expand(4, 2, 2).contiguous()
        compare(flashinfer.merge_states(v, s), v, s, torch.float32)


def test_strided_inputs():
    """Views into wider tensors."""
    v, s = states(6, 2, 3, 32, torch.float16)
    compare(flashinfer.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1]), v, s, torch.float16)
    assert not v[:, 0].is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("far", ["states", "rows"])
def test_offsets_past_2_to_the_31(far):
    """Three states of a row, or three rows, that begin 2^30 elements apart."""
    close, _ = states(3, 3, 1, 16, torch.float16)
    s = torch.randn(3, 3, 1, device=DEVICE)
    room = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    v = room.as_strided((3, 3, 1, 16), (16, 2**30, 16, 1) if far == "states" else (2**30, 16, 16, 1))
    v.copy_(close)
    compare(flashinfer.merge_states(v, s), close, s, torch.float16)


def test_attention_over_parts_merges_to_the_whole():
    """Keys cut in three, each attended alone, then merged."""
    q, k, v = (torch.randn(n, 2, 16, device=DEVICE) for n in (5, 30, 30))
    plain = AttentionOptions()
    parts = [
        flashinfer.single_prefill_with_kv_cache_return_lse(q, k[a:b], v[a:b]) for a, b in ((0, 3), (3, 20), (20, 30))
    ]
    values, scores = (torch.stack(x, dim=1) for x in zip(*parts, strict=True))
    out, lse = flashinfer.merge_states(values, scores)
    oracle, oracle_lse = attention(q, k, v, plain, torch.float64)
    twin, twin_lse = attention(q, k, v, plain, torch.float32)
    assert_close_to_oracle(out, oracle, twin)
    assert_lse_close_to_oracle(lse, oracle_lse, twin_lse)


ERRORS = {
    "v_other of another shape": ("v_b", lambda v, s: (v, s, v[:, :, :8], s)),
    "s of another shape": ("s_a", lambda v, s: (v, s[:, :1], v, s)),
    "dtypes differ": ("v_b", lambda v, s: (v, s, v.half(), s)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    argument, change = ERRORS[name]
    v, s = torch.randn(3, 2, 16, device=DEVICE), torch.randn(3, 2, device=DEVICE)
    with pytest.raises(ValueError, match=argument):
        flashinfer.merge_state(*change(v, s))


def test_in_place_with_a_narrow_s_is_an_error():
    v, s = torch.randn(3, 2, 16, device=DEVICE), torch.randn(3, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"\bs\b.*float32"):
        flashinfer.merge_state_in_place(v, s.half(), v.clone(), s)
