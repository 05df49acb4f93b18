"""The ⊕ of attention states in torch: the meaning of the op."""

from __future__ import annotations

import math

import torch

State = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def merge_pair(a: State, b: State, out: State, mask: torch.Tensor | None) -> None:
    """out = a ⊕ b where mask; see `flashinfer.ops.merge`."""
    v, s = _merged(torch.stack([a[0], b[0]], 1), torch.stack([a[1], b[1]], 1))
    if mask is not None:
        keep = mask.to(torch.bool)
        v = torch.where(keep[:, None, None], v, a[0].to(v.dtype))
        s = torch.where(keep[:, None], s, a[1])
    out[0].copy_(v)
    out[1].copy_(s)


@torch.no_grad()
def merge_many(v: torch.Tensor, s: torch.Tensor, out: State) -> None:
    """out = the ⊕ of dimension 1; see `flashinfer.ops.merge`."""
    merged, total = _merged(v, s)
    out[0].copy_(merged)
    out[1].copy_(total)


def _merged(v: torch.Tensor, s: torch.Tensor) -> State:
    """fp32 (v, s) over dimension 1; weights relative to the largest lse, 0 where a side is empty."""
    if v.shape[1] == 0:
        empty = v.new_zeros((v.shape[0], *v.shape[2:]), dtype=torch.float32)
        return empty, torch.full_like(empty[..., 0], -math.inf)
    highest = s.amax(1, keepdim=True)
    weights = torch.exp2(s - torch.where(highest == -math.inf, torch.zeros_like(highest), highest))
    total = weights.sum(1)
    # An empty side may hold anything, NaN included: it is dropped, not multiplied by 0.
    parts = torch.where((weights > 0)[..., None], v.to(torch.float32) * weights[..., None], 0.0)
    nonzero = torch.where(total == 0, torch.ones_like(total), total)
    return parts.sum(1) / nonzero[..., None], highest.squeeze(1) + torch.log2(total)
