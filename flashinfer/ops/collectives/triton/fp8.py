"""All-reduce of what is sent as fp8: half the bytes of half precision cross the links."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from flashinfer.device.decode import decode_fp8
from flashinfer.device.fp8 import to_fp8
from flashinfer.device.mailbox import greet, marks, receive, sendable, turns, used

# The largest number of a group counts as this at least, so that no scale is zero.
TINY = tl.constexpr(2.0**-100)


@dataclass(frozen=True)
class Fp8Config:
    """What a compiled form depends on.

    cols: elements of a row, a power of two. group: elements of a scale. cut: whether the last row may end early.
    """

    world_size: int
    cols: int
    group: int
    cut: bool
    native_fp8: bool


@triton.jit
def _encode(x, cfg: tl.constexpr):
    """(codes, scales `[groups]`) of fp32 `x [groups, group]`: e4m3, the largest of a group is the largest code."""
    largest = tl.max(tl.where(x == x, tl.abs(x), 0.0), 1)
    scale = tl.maximum(largest, TINY) / 448.0
    return sendable(to_fp8(x / scale[:, None], 3, cfg.native_fp8)), scale


@triton.jit
def _decode(code, scale, cfg: tl.constexpr):
    if cfg.native_fp8:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        value = decode_fp8(code, 3)
    return value * scale[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def reduce_fp8_kernel(out, input, codes, scales, greeting, num_rows, num_elements, cfg: tl.constexpr):
    """Grid: one program that greets, then at most one a row of `cfg.cols`; `num_elements` in all.

    codes, scales: mailboxes of bytes and of fp32. As in two shots of `reduce_kernel`, row i goes to rank i % W, which
    adds it up and sends the sum, here rounded to fp8 twice; all ranks, that one included, take the rounded sum.
    """
    W: tl.constexpr = cfg.world_size
    GROUPS: tl.constexpr = cfg.cols // cfg.group
    program, num_programs = tl.program_id(0) - 1, tl.num_programs(0) - 1
    if program < 0:
        greet(codes, greeting, W)
    else:
        group = tl.arange(0, GROUPS)
        cols = group[:, None] * cfg.group + tl.arange(0, cfg.group)[None, :]
        inside = group < GROUPS
        for row in range(program, num_rows, num_programs):
            offs = tl.cast(row, tl.int64) * cfg.cols + cols
            mask = cols < cfg.cols
            if cfg.cut:
                mask &= offs < num_elements
            code, scale = _encode(tl.load(input + offs, mask=mask, other=0.0).to(tl.float32), cfg)
            use, now, before = turns(codes, row)
            scale_use, scale_now, scale_before = turns(scales, row)
            owner, first = row % W, tl.cast(row // W, tl.int64) * (2 * W)
            if owner == codes.rank:
                total = tl.zeros(cols.shape, tl.float32)
                for rank in tl.static_range(W):
                    place, scale_place = (first + rank) * cfg.cols + cols, (first + rank) * GROUPS + group
                    if rank == codes.rank:
                        total += _decode(code, scale, cfg)
                    else:
                        part = receive(codes, now + place, mask, rank, row)
                        total += _decode(part, receive(scales, scale_now + scale_place, inside, rank, row), cfg)
                    tl.store(codes.own + before + place, marks(cols.shape, tl.uint8), mask=cols < cfg.cols)
                    tl.store(scales.own + scale_before + scale_place, marks((GROUPS,), tl.float32), mask=inside)
                code, scale = _encode(total, cfg)
                place, scale_place = (first + W + owner) * cfg.cols + cols, (first + W + owner) * GROUPS + group
                for rank in tl.static_range(W):
                    if rank != codes.rank:
                        tl.store(codes.peers[rank] + now + place, code, mask=mask)
                        tl.store(scales.peers[rank] + scale_now + scale_place, scale, mask=inside)
            else:
                place, scale_place = (first + codes.rank) * cfg.cols + cols, (first + codes.rank) * GROUPS + group
                for rank in tl.static_range(W):
                    if rank == owner:
                        tl.store(codes.peers[rank] + now + place, code, mask=mask)
                        tl.store(scales.peers[rank] + scale_now + scale_place, scale, mask=inside)
                place, scale_place = (first + W + owner) * cfg.cols + cols, (first + W + owner) * GROUPS + group
                code = receive(codes, now + place, mask, owner, row)
                scale = receive(scales, scale_now + scale_place, inside, owner, row)
                tl.store(codes.own + before + place, marks(cols.shape, tl.uint8), mask=cols < cfg.cols)
                tl.store(scales.own + scale_before + scale_place, marks((GROUPS,), tl.float32), mask=inside)
            tl.store(out + offs, _decode(code, scale, cfg).to(out.dtype.element_ty), mask=mask)
            used(codes, row, use)
            used(scales, row, scale_use)
