"""Rotary position embedding with FlashInfer's names and signatures.

Common to all: q `[nnz, num_qo_heads, head_dim]` and k `[nnz, num_kv_heads, head_dim]`, fp32, fp16 or bf16, innermost
stride 1, otherwise any strides; the `_inplace` functions write through views. The first `rotary_dim` components
(default: all) are rotated, the rest are kept. `interleave=False` pairs component d with d + rotary_dim/2 (NeoX),
`interleave=True` pairs 2d with 2d + 1. `rope_scale` divides positions, `rope_theta` is the base of the frequencies.
Angles are fp32. Index tensors are int32 or int64. Raises ValueError for a wrong shape, dtype, device or range.
"""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.ops import rope as ops

POSITION_DTYPES = (torch.int32, torch.int64)
Pair = tuple[torch.Tensor, torch.Tensor]


def _check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    check.tensor("q", q, dtypes=check.FLOAT_DTYPES, shape=(None, None, None), inner_contiguous=True)
    shape = (q.shape[0], None, q.shape[2])
    check.tensor("k", k, dtypes=check.FLOAT_DTYPES, shape=shape, like=("q", q), inner_contiguous=True)


def _rope(
    q: torch.Tensor,
    rotary_dim: int | None,
    interleave: bool,
    rope_scale: float,
    rope_theta: float,
    smoothing: ops.Smoothing | None = None,
) -> ops.Rope:
    head_dim = q.shape[-1]
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            check.problem(
                "rotary_dim", rotary_dim, f"an even number from 2 to head_dim {head_dim}", "Pass the rotated width."
            )
        )
    for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
        if not value > 0:
            raise ValueError(check.problem(name, value, "a number above 0", f"Pass a positive {name}."))
    return ops.Rope(rotary_dim, interleave, float(rope_scale), float(rope_theta), smoothing)


def _smoothing(low_freq_factor: float, high_freq_factor: float, old_context_len: float) -> ops.Smoothing:
    if not 0 < low_freq_factor < high_freq_factor:
        raise ValueError(
            check.problem(
                "low_freq_factor",
                f"{low_freq_factor} with high_freq_factor {high_freq_factor}",
                "0 < low_freq_factor < high_freq_factor",
                "Take both from the model's rope_scaling.",
            )
        )
    return ops.Smoothing(float(low_freq_factor), float(high_freq_factor), float(old_context_len))


