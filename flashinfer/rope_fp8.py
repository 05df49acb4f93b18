"""Rotary position embedding with rounding to fp8; callers find these functions in `flashinfer.rope`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashinfer.core import check
from flashinfer.core.kv_cache import kv_layout as checked_layout
from flashinfer.core.kv_cache import paged_views
from flashinfer.ops import rope as ops

POSITION_DTYPES = (*check.INDEX_DTYPES, torch.int64)


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


def _outs(
    names: Sequence[str], sources: Sequence[torch.Tensor], outs: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The outputs, those not given made."""
    made = []
    for name, source, out in zip(names, sources, outs, strict=True):
        if out is None:
            out = torch.empty(source.shape, dtype=dtype, device=source.device)
        like = ("q_rope", source)
        made.append(check.tensor(name, out, dtypes=(dtype,), shape=source.shape, like=like, inner_contiguous=True))
    return made


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
    sources = _check_parts(q_rope, k_rope, q_nope, k_nope)
    _check_rope_table(pos_ids, cos_sin_cache, q_rope)
    given = (q_rope_out, k_rope_out, q_nope_out, k_nope_out)
    dtype = _quantize_dtype(quantize_dtype, given)
    outs = _outs(("q_rope_out", "k_rope_out", "q_nope_out", "k_nope_out"), sources, given, dtype)
    ops.rope_quantize(
        [_three_dims(x) for x in outs],
        [_three_dims(x) for x in sources],
        pos_ids,
        cos_sin_cache,
        [float(quant_scale_q), float(quant_scale_kv)],
        not is_neox,
    )
    return outs[0], outs[1], outs[2], outs[3]


def _check_rope_table(pos_ids: torch.Tensor, cos_sin_cache: torch.Tensor, q_rope: torch.Tensor) -> None:
    like = ("q_rope", q_rope)
    nnz, _, rope_dim = q_rope.shape
    check.tensor("pos_ids", pos_ids, dtypes=POSITION_DTYPES, shape=(nnz,), like=like, inner_contiguous=True)
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
    sources = _check_parts(q_rope, k_rope, q_nope, k_nope)
    _check_rope_table(pos_ids, cos_sin_cache, q_rope)
    dtype = _quantize_dtype(quantize_dtype, (q_rope_out, q_nope_out))
    q_outs = _outs(("q_rope_out", "q_nope_out"), sources[::2], (q_rope_out, q_nope_out), dtype)
    like = ("q_rope", q_rope)
    table = {"batch_indices": batch_indices, "positions": positions, "kv_indices": kv_indices, "kv_indptr": kv_indptr}
    for name, x in table.items():
        shape = (None if name.startswith("kv") else q_rope.shape[0],)
        check.tensor(name, x, dtypes=check.INDEX_DTYPES, shape=shape, like=like, inner_contiguous=True)
    rope_cache, nope_cache, v_cache = _cache_parts(paged_kv_cache, kv_layout, sources, v)
    moved = [_three_dims(x) for x in sources]
    targets = [q_outs[0], rope_cache, q_outs[1], nope_cache]
    if v is not None and v_cache is not None:
        moved.append(v)
        targets.append(v_cache)
    for i in range(len(moved)):
        if i not in (0, 2):
            name, shape = "V cache" if i == 4 else "K cache", (None, page_size, *moved[i].shape[1:])
            check.tensor(name, targets[i], dtypes=(dtype,), shape=shape, like=like, inner_contiguous=True)
    scales = [float(quant_scale_q), float(quant_scale_kv)]
    ops.rope_quantize_append(targets, moved, pos_ids, cos_sin_cache, list(table.values()), scales, not is_neox)
    return q_outs[0], q_outs[1]


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
