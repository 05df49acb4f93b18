"""The records of a rotation: which frequencies, what kind of call it is, and the tensors it moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flashinfer.ops.page import PageTable


@dataclass(frozen=True)
class Smoothing:
    """Llama 3.1's scaling of frequencies by their wavelength in tokens.

    Above old_context_len / low_freq_factor they are divided by rope_scale, below old_context_len / high_freq_factor
    kept; between the two the result moves linearly with the frequency.
    """

    low_freq_factor: float
    high_freq_factor: float
    old_context_len: float


@dataclass(frozen=True)
class Rope:
    """The frequencies of rotary_dim / 2 pairs; rope_scale divides positions."""

    rotary_dim: int
    rope_scale: float
    rope_theta: float
    smoothing: Smoothing | None = None


class RopeSpec(NamedTuple):
    """One kind of call: head counts, dims in elements, dtypes; what is optional.

    q_rest, k_rest, v_dim: components that are only copied, 0 without. out_dtype: of every result; fp8 saturates.
    tabulated: angles come from a table of cosines and sines, else from frequencies. ragged: positions come from
    indptr and offsets. paged: k and v go to a paged cache. normed: heads are RMS-normalised first.
    """

    num_qo_heads: int
    num_kv_heads: int
    rotary_dim: int
    q_rest: int
    k_rest: int
    v_dim: int
    interleave: bool
    dtype: torch.dtype
    out_dtype: torch.dtype
    tabulated: bool
    ragged: bool
    paged: bool
    normed: bool


class Move(NamedTuple):
    """Where components come from and go to; source may be target.

    source: `[nnz, num_heads, dim]`. target: the same shape or, for a paged cache, `[pages, page_size, num_heads, dim]`.
    Innermost stride 1, otherwise any strides.
    """

    source: torch.Tensor
    target: torch.Tensor


class Angle(NamedTuple):
    """Where the angles come from.

    table: fp32 `[max_position, rotary_dim]`, cosines and then sines, or int64 `[rotary_dim / 2]` of `frequencies`.
    positions: int32 or int64 `[nnz]`; or, with offsets, `indptr` `[batch_size + 1]`: token j of request i stands at
    `offsets[i] + j`, tokens past `indptr[-1]` at 0 (no rotation by frequencies).
    """

    table: torch.Tensor
    positions: torch.Tensor
    offsets: torch.Tensor | None = None


class Weights(NamedTuple):
    """RMSNorm of each head before the rotation: weights `[head_dim]` for q and k, eps inside of the root."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


class Side(NamedTuple):
    """What happens to one of q and k: its rotated components, the copied ones, and the factor before fp8."""

    rope: Move
    rest: Move | None = None
    scale: float = 1.0


class Rotation(NamedTuple):
    """One call. v is only copied, by k's factor. All tensors on one device."""

    q: Side
    k: Side
    angle: Angle
    v: Move | None = None
    table: PageTable | None = None
    weights: Weights | None = None


def spec_of(rotation: Rotation, rotary_dim: int, interleave: bool) -> RopeSpec:
    """The kind of a call. rotary_dim: even, at most the dim of `rope`; what lies beyond it there is left alone."""
    q, k, angle, v, table, weights = rotation
    source, target = q.rope
    return RopeSpec(
        source.shape[1],
        k.rope.source.shape[1],
        rotary_dim,
        0 if q.rest is None else q.rest.source.shape[2],
        0 if k.rest is None else k.rest.source.shape[2],
        0 if v is None else v.source.shape[2],
        interleave,
        source.dtype,
        target.dtype,
        angle.table.dim() == 2,
        angle.offsets is not None,
        table is not None,
        weights is not None,
    )
