"""Rotary position embedding with rounding to fp8; callers find these functions in `flashinfer.rope`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashinfer.core import check
from flashinfer.core.kv_cache import kv_layout as checked_layout
from flashinfer.core.kv_cache import page_table, paged_views
from flashinfer.core.replay import replayed
from flashinfer.ops import rope as ops

Pair = tuple[torch.Tensor, torch.Tensor]
# q_rope, k_rope, q_nope, k_nope.
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _three_dims(x: torch.Tensor) -> torch.Tensor:
    """`[nnz, dim]` of multi-head latent attention as one head."""
    return x.unsqueeze(1) if x.dim() == 2 else x


def _check_parts(
    q_rope: torch.Tensor, k_rope: torch.Tensor, q_nope: torch.Tensor | None, k_nope: torch.Tensor | None
) -> list[torch.Tensor]:
    """The four inputs, checked, with three dimensions; a missing rest has no components."""
    check.tensor("q_rope", q_rope, dtypes=check.FLOAT_DTYPES, shape=(None, None, None), inner_contiguous=True)
    like = ("q_rope", q_rope)
    nnz, num_qo_heads, rope_dim = q_rope.shape
    check.tensor("k_rope", k_rope, dtypes=(q_rope.dtype,), like=like, inner_contiguous=True)
    k_heads = tuple(k_rope.shape[1:-1])
    if k_rope.shape != (nnz, *k_heads, rope_dim) or len(k_heads) > 1:
        expected = f"[{nnz}, num_kv_heads, {rope_dim}] or [{nnz}, {rope_dim}]"
        raise ValueError(check.problem("k_rope", f"shape {list(k_rope.shape)}", expected, "Take the rows of q_rope."))
    rests = []
    for name, rest, heads in (("q_nope", q_nope, (num_qo_heads,)), ("k_nope", k_nope, k_heads)):
        if rest is None:
            rest = torch.empty(nnz, *heads, 0, dtype=q_rope.dtype, device=q_rope.device)
        shape = (nnz, *heads, None)
        check.tensor(name, rest, dtypes=(q_rope.dtype,), shape=shape, like=like, inner_contiguous=True)
        rests.append(rest)
    return [q_rope, k_rope, *rests]


def _quantize_dtype(wanted: torch.dtype | None, outs: Sequence[torch.Tensor | None]) -> torch.dtype:
    given = [out.dtype for out in outs if out is not None]
    dtype = wanted or (given[0] if given else torch.float8_e4m3fn)
    check.choice("quantize_dtype", dtype, check.FP8_DTYPES)
    return dtype


def _made(
    name: str, rope: torch.Tensor, nope: torch.Tensor | None, outs: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> Pair:
    """The outputs of the rotated part and of the rest, those not given made. name: of `rope`."""
    check.tensor(name, rope)
    shapes = (rope.shape, (*rope.shape[:-1], 0) if nope is None else nope.shape)
    rope_out, nope_out = (
        torch.empty(shape, dtype=dtype, device=rope.device) if out is None else out
        for shape, out in zip(shapes, outs, strict=True)
    )
    return rope_out, nope_out


def _check_outs(
    names: Sequence[str], sources: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], dtype: torch.dtype
) -> None:
    for name, source, out in zip(names, sources, outs, strict=True):
        like = ("q_rope", source)
        check.tensor(name, out, dtypes=(dtype,), shape=source.shape, like=like, inner_contiguous=True)


def rope_quantize_fp8(
    q_rope: torch.Tensor,
    k_rope: torch.Tensor,
    q_nope: torch.Tensor | None,
    k_nope: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    pos_ids: torch.Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: torch.Tensor | None = None,
    k_rope_out: torch.Tensor | None = None,
    q_nope_out: torch.Tensor | None = None,
    k_nope_out: torch.Tensor | None = None,
    enable_pdl: bool = False,
    backend: str = "cuda",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate q_rope and k_rope, multiply everything by its scale and round it to fp8 (saturating, NaN kept).

    q_rope `[nnz, num_qo_heads, rope_dim]`, q_nope `[nnz, num_qo_heads, nope_dim]` or None; k_rope and k_nope alike with
    num_kv_heads, or `[nnz, dim]` for multi-head latent attention. cos_sin_cache: fp32 `[max_position, rope_dim]`.
    pos_ids: `[nnz]`. quantize_dtype: e4m3fn (default, or that of a given output) or e5m2. Outputs, shaped as their
    inputs, are made if not given. enable_pdl and backend ("auto", "cuda", "cutile") are accepted and change nothing.
    Returns (q_rope_out, k_rope_out, q_nope_out, k_nope_out); a part that is None gives a tensor of dim 0.
    """
    check.choice("backend", backend, ("auto", "cuda", "cutile"))
    given = (q_rope_out, k_rope_out, q_nope_out, k_nope_out)
    dtype = _quantize_dtype(quantize_dtype, given)
    q_outs = _made("q_rope", q_rope, q_nope, (q_rope_out, q_nope_out), dtype)
    k_outs = _made("k_rope", k_rope, k_nope, (k_rope_out, k_nope_out), dtype)
    parts, scales = (q_rope, k_rope, q_nope, k_nope), (float(quant_scale_q), float(quant_scale_kv))
    outs = (q_outs[0], k_outs[0], q_outs[1], k_outs[1])
    _quantize(outs, parts, cos_sin_cache, pos_ids, is_neox, dtype, scales)
    return outs


