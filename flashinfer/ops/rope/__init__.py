"""Rotary position embedding (RoPE)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from flashinfer.core import check, library
from flashinfer.core.arch import arch_of
from flashinfer.core.select import Impl, select
from flashinfer.ops.page import PageTable, check_places
from flashinfer.ops.rope.frequencies import frequencies
from flashinfer.ops.rope.spec import (
    Angle,
    Move,
    Rope,
    RopeSpec,
    Rotation,
    Side,
    Smoothing,
    Weights,
    spec_of,
)
from flashinfer.ops.rope.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.rope.triton", triton_supports),
    Impl("torch", "flashinfer.ops.rope.reference", torch_supports),
)


@cache
def _implementation(spec: RopeSpec, device: torch.device, backend: str) -> Callable[[Rotation], None]:
    """The chosen implementation's call for one kind of rotation; kept, because choosing takes longer than launching."""
    arch = arch_of(device)
    call: Callable[[Rotation], None] = select(IMPLS, spec, arch, backend).load().bind(spec, arch)
    return call


def rotate(rotation: Rotation, rotary_dim: int, interleave: bool, backend: str = "auto") -> None:
    """Rotate, and write every target of the call; "auto" is Triton on a GPU and torch on CPU tensors."""
    source = rotation.q.rope.source
    if source.shape[0] == 0:
        return
    spec = spec_of(rotation, rotary_dim, interleave)
    _implementation(spec, source.device, backend)(rotation)


def _check_ranges(angle: Angle, nnz: int) -> None:
    """Check what only the host can see, for CPU tensors: every token has its angles."""
    table, positions, offsets = angle
    if not positions.is_cpu:
        return
    if offsets is not None:
        check.indptr("indptr", positions)
        check.index_range("indptr", positions, 0, nnz + 1)
    elif table.dim() == 2:
        check.index_range("positions", positions, 0, table.shape[0])


@cache
def _rope(scaling: tuple[float, ...], rotary_dim: int) -> Rope:
    """scaling: rope_scale and rope_theta; low_freq_factor, high_freq_factor and old_context_len for Llama 3.1's."""
    smoothing = Smoothing(*scaling[2:]) if len(scaling) > 2 else None
    return Rope(rotary_dim, scaling[0], scaling[1], smoothing)


def _side(x: torch.Tensor, out: torch.Tensor, rotary_dim: int) -> Side:
    """x rotated into out; in place (out is x) the components beyond rotary_dim stay where they are."""
    if out is x or rotary_dim == x.shape[2]:
        return Side(Move(x, out))
    return Side(Move(x, out), Move(x[..., rotary_dim:], out[..., rotary_dim:]))


@library.register(
    "rope(Tensor(a!) q_out, Tensor(b!) k_out, Tensor? q, Tensor? k, Tensor positions, Tensor? offsets, "
    "float[] scaling, int style) -> ()"
)
def rope(
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    positions: torch.Tensor,
    offsets: torch.Tensor | None,
    scaling: list[float],
    style: int,
) -> None:
    """Rotate q and k by frequencies; without them q_out and k_out, in place. style: rotary_dim, + 1 to interleave."""
    interleave = style % 2 == 1
    rotary_dim = style - interleave
    table = frequencies(_rope(tuple(scaling), rotary_dim), positions.device)
    angle = Angle(table, positions, offsets)
    _check_ranges(angle, q_out.shape[0])
    sides = _side(q_out if q is None else q, q_out, rotary_dim), _side(k_out if k is None else k, k_out, rotary_dim)
    rotate(Rotation(*sides, angle), rotary_dim, interleave)


@library.register(
    "rope_cached(Tensor(a!) q_out, Tensor(b!) k_out, Tensor? q, Tensor? k, Tensor positions, Tensor cos_sin_cache, "
    "bool interleave) -> ()"
)
def rope_cached(
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    interleave: bool,
) -> None:
    """Rotate q and k by tabulated cosines and sines; without them q_out and k_out, in place."""
    rotary_dim = cos_sin_cache.shape[1]
    angle = Angle(cos_sin_cache, positions)
    _check_ranges(angle, q_out.shape[0])
    sides = _side(q_out if q is None else q, q_out, rotary_dim), _side(k_out if k is None else k, k_out, rotary_dim)
    rotate(Rotation(*sides, angle), rotary_dim, interleave)


