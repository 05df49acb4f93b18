"""The judges themselves: the oracle against torch SDPA and a scalar loop, the tolerance against known errors."""

from __future__ import annotations

import math

import pytest
import torch

from flashinfer.testing import (
    AttentionOptions,
    alibi_slopes,
    assert_close_to_oracle,
    assert_lse_close_to_oracle,
    attention,
    attention_noise,
    poisoned,
    rotate,
    set_seed,
)
from flashinfer.testing.oracle import LOG2_E, visible

F64 = torch.float64


def inputs(qo_len: int, kv_len: int, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, head_dim_vo: int):
    q = torch.randn(qo_len, num_qo_heads, head_dim_qk, dtype=F64)
    k = torch.randn(kv_len, num_kv_heads, head_dim_qk, dtype=F64)
    v = torch.randn(kv_len, num_kv_heads, head_dim_vo, dtype=F64)
    return q, k, v


def sdpa(q, k, v, mask=None, scale=None):
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("dims", [(16, 16), (24, 8)])
def test_plain_and_scale_against_sdpa(heads, dims):
    q, k, v = inputs(7, 19, *heads, *dims)
    for scale in (None, 0.3):
        out, lse = attention(q, k, v, AttentionOptions(sm_scale=scale), F64)
        torch.testing.assert_close(out, sdpa(q, k, v, scale=scale), rtol=1e-12, atol=1e-12)
        assert lse.shape == (7, heads[0])


@pytest.mark.parametrize(("qo_len", "kv_len"), [(5, 5), (3, 11), (1, 9), (9, 4)])
def test_causal_is_bottom_right_aligned(qo_len, kv_len):
    q, k, v = inputs(qo_len, kv_len, 4, 2, 16, 16)
    mask = torch.ones(qo_len, kv_len, dtype=torch.bool).tril(kv_len - qo_len)
    out, lse = attention(q, k, v, AttentionOptions(causal=True), F64)
    rows = mask.any(dim=1)
    torch.testing.assert_close(out[rows], sdpa(q, k, v, mask)[rows], rtol=1e-12, atol=1e-12)
    assert (out[~rows] == 0).all()
    assert (lse[~rows] == -math.inf).all() and lse[rows].isfinite().all()


def test_custom_mask_beats_causal_and_meets_the_window():
    q, k, v = inputs(6, 13, 4, 2, 16, 16)
    mask = torch.rand(6, 13) < 0.5
    mask[:, 12] = True
    out, _ = attention(q, k, v, AttentionOptions(causal=True, custom_mask=mask), F64)
    torch.testing.assert_close(out, sdpa(q, k, v, mask), rtol=1e-12, atol=1e-12)
    window = torch.ones(6, 13, dtype=torch.bool).triu(13 - 6 - 3)
    out, _ = attention(q, k, v, AttentionOptions(custom_mask=mask, window_left=3), F64)
    torch.testing.assert_close(out, sdpa(q, k, v, mask & window), rtol=1e-12, atol=1e-12)


def loop_row(q, k, v, options: AttentionOptions, head: int, row: int):
    """One output row from scalars alone, with Python's math."""
    qo_len, num_qo_heads, head_dim = q.shape
    kv_len, num_kv_heads, _ = k.shape
    kv_head = head * num_kv_heads // num_qo_heads
    q_pos = kv_len - qo_len + row
    logits = {}
    for j in range(kv_len):
        if (options.causal and j > q_pos) or 0 <= options.window_left < q_pos - j:
            continue
        a, b = q[row, head].tolist(), k[j, kv_head].tolist()
        if options.pos_encoding_mode == "ROPE_LLAMA":
            a, b = turned(a, q_pos, options), turned(b, j, options)
        x = sum(s * t for s, t in zip(a, b, strict=True)) * (options.sm_scale or head_dim**-0.5)
        x *= options.q_scale * options.k_scale
        if options.logits_soft_cap:
            x = options.logits_soft_cap * math.tanh(x / options.logits_soft_cap)
        if options.pos_encoding_mode == "ALIBI":
            x += 2.0 ** (-8.0 * (head + 1) / num_qo_heads) * (j - q_pos)
        logits[j] = x
    total = sum(math.exp(x) for x in logits.values())
    out = [sum(math.exp(x) / total * v[j, kv_head, d].item() for j, x in logits.items()) for d in range(v.shape[2])]
    return torch.tensor(out, dtype=F64) * options.v_scale, math.log2(total)


