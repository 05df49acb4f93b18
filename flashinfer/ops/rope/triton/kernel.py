"""The rotation kernel: a program takes a few tokens and a block of their heads, of q and of k alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.fp8 import to_fp8
from flashinfer.device.search import upper_bound


@dataclass(frozen=True)
class RopeConfig:
    """What the kernel is compiled for.

    rotary_dim, q_rest, k_rest, v_dim: components; block_*: tiles, powers of two. fp8_mantissa_bits: 0 where results are
    not fp8. ragged: positions come from indptr.
    """

    num_qo_heads: int
    num_kv_heads: int
    rotary_dim: int
    q_rest: int
    k_rest: int
    v_dim: int
    interleave: bool
    tabulated: bool
    ragged: bool
    fp8_mantissa_bits: int
    native_fp8: bool
    block_tokens: int
    block_q: int
    block_k: int
    block_half: int
    block_q_rest: int
    block_k_rest: int
    block_v: int


class Data(NamedTuple):
    """What is read and where it goes: rotated and other components of q and k, and v; None where there are none."""

    q: torch.Tensor
    q_out: torch.Tensor
    k: torch.Tensor
    k_out: torch.Tensor
    q_rest: torch.Tensor | None
    q_rest_out: torch.Tensor | None
    k_rest: torch.Tensor | None
    k_rest_out: torch.Tensor | None
    v: torch.Tensor | None
    v_out: torch.Tensor | None


class Strides(NamedTuple):
    """In elements: of `[nnz, num_heads, dim]` read, and of `[pages, page_size, num_heads, dim]` written.

    Without pages, all tokens are slots of page 0.
    """

    token: int
    head: int
    out_page: int
    out_slot: int
    out_head: int


class AllStrides(NamedTuple):
    """Of each part of `Data`; None where there is none."""

    q: Strides
    k: Strides
    q_rest: Strides | None
    k_rest: Strides | None
    v: Strides | None


class AngleView(NamedTuple):
    """`Angle`; stride of a table's row; where positions are found through indptr, batch_size and its bits."""

    table: torch.Tensor
    stride: int
    positions: torch.Tensor
    offsets: torch.Tensor | None
    batch_size: int
    steps: int


class Table(NamedTuple):
    """`PageTable` and the tokens a page has."""

    batch_indices: torch.Tensor
    positions: torch.Tensor
    indices: torch.Tensor
    indptr: torch.Tensor
    page_size: int


class Factors(NamedTuple):
    """Factors before fp8, and the weights `[head_dim]` and eps of the heads' RMSNorm (None without)."""

    q_scale: float
    kv_scale: float
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    eps: float


