"""Launch of the merge kernel: one, no host sync."""

from __future__ import annotations

import torch
import triton

from flashinfer.core.launch import Prebound, alignment, integer_classes
from flashinfer.ops.merge.triton.kernel import State, StateView, merge_config, merge_kernel

_launch = Prebound(merge_kernel)


def _view(state: State) -> StateView:
    v, s = state
    return StateView(v, s, v.stride(0), v.stride(1), 0, s.stride(0), s.stride(1), 0)


def merge_pair(a: State, b: State, out: State, mask: torch.Tensor | None) -> None:
    """out = a ⊕ b where mask; with a mask, `out` is `a`."""
    keep = None if mask is None else mask.contiguous().view(torch.uint8)
    _merge(_view(a), _view(b), _view(out), keep, 1)


def merge_many(v: torch.Tensor, s: torch.Tensor, out: State) -> None:
    """out = the ⊕ of dimension 1."""
    states = StateView(v, s, v.stride(0), v.stride(2), v.stride(1), s.stride(0), s.stride(2), s.stride(1))
    _merge(None, states, _view(out), None, v.shape[1])


def _merge(
    first: StateView | None, rest: StateView, out: StateView, keep: torch.Tensor | None, num_states: int
) -> None:
    n, num_heads, head_dim = out.v.shape
    num_rows = n * num_heads
    if num_rows == 0:
        return
    cfg = merge_config(head_dim, many=first is None)
    views = [view for view in (first, rest, out) if view is not None]
    strides = [n for view in views for n in view[2:]]
    key = (
        (cfg, out.v.dtype, keep is None, num_rows >= 2**31),
        integer_classes((num_heads, *strides)),
        alignment(keep, *(x for view in views for x in view[:2])),
    )
    _launch(
        (triton.cdiv(num_rows, cfg.rows), 1, 1),
        key,
        (first, rest, out, keep, num_rows, num_states, num_heads, cfg),
        out.v.device,
        num_warps=cfg.num_warps,
    )