@replayed
def _quantize(
    outs: tuple[torch.Tensor, ...],
    parts: Parts,
    cos_sin_cache: torch.Tensor,
    pos_ids: torch.Tensor,
    is_neox: bool,
    dtype: torch.dtype,
    scales: tuple[float, float],
) -> None:
    sources = _check_parts(*parts)
    _check_rope_table(pos_ids, cos_sin_cache, sources[0])
    _check_outs(("q_rope_out", "k_rope_out", "q_nope_out", "k_nope_out"), sources, outs, dtype)
    moved = ([_three_dims(x) for x in outs], [_three_dims(x) for x in sources])
    ops.rope_quantize(*moved, pos_ids, cos_sin_cache, list(scales), not is_neox)


def _check_rope_table(pos_ids: torch.Tensor, cos_sin_cache: torch.Tensor, q_rope: torch.Tensor) -> None:
    like = ("q_rope", q_rope)
    nnz, _, rope_dim = q_rope.shape
    check.tensor("pos_ids", pos_ids, dtypes=check.POSITION_DTYPES, shape=(nnz,), like=like, inner_contiguous=True)
    shape = (None, rope_dim)
    check.tensor("cos_sin_cache", cos_sin_cache, dtypes=(torch.float32,), shape=shape, like=like, inner_contiguous=True)
    check.multiple("last dimension of q_rope", rope_dim, "a pair's size", 2)