def _normed(x: torch.Tensor, rotary_dim: int) -> Side:
    """x in place, with its components beyond rotary_dim, which the norm changes too."""
    rest = x[..., rotary_dim:]
    return Side(Move(x, x), Move(rest, rest) if rest.shape[2] else None)


@library.register(
    "qk_rmsnorm_rope(Tensor(a!) q, Tensor(b!) k, Tensor q_weight, Tensor k_weight, Tensor positions, "
    "Tensor cos_sin_cache, float eps, bool interleave) -> ()"
)
def qk_rmsnorm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    eps: float,
    interleave: bool,
) -> None:
    """RMSNorm of each head of q and k, then rotation by tabulated cosines and sines, in place."""
    rotary_dim = cos_sin_cache.shape[1]
    angle = Angle(cos_sin_cache, positions)
    _check_ranges(angle, q.shape[0])
    sides = _normed(q, rotary_dim), _normed(k, rotary_dim)
    rotate(Rotation(*sides, angle, weights=Weights(q_weight, k_weight, eps)), rotary_dim, interleave)


def _quantized(x: list[torch.Tensor], out: list[torch.Tensor], scales: list[float]) -> tuple[Side, Side]:
    """x, out: rotated q, rotated k, rest of q, rest of k; a rest of no components is left out."""
    moves = [Move(source, target) for source, target in zip(x, out, strict=True)]
    q, k, q_rest, k_rest = (move if move.source.shape[2] else None for move in moves[:4])
    assert q is not None and k is not None
    return Side(q, q_rest, scales[0]), Side(k, k_rest, scales[1])


@library.register(
    "rope_quantize(Tensor(a!)[] out, Tensor[] x, Tensor positions, Tensor cos_sin_cache, float[] scales, "
    "bool interleave) -> ()"
)
def rope_quantize(
    out: list[torch.Tensor],
    x: list[torch.Tensor],
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    scales: list[float],
    interleave: bool,
) -> None:
    """Rotate and quantise. x, out `[nnz, num_heads, dim]`: rotated q, rotated k, rest of q, rest of k (dim 0: none)."""
    angle = Angle(cos_sin_cache, positions)
    _check_ranges(angle, positions.shape[0])
    rotate(Rotation(*_quantized(x, out, scales), angle), cos_sin_cache.shape[1], interleave)


@library.register(
    "rope_quantize_append(Tensor(a!)[] out, Tensor[] x, Tensor positions, Tensor cos_sin_cache, Tensor[] page_table, "
    "float[] scales, bool interleave) -> ()"
)
def rope_quantize_append(
    out: list[torch.Tensor],
    x: list[torch.Tensor],
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    page_table: list[torch.Tensor],
    scales: list[float],
    interleave: bool,
) -> None:
    """`rope_quantize` of k, and of a fifth tensor v if there is one, to views of a paged cache."""
    angle = Angle(cos_sin_cache, positions)
    _check_ranges(angle, positions.shape[0])
    table = PageTable(*page_table)
    if positions.is_cpu:
        check_places(table, out[1].shape[0], out[1].shape[1])
    v = Move(x[4], out[4]) if len(x) > 4 else None
    sides = _quantized(x[:4], out[:4], scales)
    rotate(Rotation(*sides, angle, v, table), cos_sin_cache.shape[1], interleave)


__all__ = [
    "IMPLS",
    "Angle",
    "Move",
    "Rope",
    "RopeSpec",
    "Rotation",
    "Side",
    "Smoothing",
    "Weights",
    "frequencies",
    "qk_rmsnorm_rope",
    "rope",
    "rope_cached",
    "rope_quantize",
    "rope_quantize_append",
    "rotate",
]
