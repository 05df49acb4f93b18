"""Attention of one request in plain torch, in any dtype: float64 is the oracle, the tested dtype its twin.

Written from the contract (api-contract §3.1 and §9) alone; imports nothing of the package, so that it can judge it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class AttentionOptions:
    """What changes the meaning of attention over one request.

    causal: bottom-right aligned, query i sees keys up to `kv_len - qo_len + i`. Ignored if there is a custom mask.
    window_left: keys this many tokens to the left of the query, and itself; -1 = all. Adds to a custom mask.
    logits_soft_cap: `cap * tanh(logit / cap)` on natural-unit logits, before the ALiBi bias; None or <= 0 = off.
    sm_scale: factor on q.k; None = 1 / sqrt(head_dim_qk).
    custom_mask: bool `[qo_len, kv_len]`, True = keep.
    pos_encoding_mode: "NONE", "ROPE_LLAMA" (NeoX halves) or "ALIBI"; query i stands at position `kv_len - qo_len + i`.
    q_scale, k_scale, v_scale: q_scale * k_scale multiply sm_scale, v_scale multiplies the output.
    """

    causal: bool = False
    window_left: int = -1
    logits_soft_cap: float | None = None
    sm_scale: float | None = None
    custom_mask: torch.Tensor | None = None
    pos_encoding_mode: str = "NONE"
    rope_scale: float | None = None
    rope_theta: float | None = None
    q_scale: float = 1.0
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def soft_cap(self) -> float:
        """The cap; 0 = off."""
        return max(self.logits_soft_cap or 0.0, 0.0)

    def scale(self, head_dim_qk: int) -> float:
        """The factor on q.k."""
        sm_scale = 1.0 / math.sqrt(head_dim_qk) if self.sm_scale is None else self.sm_scale
        return sm_scale * self.q_scale * self.k_scale


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request.

    q: `[qo_len, num_qo_heads, head_dim_qk]`. k: `[kv_len, num_kv_heads, head_dim_qk]`. v: `[kv_len, num_kv_heads,
    head_dim_vo]`. Any float dtype, fp8 included; they are converted to `dtype`, in which both matrix products are
    made. The softmax is float64 for a float64 `dtype`, else float32, as plain torch has it.
    Returns out `[qo_len, num_qo_heads, head_dim_vo]` of `dtype` and the base-2 lse `[qo_len, num_qo_heads]` of the
    softmax's dtype. A query that sees no key gives 0 and -inf.
    """
    probs, lse = _softmax(q, k, options, dtype)
    values = _per_query_head(v.to(dtype), q)
    out = (probs.to(dtype) @ values).to(probs.dtype) * options.v_scale
    return out.transpose(0, 1).to(dtype), lse.transpose(0, 1) * LOG2_E


