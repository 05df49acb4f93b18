"""Rotary position embedding with FlashInfer's names and signatures.

Common to all: q `[nnz, num_qo_heads, head_dim]` and k `[nnz, num_kv_heads, head_dim]`, fp32, fp16 or bf16, innermost
stride 1, otherwise any strides; the `_inplace` functions write through views. The first `rotary_dim` components
(default: all) are rotated, the rest are kept. `interleave=False` pairs component d with d + rotary_dim/2 (NeoX),
`interleave=True` pairs 2d with 2d + 1. `rope_scale` divides positions, `rope_theta` is the base of the frequencies.
Angles are exact, their cosines and sines fp32. Index tensors are int32 or int64. Raises ValueError for a wrong shape,
dtype, device or, on the CPU, range.
"""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.ops import rope as ops
from flashinfer.rope_fp8 import (
    mla_rope_quantize_fp8,
    rope_quantize_fp8,
    rope_quantize_fp8_append_paged_kv_cache,
)

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
    "mla_rope_quantize_fp8",
    "qk_rmsnorm_rope_inplace",
    "rope_quantize_fp8",
    "rope_quantize_fp8_append_paged_kv_cache",
]

POSITION_DTYPES = (*check.INDEX_DTYPES, torch.int64)
Pair = tuple[torch.Tensor, torch.Tensor]


def _check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    check.tensor("q", q, dtypes=check.FLOAT_DTYPES, shape=(None, None, None), inner_contiguous=True)
    shape = (q.shape[0], None, q.shape[2])
    check.tensor("k", k, dtypes=(q.dtype,), shape=shape, like=("q", q), inner_contiguous=True)


def _style(head_dim: int, rotary_dim: int | None, interleave: bool) -> int:
    """rotary_dim, which is even, + 1 to interleave."""
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            check.problem(
                "rotary_dim", rotary_dim, f"an even number from 2 to head_dim {head_dim}", "Pass the rotated width."
            )
        )
    return rotary_dim + int(interleave)


def _scaling(rope_scale: float, rope_theta: float) -> list[float]:
    for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
        if not value > 0:
            raise ValueError(check.problem(name, value, "a number above 0", f"Pass a positive {name}."))
    return [float(rope_scale), float(rope_theta)]


def _smoothing(low_freq_factor: float, high_freq_factor: float, old_context_len: float) -> list[float]:
    if not 0 < low_freq_factor < high_freq_factor:
        raise ValueError(
            check.problem(
                "low_freq_factor",
                f"{low_freq_factor} with high_freq_factor {high_freq_factor}",
                "0 < low_freq_factor < high_freq_factor",
                "Take both from the model's rope_scaling.",
            )
        )
    return [float(low_freq_factor), float(high_freq_factor), float(old_context_len)]


