"""The append kernel: each program takes a few tokens and a block of their columns (heads and components together)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.device.fp8 import to_fp8, to_int8
from flashinfer.device.search import upper_bound


class Data(NamedTuple):
    """New keys and values, and the caches they go to."""

    key: torch.Tensor
    value: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


class RowStrides(NamedTuple):
    """Of new keys or values `[nnz, num_kv_heads, head_dim]`, in elements."""

    token: int
    head: int


class PageStrides(NamedTuple):
    """Of a cache `[pages, page_size, num_kv_heads, head_dim]`, in elements."""

    page: int
    slot: int
    head: int


class Table(NamedTuple):
    """Where each token goes, int32; or `batch_indices` are the slots, int32 or int64, and the rest is None."""

    batch_indices: torch.Tensor
    positions: torch.Tensor | None
    indices: torch.Tensor | None
    indptr: torch.Tensor | None


class Divisor(NamedTuple):
    """What rows are divided by: a number, or fp32 data with one value (stride 0) or one a head (1)."""

    value: float
    data: torch.Tensor | None
    stride: int


@dataclass(frozen=True)
class AppendConfig:
    """head_dims: of K and V. code: "fp8" and "int8" are encoded to, "" is a cast. mantissa_bits: of the fp8."""

    head_dims: tuple[int, int]
    code: str
    mantissa_bits: int
    native_fp8: bool
    scaled: bool
    block_tokens: int
    block_cols: int


@triton.jit
def load_rows(data, strides, offs_token, mask_token, offs_col, num_heads, HEAD_DIM: tl.constexpr):
    """Columns `offs_col` of tokens `offs_token`, as they are stored, and the mask of what there is of them."""
    offset = (offs_col // HEAD_DIM).to(tl.int64) * strides.head + offs_col % HEAD_DIM
    mask = mask_token[:, None] & (offs_col < num_heads * HEAD_DIM)[None, :]
    return tl.load(data + offs_token[:, None] * strides.token + offset[None, :], mask=mask, other=0), mask


@triton.jit
def store_rows(loaded, data, strides, divisor, places, offs_col, num_heads, cfg: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write loaded columns to their pages, divided and converted as the cache wants it; places: (page, slot, mask)."""
    x, mask = loaded
    page, slot, mask_token = places
    head = offs_col // HEAD_DIM
    if cfg.scaled:
        if divisor[1] is None:
            scale = tl.zeros([1], tl.float32) + divisor[0]
        else:
            scale = tl.load(divisor[1] + head * divisor[2], mask=offs_col < num_heads * HEAD_DIM, other=1.0)
        x = x.to(tl.float32)
        x = tl.div_rn(x, tl.broadcast_to(scale[None, :], x.shape))
    if cfg.code == "fp8":
        x = to_fp8(x.to(tl.float32), cfg.mantissa_bits, cfg.native_fp8)
    elif cfg.code == "int8":
        x = to_int8(x.to(tl.float32))
    offset = head.to(tl.int64) * strides.head + offs_col % HEAD_DIM
    target = data + (page * strides.page + slot * strides.slot)[:, None] + offset[None, :]
    tl.store(target, x.to(data.dtype.element_ty), mask=mask & mask_token[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def append_kernel(data, strides, table, k_divisor, v_divisor, num_tokens, num_heads, page_size, cfg: tl.constexpr):
    """Grid: (token blocks, column blocks). data: Data, strides: one for each of it; table: Table; Divisors.

    Offsets are 64-bit: page times stride, and token times stride, pass 2^31 elements. Everything is loaded before
    anything is stored: no load can be moved over a store that might hit it.
    """
    offs_token = tl.program_id(0).to(tl.int64) * cfg.block_tokens + tl.arange(0, cfg.block_tokens)
    offs_col = tl.program_id(1) * cfg.block_cols + tl.arange(0, cfg.block_cols)
    mask = offs_token < num_tokens
    loaded_k = load_rows(data.key, strides[0], offs_token, mask, offs_col, num_heads, cfg.head_dims[0])
    loaded_v = load_rows(data.value, strides[1], offs_token, mask, offs_col, num_heads, cfg.head_dims[1])
    index = tl.load(table[0] + offs_token, mask=mask, other=-1)
    mask = mask & (index >= 0)
    if table[1] is None:
        page = (index // page_size).to(tl.int64)
        slot = (index % page_size).to(tl.int64)
    else:
        position = tl.load(table[1] + offs_token, mask=mask, other=0)
        entry = tl.load(table[3] + index, mask=mask, other=0) + position // page_size
        page = tl.load(table[2] + entry, mask=mask, other=0).to(tl.int64)
        slot = (position % page_size).to(tl.int64)
    places = (page, slot, mask)
    store_rows(loaded_k, data.k_cache, strides[2], k_divisor, places, offs_col, num_heads, cfg, cfg.head_dims[0])
    store_rows(loaded_v, data.v_cache, strides[3], v_divisor, places, offs_col, num_heads, cfg, cfg.head_dims[1])


@triton.jit(do_not_specialize=["num_tokens", "batch_size", "steps"])
def batch_indices_kernel(
    batch_indices, positions, append_indptr, seq_lens, num_tokens, batch_size, steps, BLOCK: tl.constexpr
):
    """The request and the position of each row, int32 `[num_tokens]`; (-1, 0) for rows past `append_indptr[-1]`."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    request = upper_bound(append_indptr + 1, batch_size, token, mask, steps)
    inside = mask & (request < batch_size)
    begin = tl.load(seq_lens + request, mask=inside, other=0) - tl.load(
        append_indptr + request + 1, mask=inside, other=0
    )
    tl.store(batch_indices + token, tl.where(inside, request, -1), mask=mask)
    tl.store(positions + token, tl.where(inside, begin + token, 0), mask=mask)


@triton.jit(do_not_specialize=["batch_size"])
def seq_lens_kernel(out, kv_indptr, kv_last_page_len, batch_size, page_size, BLOCK: tl.constexpr):
    """Tokens of each request, int32 `[batch_size]`; 0 without pages."""
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = request < batch_size
    pages = tl.load(kv_indptr + request + 1, mask=mask, other=0) - tl.load(kv_indptr + request, mask=mask, other=0)
    last = tl.load(kv_last_page_len + request, mask=mask, other=0)
    tl.store(out + request, tl.where(pages > 0, (pages - 1) * page_size + last, 0), mask=mask)