def _positions(q: torch.Tensor, indptr: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    check.tensor("indptr", indptr, dtypes=POSITION_DTYPES, like=("q", q))
    check.indptr("indptr", indptr)
    check.index_range("indptr", indptr, 0, q.shape[0] + 1)
    check.tensor("offsets", offsets, dtypes=POSITION_DTYPES, shape=(indptr.numel() - 1,), like=("q", q))
    return ops.request_positions(indptr, offsets, q.shape[0])


def _check_pos_ids(q: torch.Tensor, pos_ids: torch.Tensor) -> torch.Tensor:
    return check.tensor("pos_ids", pos_ids, dtypes=POSITION_DTYPES, shape=(q.shape[0],), like=("q", q))


def _copies(q: torch.Tensor, k: torch.Tensor) -> Pair:
    return q.clone(memory_format=torch.contiguous_format), k.clone(memory_format=torch.contiguous_format)


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """Rotate q and k in place; token j of request i stands at position `offsets[i] + j`.

    indptr: `[batch_size + 1]`, request i owns rows `indptr[i]` to `indptr[i + 1]`. offsets: `[batch_size]`.
    Rows past `indptr[-1]` (padding) are left as they are.
    """
    _check_heads(q, k)
    rope = _rope(q, rotary_dim, interleave, rope_scale, rope_theta)
    ops.rotate_by_angles(rope, _positions(q, indptr, offsets), q, k)


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Pair:
    """`apply_rope_inplace` on contiguous copies; returns (q, k) rotated."""
    _check_heads(q, k)
    rotated = _copies(q, k)
    apply_rope_inplace(*rotated, indptr, offsets, rotary_dim, interleave, rope_scale, rope_theta)
    return rotated


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """Rotate q and k in place; row t stands at position `pos_ids[t]`. pos_ids: `[nnz]`."""
    _check_heads(q, k)
    rope = _rope(q, rotary_dim, interleave, rope_scale, rope_theta)
    ops.rotate_by_angles(rope, _check_pos_ids(q, pos_ids), q, k)


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Pair:
    """`apply_rope_pos_ids_inplace` on contiguous copies; returns (q, k) rotated."""
    _check_heads(q, k)
    rotated = _copies(q, k)
    apply_rope_pos_ids_inplace(*rotated, pos_ids, rotary_dim, interleave, rope_scale, rope_theta)
    return rotated


def apply_llama31_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_rope_inplace` with Llama 3.1's frequencies.

    Wavelengths longer than old_context_len / low_freq_factor tokens are stretched by rope_scale, those shorter than
    old_context_len / high_freq_factor are kept, with a linear passage in frequency between.
    """
    _check_heads(q, k)
    smoothing = _smoothing(low_freq_factor, high_freq_factor, old_context_len)
    rope = _rope(q, rotary_dim, interleave, rope_scale, rope_theta, smoothing)
    ops.rotate_by_angles(rope, _positions(q, indptr, offsets), q, k)


def apply_llama31_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Pair:
    """`apply_llama31_rope_inplace` on contiguous copies; returns (q, k) rotated."""
    _check_heads(q, k)
    rotated = _copies(q, k)
    scaling = (rope_scale, rope_theta, low_freq_factor, high_freq_factor)
    apply_llama31_rope_inplace(
        *rotated, indptr, offsets, rotary_dim, interleave, *scaling, old_context_len=old_context_len
    )
    return rotated


def apply_llama31_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_rope_pos_ids_inplace` with Llama 3.1's frequencies; see `apply_llama31_rope_inplace`."""
    _check_heads(q, k)
    smoothing = _smoothing(low_freq_factor, high_freq_factor, old_context_len)
    rope = _rope(q, rotary_dim, interleave, rope_scale, rope_theta, smoothing)
    ops.rotate_by_angles(rope, _check_pos_ids(q, pos_ids), q, k)


def apply_llama31_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> Pair:
    """`apply_llama31_rope_pos_ids_inplace` on contiguous copies; returns (q, k) rotated."""
    _check_heads(q, k)
    rotated = _copies(q, k)
    scaling = (rope_scale, rope_theta, low_freq_factor, high_freq_factor)
    apply_llama31_rope_pos_ids_inplace(
        *rotated, pos_ids, rotary_dim, interleave, *scaling, old_context_len=old_context_len
    )
    return rotated


def _heads(name: str, x: torch.Tensor, head_size: int) -> torch.Tensor:
    """View `[nnz, num_heads * head_size]` as `[nnz, num_heads, head_size]`."""
    check.tensor(name, x, dtypes=check.FLOAT_DTYPES, shape=(None, None), inner_contiguous=True)
    check.multiple(f"last dimension of {name}", x.shape[1], "head_size", head_size)
    return x.view(x.shape[0], x.shape[1] // head_size, head_size)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """Rotate query and key in place by tabulated cosines and sines.

    positions: `[nnz]`. query: `[nnz, num_qo_heads * head_size]`, key: `[nnz, num_kv_heads * head_size]`, rows of any
    stride. cos_sin_cache: fp32 `[max_position, rotary_dim]`, the cosines of a position and then its sines;
    rotary_dim <= head_size. is_neox: pairs are (d, d + rotary_dim/2), else (2d, 2d + 1).
    """
    check.positive("head_size", head_size)
    q = _heads("query", query, head_size)
    check.tensor("key", key, shape=(q.shape[0], None), like=("query", query))
    k = _heads("key", key, head_size)
    check.tensor("positions", positions, dtypes=POSITION_DTYPES, shape=(q.shape[0],), like=("query", query))
    check.tensor("cos_sin_cache", cos_sin_cache, dtypes=(torch.float32,), shape=(None, None), like=("query", query))
    rotary_dim = _rope(q, cos_sin_cache.shape[1], not is_neox, 1.0, 1.0).rotary_dim
    check.index_range("positions", positions, 0, cos_sin_cache.shape[0])
    cos, sin = cos_sin_cache[positions].split(rotary_dim // 2, dim=-1)
    for x in (q, k):
        ops.rotate_inplace(x, cos, sin, not is_neox)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> Pair:
    """`apply_rope_with_cos_sin_cache_inplace` on contiguous copies; returns (query, key) rotated."""
    check.tensor("query", query)
    check.tensor("key", key)
    rotated = _copies(query, key)
    apply_rope_with_cos_sin_cache_inplace(positions, *rotated, head_size, cos_sin_cache, is_neox)
    return rotated