def turned(x: list[float], position: int, options: AttentionOptions) -> list[float]:
    """`x` rotated as complex numbers x[i] + 1j x[i + D/2]."""
    half = len(x) // 2
    angles = [
        position / (options.rope_scale or 1.0) / (options.rope_theta or 1e4) ** (2 * i / len(x)) for i in range(half)
    ]
    z = [complex(x[i], x[i + half]) * complex(math.cos(t), math.sin(t)) for i, t in enumerate(angles)]
    return [c.real for c in z] + [c.imag for c in z]


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(),
        AttentionOptions(causal=True, window_left=2),
        AttentionOptions(window_left=0),
        AttentionOptions(logits_soft_cap=0.7, sm_scale=0.9, pos_encoding_mode="ALIBI"),
        AttentionOptions(pos_encoding_mode="ROPE_LLAMA", causal=True),
        AttentionOptions(pos_encoding_mode="ROPE_LLAMA", rope_scale=4.0, rope_theta=5e5),
        AttentionOptions(q_scale=1.5, k_scale=0.5, v_scale=3.0),
    ],
)
def test_against_a_scalar_loop(options):
    q, k, v = inputs(3, 6, 4, 2, 8, 16)
    out, lse = attention(q, k, v, options, F64)
    for head in range(4):
        for row in range(3):
            want, want_lse = loop_row(q, k, v, options, head, row)
            torch.testing.assert_close(out[row, head], want, rtol=1e-11, atol=1e-11)
            assert lse[row, head].item() == pytest.approx(want_lse, rel=1e-11, abs=1e-11)


def test_no_keys_and_no_queries():
    q, k, v = inputs(3, 0, 4, 2, 16, 24)
    out, lse = attention(q, k, v, AttentionOptions(causal=True), F64)
    assert out.shape == (3, 4, 24) and (out == 0).all() and (lse == -math.inf).all()
    q, k, v = inputs(0, 5, 4, 2, 16, 24)
    out, lse = attention(q, k, v, AttentionOptions(), F64)
    assert out.shape == (0, 4, 24) and lse.shape == (0, 4)


