"""Prefill on Hopper: one producer warp, consumer warpgroups of 64 queries each, asynchronous products.

While the tensor cores multiply S_j = Q K_j^T and O += P_{j-1} V_{j-1}, another warpgroup computes exponentials
(FlashAttention-3: Shah et al., arXiv 2407.08608). Tiles go from the last to the first, so that those at the diagonal
and at the end of the keys, which need masks, come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flashinfer.device.channels import FIRST_BARRIER, Ring, Turns
from flashinfer.device.gluon import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    partition_barrier,
    reinterpret,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashinfer.ops.attention.device.arguments import LOG2_E, add_sink
from flashinfer.ops.attention.device.hooks import exponent_factor, fold_bounds
from flashinfer.ops.attention.gluon_sm90.producer import BOX_COLUMNS, producer, producer_warps, rounds, work_item
from flashinfer.ops.attention.gluon_sm90.softmax import LOWEST, online, row_sums, transformed

# Consumer warpgroups.
GROUPS = gl.constexpr(2)
# 65,536 registers among 4 warpgroups of up to MAX_REGISTERS a thread: what each warp starts with; the roles then trade.
MAX_REGISTERS = 168


@dataclass(frozen=True)
class GluonConfig:
    """Everything the kernel is compiled for, besides dtypes and the variant's functions.

    rows: queries of a warpgroup. stages: K tiles, and V tiles, in flight; q_stages: work items whose queries are. box:
    tokens of a TMA box, 0 where threads copy K and V token by token. page_size: 0 if ragged. head_block: query heads
    worked on side by side (they share K and V in the L2 cache). share_out: the output leaves through the memory of the
    queries. natural_logits, masks_have_bounds: as in the Triton kernel. turns: whether warpgroups take turns at the
    tensor cores. fixed_maximum: weights are relative to a logit of 0, not to each row's maximum.
    """

    head_dim: int
    rows: int
    block_n: int
    stages: int
    q_stages: int
    box: int
    page_size: int
    head_block: int
    persistent: bool
    share_out: bool
    natural_logits: bool
    masks_have_bounds: bool
    turns: bool
    fixed_maximum: bool


class Tiles(NamedTuple):
    """The work: `tiles` int32 `[capacity, 8]`, records of `plan.py` in working order; num_tiles: int32 `[1]`."""

    tiles: torch.Tensor
    num_tiles: torch.Tensor


class Heads(NamedTuple):
    """num_qo_heads, and query heads a KV head."""

    num_heads: int
    group: int


@jit
def _zero_tail(values, n, rest, cfg: gl.constexpr):
    """V rows of the last tile from token `rest` on may hold anything, and 0 * NaN is NaN.

    Boxes wholly past the end were filled with zeros: only the one in which the request ends is left to do.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    BOXES: gl.constexpr = cfg.block_n // cfg.box
    HALVES: gl.constexpr = cfg.head_dim // BOX_COLUMNS
    for h in gl.static_range(HALVES):
        box = values.box(n, h * BOXES + rest // cfg.box).reshape([cfg.box, BOX_COLUMNS])
        x = box.load(LAYOUT)
        row = gl.arange(0, cfg.box, gl.SliceLayout(1, LAYOUT))
        box.store(gl.where((row < rest % cfg.box)[:, None], x, gl.full([cfg.box, BOX_COLUMNS], 0.0, x.dtype, LAYOUT)))
    fence_async_shared()
    partition_barrier()


@jit
def _step(q, state, channels, n, end, item, begin, hooks, scale, turns, MASK: gl.constexpr, cfg: gl.constexpr,
          SL: gl.constexpr, OL: gl.constexpr, PL: gl.constexpr):  # fmt: skip
    """One KV tile: its products run beside those of the tile before with V, its softmax beside the latter."""
    p, acc, m_i, l_i = state
    _, keys, values = channels
    zero = gl.full([cfg.rows, cfg.block_n], 0.0, gl.float32, SL)
    if cfg.turns:
        turns.take()
    s = warpgroup_mma(q, keys.part(n, 0).permute((1, 0)), zero, use_acc=False, is_async=True)
    # P stays fp32 until here: converted earlier, its packing would delay the product above.
    weights = gl.convert_layout(p.to(q.dtype), PL)
    values.wait(n - 1)
    acc = warpgroup_mma(weights, values.part(n - 1, 0), acc, is_async=True)
    if cfg.turns:
        turns.give()
    s = warpgroup_mma_wait(1, deps=[s])
    keys.release(n)
    s = transformed(s, item, begin, hooks, scale, MASK, False, cfg, SL)
    p, m_i, alpha = online(s, m_i, hooks, scale, cfg)
    sums = row_sums(p, cfg.rows, cfg.block_n)
    # The wait for the next K tile stands here: a spin loop ends a basic block, which keeps ptxas from hoisting the wait
    # for P V above the exponentials.
    keys.wait(n + 1, n + 1 < end)
    acc = warpgroup_mma_wait(0, deps=[acc])
    values.release(n - 1)
    if cfg.fixed_maximum:
        l_i = l_i + sums
    else:
        l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + sums
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OL))[:, None]
    return p, acc, m_i, l_i


