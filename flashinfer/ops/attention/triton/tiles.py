"""The inner loop: one query tile against a run of KV tiles, online softmax (Milakov and Gimelshein, 1805.02867)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.ops.attention.device.hooks import exponent_factor, fold_logits, fold_mask, fold_rotation
from flashinfer.ops.attention.variant import At


class Pages(NamedTuple):
    """K and V as pages of tokens, with the strides (page, token, head) of each in elements; innermost strides are 1.

    indices: page table, int32; None if ragged, when a token is a page of its own.
    """

    k: torch.Tensor
    v: torch.Tensor
    indices: torch.Tensor | None
    k_page: int
    k_token: int
    k_head: int
    v_page: int
    v_token: int
    v_head: int


@triton.jit
def load_tile(base, offs_row, offs_dim, mask_row, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """`[rows, BLOCK]` of which DIM columns exist; rows outside of mask_row, and the other columns, are 0."""
    mask = mask_row[:, None]
    if DIM != BLOCK:
        mask = mask & (offs_dim < DIM)[None, :]
    return tl.load(base + offs_row[:, None] + offs_dim[None, :], mask=mask, other=0.0)


@triton.jit
def rotate_tile(hooks, tile, base, offs_row, pos, mask_row, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The tile after its rotation hooks, in its own dtype; the partner components are read again (from cache)."""
    offs_dim = tl.arange(0, BLOCK)
    partner = load_tile(base, offs_row, (offs_dim + DIM // 2) % DIM, mask_row, BLOCK, BLOCK)
    wide = tile.to(tl.float32)
    turned = fold_rotation(hooks, wide, partner.to(tl.float32), pos[:, None], offs_dim[None, :], DIM)
    return tl.where((offs_dim < DIM)[None, :], turned, 0.0).to(tile.dtype)


@triton.jit
def attend_tiles(
    state,
    q,
    pages,
    item,
    rows,
    hooks,
    factors,
    run,
    cfg: tl.constexpr,
):
    """Fold KV tiles into the softmax state (m, l, acc); m is in units of `cfg`'s logits (see `exponent_factor`).

    item: (request, kv_head, kv_len, kv_begin, qo_len); rows: (qo_idx, qo_head) of the tile's rows. run: (begin, end,
    full_begin, full_end): the tiles to fold, and which of them need no mask.
    """
    m_i, l_i, acc = state
    request, kv_head, kv_len, kv_begin, qo_len = item
    qo_idx, qo_head = rows
    begin, end, full_begin, full_end = run
    offs_qk = tl.arange(0, cfg.block_qk)
    offs_vo = tl.arange(0, cfg.block_vo)
    k_base = pages.k + kv_head.to(tl.int64) * pages.k_head
    v_base = pages.v + kv_head.to(tl.int64) * pages.v_head
    scale = exponent_factor(hooks.logits, factors.sm_scale, cfg.natural_logits)
    for tile in tl.range(begin, end, num_stages=cfg.num_stages):
        offs_n = tile * cfg.block_n + tl.arange(0, cfg.block_n)
        inside = offs_n < kv_len
        if cfg.paged:
            entry = pages.indices + kv_begin + offs_n // cfg.page_size
            page = tl.load(entry, mask=inside, other=0).to(tl.int64)
            slot = offs_n % cfg.page_size
            if cfg.page_size > 256:
                # Long pages: slot times stride can pass 2^31 too.
                slot = slot.to(tl.int64)
        else:
            page = (kv_begin + offs_n).to(tl.int64)
            slot = offs_n * 0
        offs_k = page * pages.k_page + slot * pages.k_token
        offs_v = page * pages.v_page + slot * pages.v_token
        k = load_tile(k_base, offs_k, offs_qk, inside, cfg.head_dim_qk, cfg.block_qk).to(q.dtype)
        if len(hooks.key) > 0:
            k = rotate_tile(hooks.key, k, k_base, offs_k, offs_n, inside, cfg.head_dim_qk, cfg.block_qk)
        s = tl.dot(q, k.T, input_precision="ieee")
        at = At(request, qo_idx[:, None], offs_n[None, :], qo_head[:, None], qo_len, kv_len)
        if cfg.natural_logits:
            s = fold_logits(hooks.logits, s, row_scale(factors, qo_head), at)
        if cfg.skip_masks:
            # One loop with a branch: a second loop would fill and drain the pipeline once more per query tile.
            if (tile < full_begin) | (tile >= full_end):
                s = tl.where(fold_mask(hooks.mask, inside[None, :], at), s, float("-inf"))
        else:
            s = tl.where(fold_mask(hooks.mask, inside[None, :], at), s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        # Rows that have seen nothing yet have m = -inf, and -inf - -inf is NaN.
        highest = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.math.exp2(s * scale - (highest * scale)[:, None])
        # The difference first: m * scale - shift, fused, is not 0 for an unchanged maximum, and the bias adds up.
        alpha = tl.math.exp2((m_i - highest) * scale)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_tile(v_base, offs_v, offs_vo, inside, cfg.head_dim_vo, cfg.block_vo).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new
    return m_i, l_i, acc


@triton.jit
def row_scale(factors, qo_head):
    """What products are multiplied with to be logits in natural units: one value, or one a row."""
    scale = factors.sm_scale
    if factors.logits is not None:
        scale = (scale * tl.load(factors.logits + qo_head * factors.logits_stride))[:, None]
    return scale