def test_alibi_slopes_of_eight_and_of_twelve_heads():
    eight = [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(8).tolist() == pytest.approx(eight)
    assert alibi_slopes(12).tolist() == pytest.approx(eight + [2.0 ** -(i / 2) for i in (1, 3, 5, 7)])


def test_rotation_keeps_length_and_depends_on_distance_only():
    x, y = torch.randn(2, 1, 3, 16, dtype=F64)
    p = torch.tensor([100])
    near = (rotate(x, p, None, None, F64) * rotate(y, p - 7, None, None, F64)).sum(-1)
    far = (rotate(x, p + 900, None, None, F64) * rotate(y, p + 893, None, None, F64)).sum(-1)
    torch.testing.assert_close(near, far, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rotate(x, p, None, None, F64).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_another_order_of_summation_is_within_the_bound(dtype):
    q, k, v = (x.to(dtype) for x in inputs(9, 70, 6, 2, 32, 32))
    oracle, oracle_lse = attention(q, k, v, AttentionOptions(causal=True), F64)
    twin, twin_lse = attention(q, k, v, AttentionOptions(causal=True), dtype)
    order = torch.randperm(61)
    mask = torch.ones(9, 70, dtype=torch.bool).tril(61)
    keep = torch.cat([order, torch.arange(61, 70)])
    other, other_lse = attention(q, k[keep], v[keep], AttentionOptions(custom_mask=mask), dtype)
    assert_close_to_oracle(other, oracle, twin)
    assert_lse_close_to_oracle(other_lse, oracle_lse, twin_lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_lost_key_is_out_of_bounds(dtype):
    q, k, v = (x.to(dtype) for x in inputs(4, 100, 2, 2, 32, 32))
    oracle, oracle_lse = attention(q, k, v, AttentionOptions(), F64)
    twin, twin_lse = attention(q, k, v, AttentionOptions(), dtype)
    noise, lse_noise = attention_noise(q, k, v, AttentionOptions(), dtype)
    lost, lost_lse = attention(q, k[:-1], v[:-1], AttentionOptions(), dtype)
    with pytest.raises(AssertionError, match="out: "):
        assert_close_to_oracle(lost, oracle, twin, "out", noise)
    with pytest.raises(AssertionError, match="lse: "):
        assert_lse_close_to_oracle(lost_lse, oracle_lse, twin_lse, noise=lse_noise)


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(sm_scale=0.8),
        AttentionOptions(causal=True, logits_soft_cap=9.0),
        AttentionOptions(pos_encoding_mode="ALIBI", window_left=20),
        AttentionOptions(pos_encoding_mode="ROPE_LLAMA"),
    ],
)
def test_noise_covers_one_term_after_another_and_no_more(options):
    """float32 sums made element by element, the least exact order there is; the bound stays far under a fp16 eps."""
    q, k, v = (x.float() for x in inputs(5, 60, 3, 3, 64, 16))
    oracle, oracle_lse = attention(q, k, v, options, F64)
    noise, lse_noise = attention_noise(q, k, v, options, torch.float32)
    turned_q, turned_k = q, k
    q_pos, kv_pos = torch.arange(55, 60), torch.arange(60)
    if options.pos_encoding_mode == "ROPE_LLAMA":
        turned_q, turned_k = (rotate(x, p, None, None, torch.float32) for x, p in ((q, q_pos), (k, kv_pos)))
    logits = torch.zeros(3, 5, 60)
    for d in range(64):
        logits += turned_q[:, :, d].T[:, :, None] * turned_k[:, :, d].T[:, None, :]
    logits *= options.scale(64)
    if options.logits_soft_cap:
        logits = options.logits_soft_cap * torch.tanh(logits / options.logits_soft_cap)
    if options.pos_encoding_mode == "ALIBI":
        logits += (alibi_slopes(3).float()[:, None, None] * (kv_pos - q_pos[:, None])).float()
    logits = logits.masked_fill(~visible(q_pos, kv_pos, options), -math.inf)
    total, acc = torch.zeros(3, 5), torch.zeros(3, 5, 16)
    for j in range(60):
        p = torch.exp(logits[:, :, j] - logits.amax(-1))
        total += p
        acc += p[..., None] * v[j][:, None, :]
    out, lse = (acc / total[..., None]).transpose(0, 1), ((logits.amax(-1) + total.log()) * LOG2_E).T
    eps = torch.finfo(torch.float32).eps
    assert ((out - oracle).abs() <= noise + eps * oracle.abs()).all()
    assert ((lse - oracle_lse).abs() <= lse_noise + eps * (1 + oracle_lse.abs())).all()
    assert (noise < 0.1 * torch.finfo(torch.float16).eps * v.abs().amax()).all()


def test_bound_is_the_documented_one():
    oracle = torch.tensor([[1.0, 4.0]], dtype=F64)
    twin = torch.tensor([[1.0, 4.0 + 2**-20]])
    eps = torch.finfo(torch.float32).eps
    bound = 2 * 2**-20 + eps * 1.0 + eps * 4.0
    assert_close_to_oracle(torch.tensor([[1.0 + bound * 0.9, 4.0]]), oracle, twin)
    with pytest.raises(AssertionError, match=r"worst at \[0, 0\]"):
        assert_close_to_oracle(torch.tensor([[1.0 + bound * 1.1, 4.0]]), oracle, twin)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_must_match(value):
    oracle = torch.tensor([[1.0, 2.0], [3.0, -math.inf]], dtype=F64)
    twin = oracle.float()
    assert_lse_close_to_oracle(twin.clone(), oracle, twin)
    for place in ((0, 0), (1, 1)):
        bad = twin.clone()
        bad[place] = value if place == (0, 0) or value != -math.inf else -1e30
        with pytest.raises(AssertionError, match="in the wrong places"):
            assert_lse_close_to_oracle(bad, oracle, twin)


def test_exact_zero_must_stay_zero():
    oracle = torch.zeros(1, 4, dtype=F64)
    assert_close_to_oracle(torch.zeros(1, 4), oracle, torch.zeros(1, 4))
    with pytest.raises(AssertionError):
        assert_close_to_oracle(torch.full((1, 4), 1e-45), oracle, torch.zeros(1, 4))


def test_shape_and_dtype_must_match():
    oracle, twin = torch.zeros(2, 3, dtype=F64), torch.zeros(2, 3)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_oracle(torch.zeros(3, 2), oracle, twin)
    with pytest.raises(AssertionError, match="dtype"):
        assert_close_to_oracle(torch.zeros(2, 3, dtype=torch.float16), oracle, twin)
    with pytest.raises(AssertionError, match=r"torch\.float32"):
        assert_lse_close_to_oracle(twin.half(), oracle, twin.half())


def test_poisoned_and_set_seed():
    for dtype in (torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2):
        assert poisoned((2, 3), dtype, "cpu").float().isnan().all()
    assert (poisoned((2,), torch.int32, "cpu") == 2**31 - 1).all()
    assert set_seed(7) == 7
    first = torch.rand(3)
    set_seed(7)
    assert torch.equal(first, torch.rand(3))
    assert set_seed() != set_seed()
