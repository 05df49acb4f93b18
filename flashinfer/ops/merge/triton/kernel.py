"""The merge kernel: one program takes a few rows (token, head) and folds their states in index order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

State = tuple[torch.Tensor, torch.Tensor]
ROWS = 8


class StateView(NamedTuple):
    """v `[n, heads, dim]` and lse `[n, heads]`, strides in elements; `step`: from one state of a row to the next."""

    v: torch.Tensor
    s: torch.Tensor
    v_row: int
    v_head: int
    v_step: int
    s_row: int
    s_head: int
    s_step: int


@triton.jit
def _fold(state, view, offs_n, offs_head, offs_dim, index, mask_row, mask):
    """(m, l, acc) with state `index` of the view added; a side with lse -inf is dropped, whatever it holds."""
    m_i, l_i, acc = state
    s = tl.load(view.s + offs_n * view.s_row + offs_head * view.s_head + index * view.s_step, mask=mask_row, other=0.0)
    pointers = view.v + offs_n * view.v_row + offs_head * view.v_head + index * view.v_step
    v = tl.load(pointers[:, None] + offs_dim[None, :], mask=mask & (s != float("-inf"))[:, None], other=0.0)
    m_new = tl.maximum(m_i, s)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.math.exp2(m_i - shift)
    weight = tl.math.exp2(s - shift)
    acc = acc * alpha[:, None] + v.to(tl.float32) * weight[:, None]
    return m_new, l_i * alpha + weight, acc


@triton.jit(do_not_specialize=["num_rows", "num_states"])
def merge_kernel(
    first,
    rest,
    out,
    keep,
    num_rows,
    num_states,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid: rows / ROWS. first, rest, out: StateView; `rest` has num_states states a row; keep: mask `[n]` or None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_n = row // num_heads
    offs_head = row % num_heads
    offs_dim = tl.arange(0, BLOCK)
    mask_row = row < num_rows
    if keep is not None:
        # Rows that stay as they are: `out` is `first` there, nothing is written.
        mask_row = mask_row & (tl.load(keep + offs_n, mask=mask_row, other=0) != 0)
    mask = mask_row[:, None] & (offs_dim < HEAD_DIM)[None, :]
    state = (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.full([ROWS], 0.0, tl.float32),
        tl.full([ROWS, BLOCK], 0.0, tl.float32),
    )
    if first is not None:
        state = _fold(state, first, offs_n, offs_head, offs_dim, 0, mask_row, mask)
    for index in range(num_states):
        state = _fold(state, rest, offs_n, offs_head, offs_dim, index, mask_row, mask)
    m_i, l_i, acc = state
    value = acc * tl.where(l_i == 0, 0.0, 1.0 / l_i)[:, None]
    pointers = out.v + offs_n * out.v_row + offs_head * out.v_head
    tl.store(pointers[:, None] + offs_dim[None, :], value.to(out.v.dtype.element_ty), mask=mask)
    lse = tl.where(l_i == 0, float("-inf"), m_i + tl.math.log2(l_i))
    tl.store(out.s + offs_n * out.s_row + offs_head * out.s_head, lse, mask=mask_row)


def _view(state: State) -> StateView:
    v, s = state
    return StateView(v, s, v.stride(0), v.stride(1), 0, s.stride(0), s.stride(1), 0)


def merge_pair(a: State, b: State, out: State, mask: torch.Tensor | None) -> None:
    """out = a ⊕ b where mask; with a mask, `out` is `a`."""
    keep = None if mask is None else mask.view(torch.uint8)
    _launch(_view(a), _view(b), _view(out), keep, 1, a[0].shape)


def merge_many(v: torch.Tensor, s: torch.Tensor, out: State) -> None:
    """out = the ⊕ of dimension 1."""
    states = StateView(v, s, v.stride(0), v.stride(2), v.stride(1), s.stride(0), s.stride(2), s.stride(1))
    _launch(None, states, _view(out), None, v.shape[1], out[0].shape)


def _launch(
    first: StateView | None,
    rest: StateView,
    out: StateView,
    keep: torch.Tensor | None,
    num_states: int,
    shape: torch.Size,
) -> None:
    n, num_heads, head_dim = shape
    num_rows = n * num_heads
    if num_rows == 0:
        return
    block = max(16, triton.next_power_of_2(head_dim))
    with torch.cuda.device_of(out.v):
        merge_kernel[(triton.cdiv(num_rows, ROWS),)](
            first, rest, out, keep, num_rows, num_states, num_heads, HEAD_DIM=head_dim, BLOCK=block, ROWS=ROWS
        )
