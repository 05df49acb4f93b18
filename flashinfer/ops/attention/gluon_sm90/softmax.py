"""Online softmax of one warpgroup's tile (Milakov and Gimelshein, arXiv 1805.02867), in Gluon's layouts."""

from __future__ import annotations

from flashinfer.device.gluon import gl, jit
from flashinfer.ops.attention.device.hooks import exponent_factor, fold_logits, fold_mask
from flashinfer.ops.attention.variant import At


@jit
def row_sums(p):
    """Sums `[rows, 4]` of what each of a row's four threads holds: adding them up can wait until the end."""
    quads = gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3)
    return gl.sum(quads, 1)


@jit
def pinned(x):
    """x, by an instruction that stays where it is, and so keeps what depends on it inside of a branch."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=False, pack=1
    )


@jit
def _place(s, item, begin):
    """The `At` of logits s that begin at token `begin`."""
    request, q_lo, qo_head, qo_len, kv_len = item
    qo_idx = q_lo + gl.arange(0, s.shape[0], gl.SliceLayout(1, s.type.layout))
    kv_idx = begin + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    return At(request, qo_idx[:, None], kv_idx[None, :], qo_head, qo_len, kv_len)


@jit
def _masked_in_branches(s, item, begin, masks, END: gl.constexpr, cfg: gl.constexpr):
    """Each mask is computed only in tiles where its own bounds call for it."""
    _, q_lo, _, qo_len, kv_len = item
    end = begin + s.shape[1]
    if END:
        if end > kv_len:
            s = gl.where(_place(s, item, pinned(begin)).kv_idx < kv_len, s, float("-inf"))
    q_hi = gl.minimum(q_lo + cfg.rows, qo_len)
    for i in gl.static_range(len(masks)):
        _, _, full_lo, full_hi = masks[i].bounds(masks[i].captured, q_lo, q_hi, qo_len, kv_len)
        if (begin < full_lo) | (end > full_hi):
            at = _place(s, item, pinned(begin))
            s = gl.where(masks[i].fn(masks[i].captured, at), s, float("-inf"))
    return s


@jit
def transformed(s, item, begin, hooks, scale, MASK: gl.constexpr, END: gl.constexpr, cfg: gl.constexpr):
    """Products with the keys from token `begin` on to logits; masked ones -inf.

    item: (request, first query, query head, qo_len, kv_len) of the warpgroup's rows. MASK: whether masks may be False
    in this tile; END: whether the keys may end in it.
    """
    at = _place(s, item, begin)
    if cfg.natural_logits:
        s = fold_logits(hooks.logits, s, scale, at)
    if MASK:
        # Logits hooks and wide heads leave no registers for what lives across branches.
        if cfg.natural_logits or cfg.head_dim > 128:
            s = gl.where(fold_mask(hooks.mask, at.kv_idx < at.kv_len, at), s, float("-inf"))
        else:
            s = _masked_in_branches(s, item, begin, hooks.mask, END, cfg)
    return s


# What a row's maximum begins with and never falls below: finite, also times any factor, so that -inf - m needs no care.
# Logits below it count as masked; products of 16-bit inputs that reach it have operands past 1e9.
LOWEST = gl.constexpr(-1e20)


@jit
def online(s, m_i, hooks, scale, cfg: gl.constexpr):
    """Weights of a tile under the new maximum, that maximum, and what it makes of older sums."""
    factor = exponent_factor(hooks.logits, scale, cfg.natural_logits)
    # For a half of a tile as for a whole one: the same registers.
    m_i = gl.convert_layout(m_i, gl.SliceLayout(1, s.type.layout))
    if cfg.fixed_maximum:
        p, m_new, alpha = gl.exp2(s * factor), m_i, m_i
    else:
        m_new = gl.maximum(m_i, gl.max(s, 1))
        p = gl.exp2(s * factor - (m_new * factor)[:, None])
        alpha = gl.exp2((m_i - m_new) * factor)
    return p, m_new, alpha