@jit
def _write(state, record, qo_head, output, o_desc, outputs, outlet, hooks, factors, scale, CID: gl.constexpr,
           cfg: gl.constexpr, OL: gl.constexpr):  # fmt: skip
    """out = acc / l * output scale, lse = m + log2(l) of one warpgroup's rows; m in units of its logits."""
    acc, m_i, l_i = state
    # Read again: kept, they would cost registers in the loop.
    q_lo = gl.load(record + 1) * (GROUPS * cfg.rows) + CID * cfg.rows
    q_row = gl.load(record + 6) + q_lo
    qo_len = gl.load(record + 7)
    m_i = m_i * exponent_factor(hooks.logits, scale, cfg.natural_logits)
    if factors.sinks is not None:
        if cfg.fixed_maximum:
            # The sink of a row that saw nothing is its maximum.
            m_i = gl.where(l_i == 0, LOWEST, m_i)
        m_i, l_i, acc = add_sink(m_i, l_i, acc, gl.load(factors.sinks + qo_head) * LOG2_E)
    # l = 0 only where a row saw nothing: its output is 0 and its lse -inf; NaN stays NaN.
    norm = gl.where(l_i == 0, 0.0, factors.output_scale / l_i)
    if factors.output is not None:
        norm = norm * gl.load(factors.output + qo_head * factors.output_stride)
    value = (acc * norm[:, None]).to(o_desc.dtype)
    offs_m = gl.arange(0, cfg.rows, gl.SliceLayout(1, OL))
    mask_row = q_lo + offs_m < qo_len
    row = (q_row + offs_m).to(gl.int64)
    if output.lse is not None:
        lse = gl.where(l_i == 0, float("-inf"), m_i + gl.log2(l_i))
        gl.store(output.lse + row * output.lse_stride + qo_head, lse, mask=mask_row)
    if q_lo + cfg.rows <= qo_len:
        outputs.part(outlet, CID).store(value)
        fence_async_shared()
        HALVES: gl.constexpr = cfg.head_dim // BOX_COLUMNS
        for h in gl.static_range(HALVES):
            tma_store(o_desc, [q_row, qo_head, h * BOX_COLUMNS], outputs.box(outlet, CID * HALVES + h))
    else:
        offs_d = gl.arange(0, cfg.head_dim, gl.SliceLayout(0, OL))
        offs = row[:, None] * output.stride_row + (qo_head * output.stride_head + offs_d)[None, :]
        gl.store(output.data + offs, value, mask=mask_row[:, None])