def attention_noise(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rounding inside a kernel of `dtype` may do to `attention`, in whatever order it sums: float64.

    Counted is what every kernel has: float32 sums and exponentials and, with rotation, rotated q and k in `dtype`.
    To first order an error `d` of the logits moves `out = sum p v` by at most `sum p |d| (|v| + |out|)` and the natural
    lse by `sum p |d|`. Returns the absolute errors of out and of the base-2 lse, shaped as those are.
    A twin shows this error by luck only: it sums in one order out of many, and where two keys decide an output, it
    draws as few as two roundings.
    """
    wide = torch.float64
    probs, _ = _softmax(q, k, options, wide)
    out, _ = attention(q, k, v, options, wide)
    moved = probs * _logit_noise(q, k, options, dtype)
    out_noise = moved @ _per_query_head(v.to(wide).abs(), q) * abs(options.v_scale)
    total = moved.sum(dim=-1).transpose(0, 1)
    return out_noise.transpose(0, 1) + total[..., None] * out.abs(), total * LOG2_E


def _softmax(
    q: torch.Tensor, k: torch.Tensor, options: AttentionOptions, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities `[num_qo_heads, qo_len, kv_len]` and natural lse `[num_qo_heads, qo_len]`, float64 or float32."""
    q_pos, kv_pos = _positions(q, k)
    logits = _logits(q, k, options, dtype)
    if options.pos_encoding_mode == "ALIBI":
        logits = logits + _alibi_bias(q_pos, kv_pos, q.shape[1]).to(logits.dtype)
    logits = logits.masked_fill(~visible(q_pos, kv_pos, options), -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    return torch.exp(logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None]), lse


def _logits(q: torch.Tensor, k: torch.Tensor, options: AttentionOptions, dtype: torch.dtype) -> torch.Tensor:
    """q . k * sm_scale, rotated and capped as the options say, `[num_qo_heads, qo_len, kv_len]`, float64 or float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q_pos, kv_pos = _positions(q, k)
    q, k = q.to(dtype), k.to(dtype)
    if options.pos_encoding_mode == "ROPE_LLAMA":
        q = rotate(q, q_pos, options.rope_scale, options.rope_theta, wide)
        k = rotate(k, kv_pos, options.rope_scale, options.rope_theta, wide)
    logits = _products(q, k).to(wide) * options.scale(q.shape[-1])
    if options.soft_cap > 0:
        logits = options.soft_cap * torch.tanh(logits / options.soft_cap)
    return logits


# n terms of random sign, added one after the other: the k-th partial sum is about sqrt(k) terms large and rounds by
# eps / 2 / sqrt(3) of that, which makes a standard deviation of 0.20 n eps terms; the magnitudes add up to 0.64 n for
# products of normal numbers. Five standard deviations are 1.6 times eps times that sum. A GPU adds so, a CPU in blocks.
SEQUENTIAL_SUM = 1.6
# Largest relative error of tanh.approx.f32 (PTX ISA 9.0, section 9.7.3.22), which kernels take for 16-bit inputs.
TANH_ERROR = 2.0**-11


def _logit_noise(q: torch.Tensor, k: torch.Tensor, options: AttentionOptions, dtype: torch.dtype) -> torch.Tensor:
    """Errors of the logits, float64 `[num_qo_heads, qo_len, kv_len]`.

    A float32 eps times the sum of the magnitudes of all terms: |q||k| (with rotation also times the angles) as often as
    `SEQUENTIAL_SUM` says, the cap, the ALiBi bias, and 1 for the exponential. For 16-bit inputs on an NVIDIA GPU also
    what its own tanh may be off, `TANH_ERROR` of the capped logit.
    With rotation also the rounding of both factors of each product to
    `dtype`: independent, so an eps of `dtype` times the root of the sum of squares (5 standard deviations).
    """
    q_pos, kv_pos = _positions(q, k)
    q_size, k_size = q.to(torch.float64).abs(), k.to(torch.float64).abs()
    rounded: torch.Tensor | float = 0.0
    if options.pos_encoding_mode == "ROPE_LLAMA":
        rope = (q.shape[-1], options.rope_scale, options.rope_theta, torch.float64)
        q_size, k_size = _pair_sizes(q_size), _pair_sizes(k_size)  # a turned element may be as large as its pair
        q_turn = q_size * _angles(q_pos, *rope).abs().repeat(1, 1, 2)
        k_turn = k_size * _angles(kv_pos, *rope).abs().repeat(1, 1, 2)
        size = _products(q_size + q_turn, k_size) + _products(q_size, k_turn)
        rounded = torch.finfo(dtype).eps * _products(q_size**2, k_size**2).sqrt()
    else:
        size = _products(q_size, k_size)
    factor = abs(options.scale(q.shape[-1]))
    size = size * factor * SEQUENTIAL_SUM + options.soft_cap + 1.0
    if options.pos_encoding_mode == "ALIBI":
        size = size + _alibi_bias(q_pos, kv_pos, q.shape[1]).abs()
    noise = size * torch.finfo(torch.float32).eps + rounded * factor
    if options.soft_cap > 0 and dtype.itemsize == 2 and q.is_cuda and torch.version.hip is None:
        noise = noise + TANH_ERROR * _logits(q, k, options, torch.float64).abs()
    return noise


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q.k of every query and key, `[num_qo_heads, qo_len, kv_len]`."""
    return q.transpose(0, 1) @ _per_query_head(k, q).transpose(1, 2)


def _pair_sizes(x: torch.Tensor) -> torch.Tensor:
    """Each element replaced by the length of its rotary pair."""
    low, high = x.chunk(2, dim=-1)
    return torch.hypot(low, high).repeat(1, 1, 2)


def _per_query_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`x [kv_len, num_kv_heads, dim]` as `[num_qo_heads, kv_len, dim]`."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1)


def _positions(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Absolute positions of queries and keys: the last query stands on the last key."""
    kv_pos = torch.arange(len(k), device=q.device)
    return torch.arange(len(q), device=q.device) + (len(k) - len(q)), kv_pos


def visible(q_pos: torch.Tensor, kv_pos: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """Which keys each query sees, bool `[qo_len, kv_len]`, from the absolute positions of both."""
    seen = torch.ones(len(q_pos), len(kv_pos), dtype=torch.bool, device=q_pos.device)
    if options.custom_mask is not None:
        seen = seen & options.custom_mask
    elif options.causal:
        seen = seen & (kv_pos[None, :] <= q_pos[:, None])
    if options.window_left >= 0:
        seen = seen & (kv_pos[None, :] >= q_pos[:, None] - options.window_left)
    return seen


def rotate(
    x: torch.Tensor, positions: torch.Tensor, rope_scale: float | None, rope_theta: float | None, wide: torch.dtype
) -> torch.Tensor:
    """Rotary embedding of `x [tokens, heads, head_dim]`, NeoX halves, computed in `wide`, returned in x's dtype.

    Element pair (i, i + head_dim / 2) turns by `position / rope_scale * rope_theta ** (-2 i / head_dim)`
    (Su et al. 2021, arXiv 2104.09864, eq. 15); defaults 1 and 10,000.
    """
    angle = _angles(positions, x.shape[-1], rope_scale, rope_theta, wide)
    cos, sin = angle.cos(), angle.sin()
    low, high = x.to(wide).chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


def _angles(
    positions: torch.Tensor, head_dim: int, rope_scale: float | None, rope_theta: float | None, wide: torch.dtype
) -> torch.Tensor:
    """Angles `[tokens, 1, head_dim / 2]` in radians."""
    pairs = torch.arange(head_dim // 2, dtype=wide, device=positions.device)
    theta = 1e4 if rope_theta is None else rope_theta
    scale = 1.0 if rope_scale is None else rope_scale
    return (positions.to(wide)[:, None] * (theta ** (-2 * pairs / head_dim) / scale))[:, None, :]


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """ALiBi slopes, float64 `[num_heads]` (Press et al. 2021, arXiv 2108.12409).

    The n largest-power-of-two heads get `2 ** (-8 i / n)`, i = 1..n; the rest the odd terms of the series for 2 n.
    """
    n = 2 ** int(math.log2(num_heads))
    first = [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
    rest = [2.0 ** (-4.0 * i / n) for i in range(1, 2 * (num_heads - n), 2)]
    return torch.tensor(first + rest, dtype=torch.float64)


def _alibi_bias(q_pos: torch.Tensor, kv_pos: torch.Tensor, num_qo_heads: int) -> torch.Tensor:
    """float64 `[num_qo_heads, qo_len, kv_len]`."""
    slopes = alibi_slopes(num_qo_heads).to(q_pos.device)
    return slopes[:, None, None] * (kv_pos[None, :] - q_pos[:, None])
