"""Launch of the append kernel."""

from __future__ import annotations

import torch
import triton

from flashinfer.ops.page.spec import Append, AppendSpec
from flashinfer.ops.page.triton.kernel import Pages, Rows, Table, append_kernel

# A program moves about this many elements of K and of V: 16 for each of 128 threads, two 16-byte vectors in fp16.
TILE = 2048
MAX_COLS = 1024
MANTISSA_BITS = {None: 0, torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


def block_shape(num_cols: int) -> tuple[int, int]:
    """(tokens, columns) of a program's tile for rows of `num_cols` elements."""
    block_cols = min(triton.next_power_of_2(num_cols), MAX_COLS)
    return max(TILE // block_cols, 1), block_cols


def append(spec: AppendSpec, tensors: Append) -> None:
    """Write each token's key and value into its page: one launch, no host sync."""
    key, value, k_cache, v_cache, *table = tensors
    num_tokens = key.shape[0]
    num_cols = spec.num_kv_heads * max(spec.head_dim_k, spec.head_dim_v)
    block_tokens, block_cols = block_shape(num_cols)
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(num_cols, block_cols))
    with torch.cuda.device_of(key):
        append_kernel[grid](
            Rows(key, *key.stride()[:2]),
            Rows(value, *value.stride()[:2]),
            Pages(k_cache, *k_cache.stride()[:3]),
            Pages(v_cache, *v_cache.stride()[:3]),
            Table(*table),
            num_tokens,
            spec.num_kv_heads,
            spec.page_size,
            HEAD_DIMS=(spec.head_dim_k, spec.head_dim_v),
            FP8_MANTISSA_BITS=MANTISSA_BITS[spec.fp8_dtype],
            BLOCK_TOKENS=block_tokens,
            BLOCK_COLS=block_cols,
        )
