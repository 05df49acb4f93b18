"""Online softmax of one warpgroup's tile (Milakov and Gimelshein, arXiv 1805.02867), in Gluon's layouts."""

from __future__ import annotations

from flashinfer.device.gluon import gl, jit
from flashinfer.ops.attention.device.hooks import exponent_factor, fold_logits, fold_mask
from flashinfer.ops.attention.variant import At


@jit
def row_sums(p, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Sums `[ROWS, 4]` of what each of a row's four threads holds: adding them up can wait until the end."""
    quads = gl.sum(p.reshape([ROWS, COLUMNS // 8, 4, 2]), 3)
    return gl.sum(quads, 1)


@jit
def transformed(s, item, begin, hooks, scale, MASK: gl.constexpr, cfg: gl.constexpr, SL: gl.constexpr):
    """Products of the tile that begins at token `begin` to logits; masked ones -inf.

    item: (request, first query, query head, qo_len, kv_len) of the warpgroup's rows.
    """
    request, q_lo, qo_head, qo_len, kv_len = item
    qo_idx = q_lo + gl.arange(0, cfg.rows, gl.SliceLayout(1, SL))
    kv_idx = begin + gl.arange(0, cfg.block_n, gl.SliceLayout(0, SL))
    at = At(request, qo_idx[:, None], kv_idx[None, :], qo_head, qo_len, kv_len)
    if cfg.natural_logits:
        s = fold_logits(hooks.logits, s, scale, at)
    if MASK:
        inside = (kv_idx < kv_len)[None, :]
        s = gl.where(fold_mask(hooks.mask, inside, at), s, float("-inf"))
    return s


@jit
def online(s, m_i, hooks, scale, cfg: gl.constexpr):
    """Weights of a tile under the new maximum, that maximum, and what it makes of older sums."""
    factor = exponent_factor(hooks.logits, scale, cfg.natural_logits)
    m_new = gl.maximum(m_i, gl.max(s, 1))
    # Rows that have seen nothing yet have m = -inf, and -inf - -inf is NaN.
    highest = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * factor - (highest * factor)[:, None])
    alpha = gl.exp2((m_i - highest) * factor)
    return p, m_new, alpha
