"""Launches of softmax: by several programs a row twice over, or of many rows in one read."""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton

from flashinfer.core.arch import arch_of
from flashinfer.core.launch import Prebound, alignment
from flashinfer.core.scratch import Scratch
from flashinfer.ops.sampling.spec import Parameter
from flashinfer.ops.sampling.triton.launch import REGISTERS, kinds_of, pointer_and_value, splits_of
from flashinfer.ops.sampling.triton.rows import VECTOR_BYTES
from flashinfer.ops.sampling.triton.softmax import (
    clear_kernel,
    softmax_held_kernel,
    softmax_state_kernel,
    softmax_write_kernel,
)

SOFTMAX_TILE = 4096
# Of many rows: the most that a program holds of one (two of them at a time, 64 of 128 registers), how many programs a
# multiprocessor has, and how often one looks whether the others' sums are there, some 50 us in all.
SOFTMAX_PART = 8192
SOFTMAX_WARPS = 8
SOFTMAX_PROGRAMS = 2
SOFTMAX_POLLS = 64
# So that several rows are held on a GPU at a time.
SOFTMAX_MOST_PARTS = 64
CLEAR = 1024

_clear = Prebound(clear_kernel)
_softmax_held = Prebound(softmax_held_kernel)
_softmax_state = Prebound(softmax_state_kernel)
_softmax_write = Prebound(softmax_write_kernel)


def softmax(out: torch.Tensor, logits: torch.Tensor, temperature: Parameter, buffer: torch.Tensor | None) -> int:
    """fp32 softmax; in one read once there are rows enough for every multiprocessor."""
    num_rows, vocab_size = logits.shape
    scratch = Scratch(logits, buffer)
    pointer, value = pointer_and_value(temperature, 1.0)
    key = (logits.dtype, logits.stride(0), vocab_size, kinds_of(pointer), alignment(logits, pointer))  # type: ignore
    sizes = (pointer, value, logits.stride(0), vocab_size)
    num_sms = arch_of(logits.device).num_sms
    if num_rows >= num_sms and vocab_size <= SOFTMAX_MOST_PARTS * SOFTMAX_PART:
        _softmax_by_parts(out, logits, sizes, key, scratch)
        return scratch.needed
    tiles = triton.cdiv(vocab_size, SOFTMAX_TILE)
    splits, per_split = splits_of(num_rows, tiles, 4 * num_sms)
    state = scratch.empty((num_rows, splits, 2), torch.float32)
    arguments = (logits, state, *sizes, splits, per_split, SOFTMAX_TILE)
    _softmax_state((num_rows * splits, 1, 1), key, arguments, logits.device, num_warps=8)
    block = triton.next_power_of_2(splits)
    arguments = (logits, out, state, *sizes, splits, tiles, block, SOFTMAX_TILE)
    _softmax_write((num_rows * tiles, 1, 1), (key, block), arguments, logits.device, num_warps=8)
    return scratch.needed


def parts_of(vocab_size: int) -> tuple[int, int]:
    """(parts of a row, numbers of a part): as even as 16-byte loads allow."""
    parts = triton.cdiv(vocab_size, SOFTMAX_PART)
    return parts, triton.cdiv(triton.cdiv(vocab_size, parts), VECTOR_BYTES) * VECTOR_BYTES


def _softmax_by_parts(
    out: torch.Tensor,
    logits: torch.Tensor,
    sizes: tuple[object, ...],
    key: Hashable,
    scratch: Scratch,
) -> None:
    """Many rows, in one read."""
    num_rows, vocab_size = logits.shape
    parts, part_size = parts_of(vocab_size)
    rows_at_once = min(num_rows, max(1, SOFTMAX_PROGRAMS * arch_of(logits.device).num_sms // parts))
    state = scratch.empty((num_rows, parts, 2), torch.float32)
    arrived = scratch.empty((num_rows,), torch.int32)
    _clear((triton.cdiv(num_rows, CLEAR), 1, 1), alignment(arrived), (arrived, num_rows, CLEAR), logits.device)
    # The interpreter runs one program after the other: nobody comes while one looks.
    polls = 0 if logits.is_cpu else SOFTMAX_POLLS
    blocks = (triton.next_power_of_2(parts), triton.next_power_of_2(part_size), polls)
    arguments = (logits, out, state, arrived, *sizes, num_rows, parts, part_size, *blocks)
    grid = (rows_at_once * parts, 1, 1)
    _softmax_held(grid, (key, blocks), arguments, logits.device, num_warps=SOFTMAX_WARPS, **REGISTERS)
