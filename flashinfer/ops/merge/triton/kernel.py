"""The merge kernel: one program takes a few rows (token, head) and folds their states in index order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

State = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class MergeConfig:
    """A program of `num_warps` takes `rows` rows and `states` states at a time; block: head_dim rounded up to 2^n."""

    head_dim: int
    block: int
    rows: int
    states: int
    num_warps: int


def merge_config(head_dim: int, many: bool) -> MergeConfig:
    """Many states are summed 32 at a time: in a tree, whose rounding grows with its depth only."""
    rows, states, num_warps = (1, 32, 8) if many else (4, 1, 4)
    return MergeConfig(head_dim, max(16, triton.next_power_of_2(head_dim)), rows, states, num_warps)


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
def _fold(state, view, offs_n, offs_head, offs_dim, index, mask_row, mask_state, DIM: tl.constexpr):
    """(m, l, acc) with the states `index` of the view added; one with lse -inf is dropped, whatever it holds."""
    m_i, l_i, acc = state
    mask = mask_row[:, None] & mask_state[None, :]
    index = index.to(tl.int64)  # states may lie far apart
    offs_s = (offs_n * view.s_row + offs_head * view.s_head)[:, None] + index[None, :] * view.s_step
    s = tl.load(view.s + offs_s, mask=mask, other=float("-inf"))
    offs_v = (offs_n * view.v_row + offs_head * view.v_head)[:, None] + index[None, :] * view.v_step
    present = mask & (s != float("-inf"))
    pointers = view.v + offs_v[:, :, None] + offs_dim[None, None, :]
    v = tl.load(pointers, mask=present[:, :, None] & (offs_dim < DIM)[None, None, :], other=0.0).to(tl.float32)
    m_new = tl.maximum(m_i, tl.max(s, 1))
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.math.exp2(m_i - shift)
    weight = tl.math.exp2(s - shift[:, None])
    acc = acc * alpha[:, None] + tl.sum(v * weight[:, :, None], 1)
    return m_new, l_i * alpha + tl.sum(weight, 1), acc


@triton.jit(do_not_specialize=["num_rows", "num_states"])
def merge_kernel(first, rest, out, keep, num_rows, num_states, num_heads, cfg: tl.constexpr):
    """Grid: rows / cfg.rows. first, rest, out: StateView; rest: num_states states a row; keep: mask `[n]` or None."""
    row = tl.program_id(0).to(tl.int64) * cfg.rows + tl.arange(0, cfg.rows)
    offs_n = row // num_heads
    offs_head = row % num_heads
    offs_dim = tl.arange(0, cfg.block)
    mask_row = row < num_rows
    if keep is not None:
        # Rows that stay as they are: `out` is `first` there, nothing is written.
        mask_row = mask_row & (tl.load(keep + offs_n, mask=mask_row, other=0) != 0)
    state = (
        tl.full([cfg.rows], float("-inf"), tl.float32),
        tl.full([cfg.rows], 0.0, tl.float32),
        tl.full([cfg.rows, cfg.block], 0.0, tl.float32),
    )
    offs_state = tl.arange(0, cfg.states)
    if first is not None:
        state = _fold(state, first, offs_n, offs_head, offs_dim, offs_state, mask_row, offs_state < 1, cfg.head_dim)
    for begin in range(0, num_states, cfg.states):
        index = begin + offs_state
        state = _fold(state, rest, offs_n, offs_head, offs_dim, index, mask_row, index < num_states, cfg.head_dim)
    m_i, l_i, acc = state
    value = tl.div_rn(acc, tl.broadcast_to(tl.where(l_i == 0, 1.0, l_i)[:, None], acc.shape))
    pointers = out.v + (offs_n * out.v_row + offs_head * out.v_head)[:, None] + offs_dim[None, :]
    mask = mask_row[:, None] & (offs_dim < cfg.head_dim)[None, :]
    tl.store(pointers, value.to(out.v.dtype.element_ty), mask=mask)
    lse = tl.where(l_i == 0, float("-inf"), m_i + tl.math.log2(l_i))
    tl.store(out.s + offs_n * out.s_row + offs_head * out.s_head, lse, mask=mask_row)