def mla_rope_quantize_fp8(
    q_rope: torch.Tensor,
    k_rope: torch.Tensor,
    q_nope: torch.Tensor | None,
    k_nope: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    pos_ids: torch.Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: torch.Tensor | None = None,
    k_rope_out: torch.Tensor | None = None,
    q_nope_out: torch.Tensor | None = None,
    k_nope_out: torch.Tensor | None = None,
    enable_pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`rope_quantize_fp8` under the name that callers with multi-head latent attention use."""
    parts = (q_rope, k_rope, q_nope, k_nope, cos_sin_cache, pos_ids, is_neox, quantize_dtype)
    outs = (q_rope_out, k_rope_out, q_nope_out, k_nope_out)
    return rope_quantize_fp8(*parts, quant_scale_q, quant_scale_kv, *outs, enable_pdl)


def rope_quantize_fp8_append_paged_kv_cache(
    q_rope: torch.Tensor,
    k_rope: torch.Tensor,
    q_nope: torch.Tensor | None,
    k_nope: torch.Tensor | None,
    v: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    pos_ids: torch.Tensor,
    paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    is_neox: bool = True,
    quantize_dtype: torch.dtype | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    page_size: int = 16,
    kv_layout: str = "NHD",
    q_rope_out: torch.Tensor | None = None,
    q_nope_out: torch.Tensor | None = None,
    enable_pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope_quantize_fp8` with k, and v times quant_scale_kv, written to a paged fp8 cache, in place.

    paged_kv_cache: (k_cache, v_cache) `[pages, page_size, num_kv_heads, head_dim]`, heads before tokens for "HND"; a
    key is its rotated components, then the rest; v `[nnz, num_kv_heads, head_dim]`. For multi-head latent attention
    (k_rope of two dimensions) (ckv_cache, kpe_cache) `[pages, page_size, dim]` for k_nope and k_rope, and v is None.
    kv_indices, kv_indptr, batch_indices, positions: int32, as in `append_paged_kv_cache`. The other arguments as in
    `rope_quantize_fp8`. Returns (q_rope_out, q_nope_out).
    """
    dtype = _quantize_dtype(quantize_dtype, (q_rope_out, q_nope_out))
    q_outs = _made("q_rope", q_rope, q_nope, (q_rope_out, q_nope_out), dtype)
    parts, angles = (q_rope, k_rope, q_nope, k_nope), (cos_sin_cache, pos_ids)
    table = (batch_indices, positions, kv_indices, kv_indptr)
    scales = (float(quant_scale_q), float(quant_scale_kv))
    _quantize_append(q_outs, parts, v, angles, paged_kv_cache, table, scales, (is_neox, dtype, page_size, kv_layout))
    return q_outs


@replayed
def _quantize_append(
    q_outs: Pair,
    parts: Parts,
    v: torch.Tensor | None,
    angles: Pair,
    caches: Pair,
    table: tuple[torch.Tensor, ...],
    scales: tuple[float, float],
    options: tuple[bool, torch.dtype, int, str],
) -> None:
    """angles: cos_sin_cache, pos_ids. table: that of `page_table`. options: is_neox, dtype, page_size, kv_layout."""
    is_neox, dtype, page_size, kv_layout = options
    cos_sin_cache, pos_ids = angles
    sources = _check_parts(*parts)
    like = ("q_rope", sources[0])
    _check_rope_table(pos_ids, cos_sin_cache, sources[0])
    _check_outs(("q_rope_out", "q_nope_out"), sources[::2], q_outs, dtype)
    where = page_table(table, like)
    rope_cache, nope_cache, v_cache = _cache_parts(caches, kv_layout, sources, v)
    moved = [_three_dims(x) for x in sources]
    targets = [q_outs[0], rope_cache, q_outs[1], nope_cache]
    if v is not None and v_cache is not None:
        moved.append(v)
        targets.append(v_cache)
    for i in range(len(moved)):
        if i not in (0, 2):
            name, shape = "V cache" if i == 4 else "K cache", (None, page_size, *moved[i].shape[1:])
            check.tensor(name, targets[i], dtypes=(dtype,), shape=shape, like=like, inner_contiguous=True)
    ops.rope_quantize_append(targets, moved, pos_ids, cos_sin_cache, where, list(scales), not is_neox)


def _cache_parts(
    caches: tuple[torch.Tensor, torch.Tensor], kv_layout: str, sources: list[torch.Tensor], v: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Views of the cache for the rotated part of keys, their rest, and values, NHD."""
    rope_dim, nope_dim = sources[1].shape[-1], sources[3].shape[-1]
    if sources[1].dim() == 2:
        if v is not None:
            raise ValueError(
                check.problem("v", "a tensor", "None where k_rope has two dimensions", "k_nope holds the values there.")
            )
        ckv_cache, kpe_cache = caches
        return kpe_cache.unsqueeze(-2), ckv_cache.unsqueeze(-2), None
    shape = (*sources[1].shape[:2], None)
    check.tensor("v", v, dtypes=(sources[1].dtype,), shape=shape, like=("q_rope", sources[0]), inner_contiguous=True)
    k_cache, v_cache = paged_views(caches, checked_layout(kv_layout))
    check.tensor("K cache", k_cache, shape=(None, None, None, rope_dim + nope_dim))
    return k_cache[..., :rope_dim], k_cache[..., rope_dim:], v_cache