def _is_plain(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> bool:
    """Whether all is as it mostly is, so that the checks can be skipped: they take longer than a launch."""
    return (
        isinstance(q, torch.Tensor)
        and isinstance(k, torch.Tensor)
        and isinstance(positions, torch.Tensor)
        and q.dtype == k.dtype
        and q.dtype in check.FLOAT_DTYPES
        and positions.dtype in POSITION_DTYPES
        and q.device == k.device == positions.device
        and q.dim() == k.dim()
        and (positions.shape[0],) == positions.shape
        and q.shape[0] == k.shape[0] == positions.shape[0]
        and q.stride(-1) == k.stride(-1) == positions.stride(-1) == 1
    )


def _by_request(
    q: torch.Tensor, k: torch.Tensor, indptr: torch.Tensor, offsets: torch.Tensor, inplace: bool
) -> tuple[Pair, Pair | tuple[None, None], Pair]:
    """(what to write, what to read unless it is the same, (indptr, offsets)), checked."""
    _check_heads(q, k)
    check.tensor("indptr", indptr, dtypes=POSITION_DTYPES, like=("q", q))
    if indptr.dim() != 1 or indptr.shape[0] == 0:
        check.indptr("indptr", indptr)
    shape = (indptr.shape[0] - 1,)
    check.tensor("offsets", offsets, dtypes=POSITION_DTYPES, shape=shape, like=("q", q), inner_contiguous=True)
    return *_targets(q, k, inplace), (indptr, offsets)


def _by_position(
    q: torch.Tensor, k: torch.Tensor, pos_ids: torch.Tensor, inplace: bool
) -> tuple[Pair, Pair | tuple[None, None], tuple[torch.Tensor, None]]:
    """The same for given positions."""
    if _is_plain(q, k, pos_ids) and q.dim() == 3 and q.shape[2] == k.shape[2]:
        return *_targets(q, k, inplace), (pos_ids, None)
    _check_heads(q, k)
    shape = (q.shape[0],)
    check.tensor("pos_ids", pos_ids, dtypes=POSITION_DTYPES, shape=shape, like=("q", q), inner_contiguous=True)
    return *_targets(q, k, inplace), (pos_ids, None)


def _targets(q: torch.Tensor, k: torch.Tensor, inplace: bool) -> tuple[Pair, Pair | tuple[None, None]]:
    if inplace:
        return (q, k), (None, None)
    return (_empty_like(q), _empty_like(k)), (q, k)


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


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
    out, x, where = _by_request(q, k, indptr, offsets, inplace=True)
    ops.rope(*out, *x, *where, _scaling(rope_scale, rope_theta), _style(q.shape[2], rotary_dim, interleave))


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
    """`apply_rope_inplace` into new contiguous tensors; returns (q, k) rotated."""
    out, x, where = _by_request(q, k, indptr, offsets, inplace=False)
    ops.rope(*out, *x, *where, _scaling(rope_scale, rope_theta), _style(q.shape[2], rotary_dim, interleave))
    return out


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
    out, x, where = _by_position(q, k, pos_ids, inplace=True)
    ops.rope(*out, *x, *where, _scaling(rope_scale, rope_theta), _style(q.shape[2], rotary_dim, interleave))


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> Pair:
    """`apply_rope_pos_ids_inplace` into new contiguous tensors; returns (q, k) rotated."""
    out, x, where = _by_position(q, k, pos_ids, inplace=False)
    ops.rope(*out, *x, *where, _scaling(rope_scale, rope_theta), _style(q.shape[2], rotary_dim, interleave))
    return out


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
    out, x, where = _by_request(q, k, indptr, offsets, inplace=True)
    scaling = _scaling(rope_scale, rope_theta) + _smoothing(low_freq_factor, high_freq_factor, old_context_len)
    ops.rope(*out, *x, *where, scaling, _style(q.shape[2], rotary_dim, interleave))


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
    """`apply_llama31_rope_inplace` into new contiguous tensors; returns (q, k) rotated."""
    out, x, where = _by_request(q, k, indptr, offsets, inplace=False)
    scaling = _scaling(rope_scale, rope_theta) + _smoothing(low_freq_factor, high_freq_factor, old_context_len)
    ops.rope(*out, *x, *where, scaling, _style(q.shape[2], rotary_dim, interleave))
    return out


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
    out, x, where = _by_position(q, k, pos_ids, inplace=True)
    scaling = _scaling(rope_scale, rope_theta) + _smoothing(low_freq_factor, high_freq_factor, old_context_len)
    ops.rope(*out, *x, *where, scaling, _style(q.shape[2], rotary_dim, interleave))


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
    """`apply_llama31_rope_pos_ids_inplace` into new contiguous tensors; returns (q, k) rotated."""
    out, x, where = _by_position(q, k, pos_ids, inplace=False)
    scaling = _scaling(rope_scale, rope_theta) + _smoothing(low_freq_factor, high_freq_factor, old_context_len)
    ops.rope(*out, *x, *where, scaling, _style(q.shape[2], rotary_dim, interleave))
    return out


def _cached(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, head_size: int, cos_sin_cache: torch.Tensor
) -> None:
    """Check the arguments that both forms share."""
    if (
        _is_plain(query, key, positions)
        and query.dim() == 2
        and isinstance(head_size, int)
        and head_size > 0 == query.shape[1] % head_size == key.shape[1] % head_size
        and cos_sin_cache.dtype == torch.float32
        and cos_sin_cache.dim() == 2
        and cos_sin_cache.stride(1) == 1
        and cos_sin_cache.device == query.device
        and 0 < cos_sin_cache.shape[1] <= head_size
        and cos_sin_cache.shape[1] % 2 == 0
    ):
        return
    check.positive("head_size", head_size)
    for name, x in (("query", query), ("key", key)):
        dtypes = check.FLOAT_DTYPES if x is query else (query.dtype,)
        shape = (None, None) if x is query else (query.shape[0], None)
        check.tensor(name, x, dtypes=dtypes, shape=shape, like=("query", query), inner_contiguous=True)
        check.multiple(f"last dimension of {name}", x.shape[1], "head_size", head_size)
    _check_table(positions, cos_sin_cache, ("query", query), head_size)


def _check_table(
    positions: torch.Tensor, cos_sin_cache: torch.Tensor, like: tuple[str, torch.Tensor], head_dim: int
) -> None:
    shape = (like[1].shape[0],)
    check.tensor("positions", positions, dtypes=POSITION_DTYPES, shape=shape, like=like, inner_contiguous=True)
    check.tensor(
        "cos_sin_cache",
        cos_sin_cache,
        dtypes=(torch.float32,),
        shape=(None, None),
        like=like,
        inner_contiguous=True,
    )
    _style(head_dim, cos_sin_cache.shape[1], False)


def _heads(x: torch.Tensor, head_size: int) -> torch.Tensor:
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
    _cached(positions, query, key, head_size, cos_sin_cache)
    ops.rope_cached(_heads(query, head_size), _heads(key, head_size), None, None, positions, cos_sin_cache, not is_neox)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> Pair:
    """`apply_rope_with_cos_sin_cache_inplace` into new contiguous tensors; returns (query, key) rotated."""
    _cached(positions, query, key, head_size, cos_sin_cache)
    out = _empty_like(query), _empty_like(key)
    heads = [_heads(x, head_size) for x in (*out, query, key)]
    ops.rope_cached(*heads, positions, cos_sin_cache, not is_neox)
    return out


def qk_rmsnorm_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    eps: float = 1e-6,
    is_neox: bool = True,
) -> None:
    """RMSNorm of each head of q and k over head_dim, then rotation by tabulated cosines and sines, in place.

    q_weight, k_weight: contiguous `[head_dim]`, of one dtype. positions, cos_sin_cache, is_neox as in
    `apply_rope_with_cos_sin_cache_inplace`. Sums and products are fp32; nothing is rounded between norm and rotation.
    """
    _check_heads(q, k)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        dtypes = check.FLOAT_DTYPES if weight is q_weight else (q_weight.dtype,)
        check.tensor(name, weight, dtypes=dtypes, shape=(q.shape[2],), like=("q", q), inner_contiguous=True)
    _check_table(positions, cos_sin_cache, ("q", q), q.shape[2])
    ops.qk_rmsnorm_rope(q, k, q_weight, k_weight, positions, cos_sin_cache, float(eps), not is_neox)
