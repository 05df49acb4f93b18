"""The end of a query tile: merging the states of programs that shared it, and writing it out."""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.ops.attention.device.factors import LOG2_E


@triton.jit
def owner(place, floor, extra):
    """The program whose share holds `place`; twin of `plan.owner`."""
    larger = extra * (floor + 1)
    return tl.where(place < larger, place // (floor + 1), extra + (place - larger) // tl.maximum(floor, 1)).to(tl.int32)


@triton.jit
def finish(outputs, factors, m_i, l_i, acc, row, qo_head, mask_row, cfg: tl.constexpr):
    """Write a complete state: out = acc / l * output scale, lse = m + log2(l); m in base-2 units."""
    if factors.sinks is not None:
        sink = tl.load(factors.sinks + qo_head, mask=mask_row, other=0.0) * LOG2_E
        m_new = tl.maximum(m_i, sink)
        # -inf where the row saw nothing and the sink is none.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.math.exp2(m_i - shift)
        l_i = l_i * alpha + tl.math.exp2(sink - shift)
        acc = acc * alpha[:, None]
        m_i = m_new
    # l = 0 only where a row saw nothing: its output is 0 and its lse -inf; NaN stays NaN.
    factor = tl.where(l_i == 0, 0.0, factors.output_scale / l_i)
    if factors.output is not None:
        factor = factor * tl.load(factors.output + qo_head * factors.output_stride, mask=mask_row, other=0.0)
    offs_vo = tl.arange(0, cfg.block_vo)
    offs_out = row.to(tl.int64) * outputs.stride_row + qo_head.to(tl.int64) * outputs.stride_head
    mask = mask_row[:, None] & (offs_vo < cfg.head_dim_vo)[None, :]
    value = (acc * factor[:, None]).to(outputs.data.dtype.element_ty)
    tl.store(outputs.data + offs_out[:, None] + offs_vo[None, :], value, mask=mask)
    if outputs.lse is not None:
        lse = tl.where(l_i == 0, float("-inf"), m_i + tl.math.log2(l_i))
        tl.store(outputs.lse + row.to(tl.int64) * outputs.lse_stride + qo_head, lse, mask=mask_row)


@triton.jit
def merge_tile(outputs, factors, partials, begin_owner, last_owner, left, place, cfg: tl.constexpr):
    """Merge the states of programs begin_owner..last_owner in this order, and write the tile.

    The tile begins in begin_owner's second slot and goes on in the first slots of the others. left: packed rows of the
    tile that exist. place: (first query row of the request, packed row of the tile in the request, KV head).
    """
    ROWS: tl.constexpr = cfg.merge_rows if cfg.merge_rows < 32 else 32
    BLOCK: tl.constexpr = 32 // ROWS
    q_begin, base, kv_head = place
    offs_vo = tl.arange(0, cfg.block_vo)
    for begin in tl.range(0, cfg.merge_rows, ROWS, num_stages=1):
        offs_m = begin + tl.arange(0, ROWS)
        m_i = tl.full([ROWS], float("-inf"), tl.float32)
        l_i = tl.full([ROWS], 0.0, tl.float32)
        acc = tl.full([ROWS, cfg.block_vo], 0.0, tl.float32)
        for program in tl.range(begin_owner, last_owner + 1, BLOCK, num_stages=1):
            flat = tl.arange(0, BLOCK * ROWS)
            index = program + flat // ROWS
            offs_slot = (2 * index + tl.where(index == begin_owner, 1, 0)) * cfg.block_m + begin + flat % ROWS
            mask = (index <= last_owner) & (begin + flat % ROWS < left)
            # .cg: other programs wrote these; this one's L1 may hold older lines.
            lse = tl.load(partials.lse + offs_slot, mask=mask, other=float("-inf"), cache_modifier=".cg")
            pointers = partials.o + offs_slot[:, None] * cfg.block_vo + offs_vo[None, :]
            o = tl.load(pointers, mask=mask[:, None], other=0.0, cache_modifier=".cg")
            lse = tl.reshape(lse, [BLOCK, ROWS])
            o = tl.reshape(o, [BLOCK, ROWS, cfg.block_vo])
            m_new = tl.maximum(m_i, tl.max(lse, 0))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight = tl.math.exp2(lse - shift[None, :])
            alpha = tl.math.exp2(m_i - shift)
            l_i = l_i * alpha + tl.sum(weight, 0)
            acc = acc * alpha[:, None] + tl.sum(o * weight[:, :, None], 0)
            m_i = m_new
        packed = base + offs_m
        finish(
            outputs,
            factors,
            m_i,
            l_i,
            acc,
            q_begin + packed // cfg.group,
            kv_head * cfg.group + packed % cfg.group,
            offs_m < left,
            cfg,
        )
