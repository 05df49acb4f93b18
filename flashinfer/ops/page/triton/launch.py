"""Launches of the kernels of this folder."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from flashinfer.core.arch import Arch
from flashinfer.core.check import FP8_MANTISSA_BITS
from flashinfer.core.launch import Prebound, alignment, integer_classes
from flashinfer.ops.page.spec import Append, AppendSpec, PageTable, Scale, as_bytes
from flashinfer.ops.page.triton.kernel import (
    AppendConfig,
    Data,
    Divisor,
    PageStrides,
    RowStrides,
    Table,
    append_kernel,
    batch_indices_kernel,
    seq_lens_kernel,
)

# A program moves about this many elements of K and of V: 16 for each of 128 threads, two 16-byte vectors in fp16.
TILE = 2048
MAX_COLS = 1024
INDEX_BLOCK = 256
NUM_WARPS = 4
Strides = tuple[int, ...]
_launch_append = Prebound(append_kernel)
_launch_batch_indices = Prebound(batch_indices_kernel)
_launch_seq_lens = Prebound(seq_lens_kernel)


@lru_cache(maxsize=4096)
def configure(spec: AppendSpec, arch: Arch) -> tuple[AppendConfig, int]:
    """The kernel's configuration and the number of column blocks."""
    num_cols = spec.num_kv_heads * max(spec.head_dim_k, spec.head_dim_v)
    block_cols = min(triton.next_power_of_2(num_cols), MAX_COLS)
    mantissa_bits = FP8_MANTISSA_BITS.get(spec.code_dtype, 0)
    code = "fp8" if mantissa_bits else "int8" if spec.code_dtype is not None else ""
    head_dims = (spec.head_dim_k, spec.head_dim_v)
    block_tokens = max(TILE // block_cols, 1)
    cfg = AppendConfig(head_dims, code, mantissa_bits, arch.converts_to_fp8, spec.scaled, block_tokens, block_cols)
    return cfg, -(-num_cols // block_cols)


def _divisor(scale: Scale) -> Divisor:
    return Divisor(scale.value, scale.tensor, int(scale.tensor is not None and scale.tensor.shape[0] > 1))


@dataclass(frozen=True, eq=False)
class Layout:
    """What a launch takes of strides. Compared by identity, so that it makes a key at no cost."""

    cfg: AppendConfig
    col_blocks: int
    strides: tuple[RowStrides, RowStrides, PageStrides, PageStrides]
    classes: Hashable


def bind(spec: AppendSpec, arch: Arch) -> Callable[[Append], None]:
    """The call for one kind of append: one launch, no host sync."""

    @lru_cache(maxsize=4096)
    def layout(key: Strides, value: Strides, k_cache: Strides, v_cache: Strides, scales: tuple[int, int]) -> Layout:
        cfg, col_blocks = configure(spec, arch)
        strides = (RowStrides(*key[:2]), RowStrides(*value[:2]), PageStrides(*k_cache[:3]), PageStrides(*v_cache[:3]))
        flat = (*(n for part in strides for n in part), spec.num_kv_heads, spec.page_size, *scales)
        return Layout(cfg, col_blocks, strides, integer_classes(flat))

    def run(tensors: Append) -> None:
        where, k_scale, v_scale = tensors[4:]
        key, value, k_cache, v_cache = moved = [as_bytes(x) for x in tensors[:4]]
        table = Table(*where) if isinstance(where, PageTable) else Table(where, None, None, None)
        k_divisor, v_divisor = _divisor(k_scale), _divisor(v_scale)
        scales = (k_divisor.stride, v_divisor.stride)
        found = layout(key.stride(), value.stride(), k_cache.stride(), v_cache.stride(), scales)
        num_tokens = table.batch_indices.shape[0]
        aligned = alignment(*moved, *table, k_divisor.data, v_divisor.data)
        _launch_append(
            (-(-num_tokens // found.cfg.block_tokens), found.col_blocks, 1),
            (found, table.batch_indices.dtype, k_divisor.data is None, aligned),
            (
                Data(*moved),
                found.strides,
                table,
                k_divisor,
                v_divisor,
                num_tokens,
                spec.num_kv_heads,
                spec.page_size,
                found.cfg,
            ),
            key.device,
            num_warps=NUM_WARPS,
        )

    return run


def batch_indices_positions(
    batch_indices: torch.Tensor, positions: torch.Tensor, append_indptr: torch.Tensor, seq_lens: torch.Tensor
) -> None:
    """The request and the position of each row: one launch."""
    num_tokens, batch_size = batch_indices.shape[0], seq_lens.shape[0]
    steps = batch_size.bit_length()
    tensors = (batch_indices, positions, append_indptr, seq_lens)
    _launch_batch_indices(
        (-(-num_tokens // INDEX_BLOCK), 1, 1),
        alignment(*tensors),
        (*tensors, num_tokens, batch_size, steps, INDEX_BLOCK),
        batch_indices.device,
        num_warps=NUM_WARPS,
    )


def seq_lens(out: torch.Tensor, kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> None:
    """Tokens of each request: one launch."""
    tensors = (out, kv_indptr, kv_last_page_len)
    _launch_seq_lens(
        (-(-out.shape[0] // INDEX_BLOCK), 1, 1),
        (integer_classes((page_size,)), alignment(*tensors)),
        (*tensors, out.shape[0], page_size, INDEX_BLOCK),
        out.device,
        num_warps=NUM_WARPS,
    )