@triton.jit
def cos_sin_of_turns(turns):
    """Cosine and sine of angles in turns of 2^64 (int64, wrapped): fp32, within an eps of 1.

    The nearest quarter turn is taken off in integers, which is exact at any position; Taylor's series up to x^9 and
    x^10 are within 2e-9 for the rest, an eighth of a turn.
    """
    fraction = (turns >> 32).to(tl.int32)
    quarter = (fraction + (1 << 29)) >> 30
    x = (fraction - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    z = x * x
    sin = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cos = 1.0 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
    swap = (quarter & 1) == 1
    new_cos = tl.where(swap, sin, cos)
    new_sin = tl.where(swap, cos, sin)
    return tl.where(((quarter + 1) & 2) == 2, -new_cos, new_cos), tl.where((quarter & 2) == 2, -new_sin, new_sin)


@triton.jit
def cos_sin(angle, offs_token, mask_token, cfg: tl.constexpr):
    """fp32 cosines and sines `[tokens, 1, block_half]`."""
    if cfg.ragged:
        token = offs_token.to(tl.int32)
        request = upper_bound(angle.positions + 1, angle.batch_size, token, mask_token, angle.steps)
        inside = mask_token & (request < angle.batch_size)
        begin = tl.load(angle.positions + request, mask=inside, other=0)
        position = tl.where(inside, tl.load(angle.offsets + request, mask=inside, other=0) + token - begin, 0)
    else:
        position = tl.load(angle.positions + offs_token, mask=mask_token, other=0)
    offs = tl.arange(0, cfg.block_half)
    mask = offs < cfg.rotary_dim // 2
    if cfg.tabulated:
        row = angle.table + position.to(tl.int64)[:, None] * angle.stride + offs[None, :]
        mask = mask_token[:, None] & mask[None, :]
        cos = tl.load(row, mask=mask, other=0.0)
        sin = tl.load(row + cfg.rotary_dim // 2, mask=mask, other=0.0)
    else:
        # The product wraps at whole turns.
        turns = position.to(tl.int64)[:, None] * tl.load(angle.table + offs, mask=mask, other=0)[None, :]
        cos, sin = cos_sin_of_turns(turns)
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def source_rows(data, strides, places):
    """Pointers `[tokens, heads, 1]` to the first component; places: (tokens, pages, slots, heads, mask)."""
    offset = places[0][:, None] * strides.token + places[3].to(tl.int64)[None, :] * strides.head
    return (data + offset)[:, :, None]


@triton.jit
def target_rows(data, strides, places):
    """Pointers `[tokens, heads, 1]` to the first component."""
    token = places[1] * strides.out_page + places[2] * strides.out_slot
    return (data + token[:, None] + places[3].to(tl.int64)[None, :] * strides.out_head)[:, :, None]


@triton.jit
def load_pair(rows, mask, cfg: tl.constexpr):
    """The two components of each pair, `[tokens, heads, block_half]`, as they are stored."""
    if cfg.interleave:
        offs = tl.arange(0, 2 * cfg.block_half)[None, None, :]
        x = tl.load(rows + offs, mask=mask & (offs < cfg.rotary_dim), other=0.0)
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], cfg.block_half, 2)))
    else:
        offs = tl.arange(0, cfg.block_half)[None, None, :]
        mask = mask & (offs < cfg.rotary_dim // 2)
        a = tl.load(rows + offs, mask=mask, other=0.0)
        b = tl.load(rows + cfg.rotary_dim // 2 + offs, mask=mask, other=0.0)
    return a, b


@triton.jit
def load_rest(rows, mask, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The components that are not rotated, `[tokens, heads, BLOCK]`, as they are stored."""
    offs = tl.arange(0, BLOCK)[None, None, :]
    return tl.load(rows + offs, mask=mask & (offs < DIM), other=0.0)


@triton.jit
def convert(x, rows, scale, cfg: tl.constexpr):
    """fp32 `x` as the target wants it; fp8 is scaled before."""
    if cfg.fp8_mantissa_bits > 0:
        return to_fp8(x * scale, cfg.fp8_mantissa_bits, cfg.native_fp8)
    else:
        return x.to(rows.dtype.element_ty)


@triton.jit
def store_pair(rows, mask, pair, scale, cfg: tl.constexpr):
    a = convert(pair[0], rows, scale, cfg)
    b = convert(pair[1], rows, scale, cfg)
    if cfg.interleave:
        offs = tl.arange(0, 2 * cfg.block_half)[None, None, :]
        x = tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * cfg.block_half))
        tl.store(rows + offs, x, mask=mask & (offs < cfg.rotary_dim))
    else:
        offs = tl.arange(0, cfg.block_half)[None, None, :]
        mask = mask & (offs < cfg.rotary_dim // 2)
        tl.store(rows + offs, a, mask=mask)
        tl.store(rows + cfg.rotary_dim // 2 + offs, b, mask=mask)


@triton.jit
def store_rest(rows, mask, x, scale, cfg: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[None, None, :]
    tl.store(rows + offs, convert(x, rows, scale, cfg), mask=mask & (offs < DIM))


@triton.jit
def rotate_pair(pair, turn):
    """(a cos - b sin, b cos + a sin) in fp32.

    The fused multiply-add is written out: left to the compiler, in place and copying would round differently.
    """
    a = pair[0].to(tl.float32)
    b = pair[1].to(tl.float32)
    return tl.fma(a, turn[0], -(b * turn[1])), tl.fma(b, turn[0], a * turn[1])


@triton.jit
def inverse_rms(pair, rest, eps, cfg: tl.constexpr, REST: tl.constexpr):
    """1 / root of the mean square of each head, `[tokens, heads, 1]`; rest is None without."""
    a = pair[0].to(tl.float32)
    b = pair[1].to(tl.float32)
    total = tl.sum(a * a + b * b, axis=2)
    if REST > 0:
        wide = rest.to(tl.float32)
        total += tl.sum(wide * wide, axis=2)
    return tl.rsqrt(total / (cfg.rotary_dim + REST) + eps)[:, :, None]


@triton.jit
def normalise_pair(pair, weight, factor, cfg: tl.constexpr):
    """Each component times its head's factor and its own weight."""
    w = load_pair((weight + tl.zeros([1, 1], tl.int32))[:, :, None], True, cfg)
    return pair[0].to(tl.float32) * factor * w[0].to(tl.float32), pair[1].to(tl.float32) * factor * w[1].to(tl.float32)


@triton.jit
def finish_side(loaded, out, rest_out, strides, places, turn, norm, scale, cfg: tl.constexpr, REST: tl.constexpr):
    """Normalise, rotate and store what was loaded. strides: of both parts; norm: (weights or None, eps)."""
    pair, kept = loaded
    BLOCK: tl.constexpr = kept.shape[2]
    if REST > 0:
        kept = kept.to(tl.float32)
    if norm[0] is not None:
        factor = inverse_rms(pair, kept, norm[1], cfg, REST)
        pair = normalise_pair(pair, norm[0], factor, cfg)
        if REST > 0:
            offs = tl.arange(0, BLOCK)
            w = tl.load(norm[0] + cfg.rotary_dim + offs, mask=offs < REST, other=0.0).to(tl.float32)
            kept = kept * factor * w[None, None, :]
    rows = target_rows(out, strides[0], places)
    store_pair(rows, places[4], rotate_pair(pair, turn), scale, cfg)
    if REST > 0:
        rows = target_rows(rest_out, strides[1], places)
        store_rest(rows, places[4], kept, scale, cfg, REST, BLOCK)


@triton.jit(do_not_specialize=["num_tokens"])
def rope_kernel(data, strides, angle, table, factors, num_tokens, cfg: tl.constexpr):
    """Grid: (token blocks, head blocks). data: Data, strides: AllStrides; table may be None; offsets are 64-bit.

    The angles of a token are made once for a block of its heads. Everything is loaded before anything is stored: no
    load can be moved over a store that might hit it.
    """
    offs_token = tl.program_id(0).to(tl.int64) * cfg.block_tokens + tl.arange(0, cfg.block_tokens)
    mask_token = offs_token < num_tokens
    page = tl.zeros_like(offs_token)
    offs_q = tl.program_id(1) * cfg.block_q + tl.arange(0, cfg.block_q)
    mask_q = (mask_token[:, None] & (offs_q < cfg.num_qo_heads)[None, :])[:, :, None]
    places_q = (offs_token, page, offs_token, offs_q, mask_q)
    pair_q = load_pair(source_rows(data.q, strides.q, places_q), mask_q, cfg)
    kept_q = pair_q[0]
    if cfg.q_rest > 0:
        rows = source_rows(data.q_rest, strides.q_rest, places_q)
        kept_q = load_rest(rows, mask_q, cfg.q_rest, cfg.block_q_rest)
    slot = offs_token
    mask_kept = mask_token
    if table is not None:
        request = tl.load(table.batch_indices + offs_token, mask=mask_token, other=-1)
        mask_kept = mask_token & (request >= 0)
        position = tl.load(table.positions + offs_token, mask=mask_kept, other=0)
        entry = tl.load(table.indptr + request, mask=mask_kept, other=0) + position // table.page_size
        page = tl.load(table.indices + entry, mask=mask_kept, other=0).to(tl.int64)
        slot = (position % table.page_size).to(tl.int64)
    offs_k = tl.program_id(1) * cfg.block_k + tl.arange(0, cfg.block_k)
    mask_k = (mask_kept[:, None] & (offs_k < cfg.num_kv_heads)[None, :])[:, :, None]
    places_k = (offs_token, page, slot, offs_k, mask_k)
    pair_k = load_pair(source_rows(data.k, strides.k, places_k), mask_k, cfg)
    kept_k = pair_k[0]
    if cfg.k_rest > 0:
        rows = source_rows(data.k_rest, strides.k_rest, places_k)
        kept_k = load_rest(rows, mask_k, cfg.k_rest, cfg.block_k_rest)
    if cfg.v_dim > 0:
        v = load_rest(source_rows(data.v, strides.v, places_k), mask_k, cfg.v_dim, cfg.block_v)
    turn = cos_sin(angle, offs_token, mask_token, cfg)
    norm = (factors.q_weight, factors.eps)
    both = (strides.q, strides.q_rest)
    finish_side(
        (pair_q, kept_q), data.q_out, data.q_rest_out, both, places_q, turn, norm, factors.q_scale, cfg, cfg.q_rest
    )
    norm = (factors.k_weight, factors.eps)
    both = (strides.k, strides.k_rest)
    finish_side(
        (pair_k, kept_k), data.k_out, data.k_rest_out, both, places_k, turn, norm, factors.kv_scale, cfg, cfg.k_rest
    )
    if cfg.v_dim > 0:
        rows = target_rows(data.v_out, strides.v, places_k)
        store_rest(rows, mask_k, v.to(tl.float32), factors.kv_scale, cfg, cfg.v_dim, cfg.block_v)
