"""All-gather and reduce-scatter of rows."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from flashinfer.device.mailbox import greet, marks, receive, receive_sum, sendable, turns, used


@dataclass(frozen=True)
class ShareConfig:
    """What a compiled form depends on. cols: elements of a row, block: rounded up to 2^n.

    cut: whether the last row may end early. scatters: the rows of all ranks are added up, each rank gets its part,
    instead of each rank getting all rows.
    """

    world_size: int
    cols: int
    block: int
    cut: bool
    scatters: bool


@triton.jit(do_not_specialize=["num_rows"])
def share_kernel(out, input, box, greeting, num_rows, num_elements, part, cfg: tl.constexpr):
    """Grid: one program that greets, then at most one a row.

    Of one rank's part this launch takes `num_elements`, as `num_rows` rows. input: one part, or with `scatters` one for
    each rank, `part` elements apart; out: the other way round. A place: the row of each rank.
    """
    W: tl.constexpr = cfg.world_size
    program, num_programs = tl.program_id(0) - 1, tl.num_programs(0) - 1
    part = tl.cast(part, tl.int64)
    if program < 0:
        greet(box, greeting, W)
    else:
        cols = tl.arange(0, cfg.block)
        for row in range(program, num_rows, num_programs):
            offs = tl.cast(row, tl.int64) * cfg.cols + cols
            mask = cols < cfg.cols
            if cfg.cut:
                mask &= offs < num_elements
            use, now, before = turns(box, row)
            place = tl.cast(row, tl.int64) * W * cfg.cols + cols
            own = part * box.rank if cfg.scatters else part * 0
            mine = tl.load(input + own + offs, mask=mask, other=0.0)
            for rank in tl.static_range(W):
                if rank != box.rank:
                    x = tl.load(input + part * rank + offs, mask=mask, other=0.0) if cfg.scatters else mine
                    tl.store(box.peers[rank] + now + place + box.rank * cfg.cols, sendable(x), mask=mask)
            if cfg.scatters:
                total = receive_sum(box, now + place, mask, cfg.cols, mine, row, W)
                tl.store(out + offs, total.to(out.dtype.element_ty), mask=mask)
            else:
                tl.store(out + part * box.rank + offs, mine, mask=mask)
                for rank in tl.static_range(W):
                    if rank != box.rank:
                        x = receive(box, now + place + rank * cfg.cols, mask, rank, row)
                        tl.store(out + part * rank + offs, x, mask=mask)
            for rank in tl.static_range(W):
                tl.store(
                    box.own + before + place + rank * cfg.cols, marks(mine.shape, mine.dtype), mask=cols < cfg.cols
                )
            used(box, row, use)
