"""Rotary position embedding with FlashInfer's names and signatures.

Common to all: q `[nnz, num_qo_heads, head_dim]` and k `[nnz, num_kv_heads, head_dim]`, fp32, fp16 or bf16, innermost
stride 1, otherwise any strides; the `_inplace` functions write through views. The first `rotary_dim` components
(default: all) are rotated, the rest are kept. `interleave=False` pairs component d with d + rotary_dim/2 (NeoX),
`interleave=True` pairs 2d with 2d + 1. `rope_scale` divides positions, `rope_theta` is the base of the frequencies.
Angles are exact, their cosines and sines fp32. Index tensors are int32 or int64. Raises ValueError for a wrong shape,
dtype, device or, on the CPU, range.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashinfer.core import check
from flashinfer.core.kv_cache import kv_layout as checked_layout
from flashinfer.core.kv_cache import paged_views
from flashinfer.ops import rope as ops

POSITION_DTYPES = (torch.int32, torch.int64)
Pair = tuple[torch.Tensor, torch.Tensor]


def _check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    check.tensor("q", q, dtypes=check.FLOAT_DTYPES, shape=(None, None, None), inner_contiguous=True)
    shape = (q.shape[0], None, q.shape[2])
    check.tensor("k", k, dtypes=(q.dtype,), shape=shape, like=("q", q), inner_contiguous=True)


def _style(head_dim: int, rotary_dim: int | None, interleave: bool) -> list[int]:
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            check.problem(
                "rotary_dim", rotary_dim, f"an even number from 2 to head_dim {head_dim}", "Pass the rotated width."
            )
        )
    return [rotary_dim, int(interleave)]


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
    _check_heads(q, k)
    shape = (q.shape[0],)
    check.tensor("pos_ids", pos_ids, dtypes=POSITION_DTYPES, shape=shape, like=("q", q), inner_contiguous=True)
    return *_targets(q, k, inplace), (pos_ids, None)


def _targets(q: torch.Tensor, k: torch.Tensor, inplace: bool) -> tuple[Pair, Pair | tuple[None, None]]:
    if inplace:
        return (q, k), (None, None)
    return (_empty_like(q), _empty_like(k)), (q, k)


def _empty_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


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
    return x.unflatten(1, (x.shape[1] // head_size, head_size))


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
            out = _empty_like(source, dtype)
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

    paged_kv_cache: (k_cache, v_cache) `[pages, page_size, num_kv_heads, head_dim]`, heads before tokens for "HND"; a key
    is its rotated components, then the rest; v `[nnz, num_kv_heads, head_dim]`. For multi-head latent attention (k_rope
    of two dimensions) (ckv_cache, kpe_cache) `[pages, page_size, dim]` for k_nope and k_rope, and v is None.
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