@jit
def _consumer(o_desc, channels, outputs, output, work, heads, hooks, factors, CID: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup: `rows` queries of each work item."""
    queries, keys, values = channels
    dtype: gl.constexpr = o_desc.dtype
    SL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, cfg.block_n, 16]
    )
    OL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, cfg.head_dim, 16]
    )
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2)
    turns = Turns(FIRST_BARRIER, CID, GROUPS)
    if cfg.turns:
        turns.begin()
    num_tiles = gl.load(work.num_tiles)
    done = 0
    for n in range(0, rounds(num_tiles, heads, cfg)):
        record, qo_head = work_item(work, num_tiles, n, cfg)
        request = gl.load(record)
        q_lo = gl.load(record + 1) * (GROUPS * cfg.rows) + CID * cfg.rows
        kv_tile = gl.load(record + 2)
        kv_tiles = gl.load(record + 3)
        kv_len = gl.load(record + 4)
        qo_len = gl.load(record + 7)
        item = (request, q_lo, qo_head, qo_len, kv_len)
        scale = factors.sm_scale
        if factors.logits is not None:
            scale = scale * gl.load(factors.logits + qo_head * factors.logits_stride)
        q_hi = gl.minimum(q_lo + cfg.rows, qo_len)
        _, _, full_lo, full_hi = fold_bounds(hooks.bounds, q_lo, q_hi, qo_len, kv_len, cfg.masks_have_bounds)
        last = kv_tile + kv_tiles - 1
        # Steps: the first one and those before `plain` need masks, those before `head` none, the rest again.
        plain = gl.minimum(gl.maximum(last + 1 - full_hi // cfg.block_n, 1), kv_tiles)
        if len(hooks.mask) == 0:
            # Nothing but the end of the keys, which lies in the first tile; the compiler drops the other masked loop.
            plain = 1
        head = gl.minimum(gl.maximum(last + 1 - (full_lo + cfg.block_n - 1) // cfg.block_n, plain), kv_tiles)
        # Where nothing bounds the keys from the left the compiler sees this, and drops the last loop.
        head = gl.where(full_lo == 0, kv_tiles, head)
        end = done + kv_tiles

        queries.wait(n)
        q = queries.part(n, CID)
        keys.wait(done)
        zero = gl.full([cfg.rows, cfg.block_n], 0.0, gl.float32, SL)
        m_i = gl.full([cfg.rows], 0.0 if cfg.fixed_maximum else LOWEST, gl.float32, gl.SliceLayout(1, SL))
        if cfg.turns:
            turns.take()
        s = warpgroup_mma(q, keys.part(done, 0).permute((1, 0)), zero, use_acc=False, is_async=True)
        if cfg.turns:
            turns.give()
        s = warpgroup_mma_wait(0, deps=[s])
        keys.release(done)
        s = transformed(s, item, last * cfg.block_n, hooks, scale, True, True, cfg, SL)
        p, m_i, _ = online(s, m_i, hooks, scale, cfg)
        l_i = row_sums(p, cfg.rows, cfg.block_n)
        acc = gl.full([cfg.rows, cfg.head_dim], 0.0, gl.float32, OL)
        if cfg.box > 0:
            rest = kv_len - last * cfg.block_n
            if (rest < cfg.block_n) & (rest % cfg.box != 0):
                values.wait(done)
                _zero_tail(values, done, rest, cfg)
        keys.wait(done + 1, kv_tiles > 1)
        state = (p, acc, m_i, l_i)
        for j in range(1, plain):
            begin = (last - j) * cfg.block_n
            state = _step(q, state, channels, done + j, end, item, begin, hooks, scale, turns, True, cfg, SL, OL, PL)
        for j in range(plain, head):
            begin = (last - j) * cfg.block_n
            state = _step(q, state, channels, done + j, end, item, begin, hooks, scale, turns, False, cfg, SL, OL, PL)
        for j in range(head, kv_tiles):
            begin = (last - j) * cfg.block_n
            state = _step(q, state, channels, done + j, end, item, begin, hooks, scale, turns, True, cfg, SL, OL, PL)
        p, acc, m_i, l_i = state
        if not cfg.share_out:
            queries.release(n)
        done = end
        values.wait(done - 1)
        weights = gl.convert_layout(p.to(dtype), PL)
        acc = warpgroup_mma(weights, values.part(done - 1, 0), acc, is_async=True)
        l_row = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, OL))
        m_row = gl.convert_layout(m_i, gl.SliceLayout(1, OL))
        acc = warpgroup_mma_wait(0, deps=[acc])
        values.release(done - 1)
        # The store of the item before has left the buffer.
        tma_store_wait(0)
        state = (acc, m_row, l_row)
        # Where memory is short the output leaves through that of this item's queries.
        outlet = n if cfg.share_out else 0
        _write(state, record, qo_head, output, o_desc, outputs, outlet, hooks, factors, scale, CID, cfg, OL)
        if cfg.share_out:
            tma_store_wait(0)
            queries.release(n)
    if cfg.turns:
        turns.end()
    tma_store_wait(0)


@jit
def _ring(dtype: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, BOX: gl.constexpr,
          FIRST: gl.constexpr, cfg: gl.constexpr):  # fmt: skip
    """A ring of tiles of PARTS parts of ROWS rows each, its barriers ready. BOX: rows of a TMA box, 0: copied."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    THREADS: gl.constexpr = 32 * producer_warps(cfg)
    parts = gl.allocate_shared_memory(dtype, [STAGES * PARTS, ROWS, cfg.head_dim], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=THREADS if BOX == 0 else 1)
    boxes = parts
    if BOX > 0:
        BOXES: gl.constexpr = STAGES * PARTS * (cfg.head_dim // BOX_COLUMNS) * (ROWS // BOX)
        boxes = reinterpret(parts, dtype, [BOXES, BOX, BOX_COLUMNS], SHARED)
    return Ring(parts, boxes, full, STAGES, FIRST, GROUPS, THREADS, BOX == 0)


@jit
def prefill_kernel(q_desc, k, v, o_desc, output, work, indices, heads, hooks, factors, cfg: gl.constexpr):
    """Grid: one program an SM if persistent, else one a work item. indices: page table int32, or None if ragged.

    Descriptors: q and out `[rows, heads, dim]`, boxes of `cfg.rows` x 64; k and v `[pages, page_size, heads, dim]`
    (ragged: one page), boxes of `cfg.box` x 64, or `Cache` where cfg.box is 0.
    """
    # Hardware barriers: the turns, then one a stage of each ring.
    FIRST_EMPTY: gl.constexpr = FIRST_BARRIER + GROUPS
    Q_STAGES: gl.constexpr = cfg.q_stages
    STAGES: gl.constexpr = cfg.stages
    dtype: gl.constexpr = q_desc.dtype
    queries = _ring(dtype, Q_STAGES, GROUPS, cfg.rows, cfg.rows, FIRST_EMPTY, cfg)
    keys = _ring(dtype, STAGES, 1, cfg.block_n, cfg.box, FIRST_EMPTY + Q_STAGES, cfg)
    values = _ring(dtype, STAGES, 1, cfg.block_n, cfg.box, FIRST_EMPTY + Q_STAGES + STAGES, cfg)
    outputs = queries
    if not cfg.share_out:
        outputs = _ring(dtype, 1, GROUPS, cfg.rows, cfg.rows, FIRST_EMPTY, cfg)
    fence_async_shared()
    channels = (queries, keys, values)
    PRODUCER_WARPS: gl.constexpr = producer_warps(cfg)
    gl.warp_specialize(
        [
            (_consumer, (o_desc, channels, outputs, output, work, heads, hooks, factors, 0, cfg)),
            (_consumer, (o_desc, channels, outputs, output, work, heads, hooks, factors, 1, cfg)),
            (producer, ((q_desc, k, v), channels, work, heads, indices, GROUPS, cfg)),
        ],
        [4, PRODUCER_WARPS],
        [240, 24],
    )
