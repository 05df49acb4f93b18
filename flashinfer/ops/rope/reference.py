"""Rotary position embedding in plain torch (Su et al., arXiv 2104.09864): no host sync.

The pair (a, b) of a head at position p becomes (a cos - b sin, b cos + a sin) with the angle p * frequency. Pairs are
(d, d + rotary_dim/2) in the NeoX order and (2d, 2d + 1) in the interleaved one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from flashinfer.core.arch import Arch
from flashinfer.ops.page import PageTable
from flashinfer.ops.rope.spec import Angle, RopeSpec, Rotation, Side

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def request_positions(indptr: torch.Tensor, offsets: torch.Tensor, nnz: int) -> torch.Tensor:
    """int64 `[nnz]`: token j of request i stands at `offsets[i] + j`; tokens past `indptr[-1]` get 0 (no rotation)."""
    token = torch.arange(nnz, device=indptr.device)
    if offsets.numel() == 0:
        return torch.zeros_like(token)
    request = torch.searchsorted(indptr[1:], token, right=True)
    inside = request < offsets.numel()
    request = request.clamp(max=offsets.numel() - 1)
    return torch.where(inside, offsets[request] + token - indptr[request], 0)


def cos_sin(angle: Angle, nnz: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 cosines and sines `[nnz, 1, rotary_dim / 2]`."""
    positions = angle.positions
    if angle.offsets is not None:
        positions = request_positions(positions, angle.offsets, nnz)
    if angle.table.dim() == 2:
        cos, sin = angle.table[positions].chunk(2, dim=-1)
    else:
        radians = (positions.long()[:, None] * angle.table).double() * (2 * math.pi / 2.0**64)
        cos, sin = radians.cos().float(), radians.sin().float()
    return cos[:, None], sin[:, None]


def _encoded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `x` in `dtype`; fp8 saturates, NaN stays."""
    if dtype not in FP8_DTYPES:
        return x.to(dtype)
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def _slots(table: PageTable, page_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, pages, slots) of the tokens to write; a skipped token is replaced by one that is not.

    If all are skipped, every row is -1. So no row is left out, which would need their number on the host.
    """
    keep = table.batch_indices >= 0
    row = torch.where(keep, torch.arange(keep.numel(), device=keep.device), keep.int().argmax())
    request, position = table.batch_indices[row].clamp(min=0), table.positions[row]
    kept = keep[row]
    entry = torch.where(kept, table.kv_indptr[request] + position // page_size, 0)
    return torch.where(kept, row, -1), table.kv_indices[entry], position % page_size


def _write(target: torch.Tensor, columns: slice, value: torch.Tensor, table: PageTable | None) -> None:
    """Write fp32 `value` `[nnz, num_heads, dim]` to columns of the target, through the page table if there is one."""
    new = _encoded(value, target.dtype)
    if table is None:
        target[..., columns].copy_(new)
        return
    row, page, slot = _slots(table, target.shape[1])
    # fp8 tensors cannot be indexed on every device; their bytes can.
    bits = target.view(torch.uint8) if target.dtype in FP8_DTYPES else target
    new = new.view(torch.uint8) if target.dtype in FP8_DTYPES else new
    old = bits[page, slot][..., columns]
    bits[..., columns][page, slot] = torch.where((row >= 0)[:, None, None], new[row.clamp(min=0)], old)


def _pairs(rotary_dim: int, interleave: bool) -> tuple[slice, slice]:
    """The columns of the first and of the second component of each pair."""
    half = rotary_dim // 2
    if interleave:
        return slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    return slice(0, half), slice(half, rotary_dim)


def _rotate(
    side: Side, turn: tuple[torch.Tensor, torch.Tensor], spec: RopeSpec, rotation: Rotation, is_q: bool
) -> None:
    """Rotate and copy one side."""
    first, second = _pairs(spec.rotary_dim, spec.interleave)
    source = side.rope.source.float()
    rest = None if side.rest is None else side.rest.source.float()
    if rotation.weights is not None:
        weight = (rotation.weights.q if is_q else rotation.weights.k).float()
        parts = [source[..., : spec.rotary_dim]] + ([] if rest is None else [rest])
        head = torch.cat(parts, dim=-1)
        head = head * torch.rsqrt(head.square().mean(dim=-1, keepdim=True) + rotation.weights.eps) * weight
        source, rest = head[..., : spec.rotary_dim], None if rest is None else head[..., spec.rotary_dim :]
    cos, sin = turn
    a, b = source[..., first], source[..., second]
    new_a, new_b = a * cos - b * sin, b * cos + a * sin
    table = None if is_q else rotation.table
    _write(side.rope.target, first, new_a * side.scale, table)
    _write(side.rope.target, second, new_b * side.scale, table)
    if side.rest is not None and rest is not None:
        _write(side.rest.target, slice(None), rest * side.scale, table)


def bind(spec: RopeSpec, arch: Arch) -> Callable[[Rotation], None]:
    """The call for one kind of rotation."""
    return partial(rotate, spec)


@torch.no_grad()
def rotate(spec: RopeSpec, rotation: Rotation) -> None:
    """Rotate q and k, copy what is not rotated, write every target."""
    turn = cos_sin(rotation.angle, rotation.q.rope.source.shape[0])
    _rotate(rotation.q, turn, spec, rotation, is_q=True)
    _rotate(rotation.k, turn, spec, rotation, is_q=False)
    if rotation.v is not None:
        _write(rotation.v.target, slice(None), rotation.v.source.float() * rotation.k.scale, rotation.table)
