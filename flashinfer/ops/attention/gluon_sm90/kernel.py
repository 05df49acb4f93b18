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
    constexpr_function,
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
from flashinfer.ops.attention.gluon_sm90.softmax import LOWEST, online, pinned, row_sums, transformed

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
    tensor cores. fixed_maximum: weights are relative to a logit of 0, not to each row's maximum. halves: whether a
    warpgroup leaves out the half of its first or last tile that its bounds say is masked.
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
    halves: bool


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


@constexpr_function
def _logits_layout(columns):
    """Of the products of a warpgroup's queries with `columns` keys."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@jit
def _tokens(tile, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """COUNT tokens from FIRST on of a K or V tile."""
    if COUNT == tile.shape[0]:
        return tile
    else:
        return tile.slice(FIRST, COUNT)


@jit
def _queries_again(whose, queries, cfg: gl.constexpr):
    """The warpgroup's queries, for a step. whose: (their tile, work item, warpgroup).

    Where registers are short the loop must not keep the descriptors of all their slices: each step makes them from an
    index that the compiler cannot see through. Seen in SASS: 4 spills in the loop without, and 14 instructions less.
    """
    q, n, CID = whose
    if cfg.natural_logits and cfg.head_dim > 128:
        return queries.parts.index(pinned(queries.stage(n) * queries.PARTS + CID))
    else:
        return q


@jit
def _first(q, channels, n, end, item, begin, hooks, scale, turns, COUNT: gl.constexpr, cfg: gl.constexpr,
           OL: gl.constexpr):  # fmt: skip
    """The first KV tile of an item, or its left COUNT tokens: the state before any product with V."""
    _, keys, values = channels
    SL: gl.constexpr = _logits_layout(COUNT)
    zero = gl.full([cfg.rows, COUNT], 0.0, gl.float32, SL)
    m_i = gl.full([cfg.rows], 0.0 if cfg.fixed_maximum else LOWEST, gl.float32, gl.SliceLayout(1, SL))
    if cfg.turns:
        turns.take()
    s = warpgroup_mma(q, _tokens(keys.part(n, 0), 0, COUNT).permute((1, 0)), zero, use_acc=False, is_async=True)
    if cfg.turns:
        turns.give()
    s = warpgroup_mma_wait(0, deps=[s])
    keys.release(n)
    s = transformed(s, item, begin, hooks, scale, True, True, cfg)
    p, m_i, _ = online(s, m_i, hooks, scale, cfg)
    l_i = row_sums(p)
    if cfg.box > 0:
        rest = item[4] - begin
        if (rest < cfg.block_n) & (rest % cfg.box != 0):
            values.wait(n)
            _zero_tail(values, n, rest, cfg)
    keys.wait(n + 1, n + 1 < end)
    acc = gl.full([cfg.rows, cfg.head_dim], 0.0, gl.float32, OL)
    return p, acc, m_i, l_i


@jit
def _step(whose, state, channels, n, end, item, begin, hooks, scale, turns, MASK: gl.constexpr, FIRST: gl.constexpr,
          COUNT: gl.constexpr, cfg: gl.constexpr, PL: gl.constexpr):  # fmt: skip
    """One KV tile, or COUNT tokens of it from FIRST on, `begin` being the first of them: its products run beside those
    of the tile before with V, its softmax beside the latter. The state is of the left half of that tile, or the whole.
    """
    p, acc, m_i, l_i = state
    queries, keys, values = channels
    q = _queries_again(whose, queries, cfg)
    SL: gl.constexpr = _logits_layout(COUNT)
    zero = gl.full([cfg.rows, COUNT], 0.0, gl.float32, SL)
    if cfg.turns:
        turns.take()
    s = warpgroup_mma(q, _tokens(keys.part(n, 0), FIRST, COUNT).permute((1, 0)), zero, use_acc=False, is_async=True)
    # P stays fp32 until here: converted earlier, its packing would delay the product above.
    weights = gl.convert_layout(p.to(q.dtype), PL)
    values.wait(n - 1)
    acc = warpgroup_mma(weights, _tokens(values.part(n - 1, 0), 0, p.shape[1]), acc, is_async=True)
    if cfg.turns:
        turns.give()
    s = warpgroup_mma_wait(1, deps=[s])
    keys.release(n)
    s = transformed(s, item, begin, hooks, scale, MASK, False, cfg)
    p, m_i, alpha = online(s, m_i, hooks, scale, cfg)
    sums = row_sums(p)
    # The wait for the next K tile stands here: a spin loop ends a basic block, which keeps ptxas from hoisting the wait
    # for P V above the exponentials.
    keys.wait(n + 1, n + 1 < end)
    acc = warpgroup_mma_wait(0, deps=[acc])
    values.release(n - 1)
    l_i = gl.convert_layout(l_i, sums.type.layout)
    if cfg.fixed_maximum:
        l_i = l_i + sums
    else:
        l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + sums
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    return p, acc, m_i, l_i


@jit
def _last(state, channels, n, done, FIRST: gl.constexpr, cfg: gl.constexpr, PL: gl.constexpr):
    """The product of item n's last tile, or of its tokens from FIRST on, with V; maxima and sums of whole rows."""
    p, acc, m_i, l_i = state
    queries, _, values = channels
    OL: gl.constexpr = acc.type.layout
    if not cfg.share_out:
        queries.release(n)
    values.wait(done)
    weights = gl.convert_layout(p.to(values.parts.dtype), PL)
    acc = warpgroup_mma(weights, _tokens(values.part(done, 0), FIRST, p.shape[1]), acc, is_async=True)
    l_row = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, OL))
    m_row = gl.convert_layout(m_i, gl.SliceLayout(1, OL))
    acc = warpgroup_mma_wait(0, deps=[acc])
    values.release(done)
    return acc, m_row, l_row


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
    queries, keys, _ = channels
    OL: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, cfg.head_dim, 16]
    )
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OL, k_width=2)
    N: gl.constexpr = cfg.block_n
    HALF: gl.constexpr = N // 2
    # Upper rows see less of the last keys, lower ones less of the first.
    LEFT: gl.constexpr = cfg.halves and CID == 0
    RIGHT: gl.constexpr = cfg.halves and CID == GROUPS - 1
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
        lo, hi, full_lo, full_hi = fold_bounds(hooks.bounds, q_lo, q_hi, qo_len, kv_len, cfg.masks_have_bounds)
        last = kv_tile + kv_tiles - 1
        # Steps: those before `begin` and from `stop` on take one half, the other ones before `plain` need masks, those
        # before `head` none, the rest again.
        begin = 1
        stop = kv_tiles
        if LEFT:
            begin = gl.where((hi <= last * N + HALF) & (kv_tiles > 1), 2, 1)
        if RIGHT:
            # Where nothing bounds the keys from the left the compiler sees it, and drops the last half.
            stop = gl.where((full_lo != 0) & (lo >= kv_tile * N + HALF) & (kv_tiles > 1), kv_tiles - 1, kv_tiles)
        plain = gl.minimum(gl.maximum(last + 1 - full_hi // N, begin), stop)
        if len(hooks.mask) == 0:
            # Nothing but the end of the keys, which lies in the first tile; the compiler drops the other masked loop.
            plain = 1
        head = gl.minimum(gl.maximum(last + 1 - (full_lo + N - 1) // N, plain), stop)
        # Likewise the last loop.
        head = gl.where(full_lo == 0, stop, head)
        end = done + kv_tiles

        queries.wait(n)
        q = queries.part(n, CID)
        keys.wait(done)
        whose = (q, n, CID)
        if LEFT and begin == 2:
            half = _first(q, channels, done, end, item, last * N, hooks, scale, turns, HALF, cfg, OL)
            state = _step(whose, half, channels, done + 1, end, item, (last - 1) * N, hooks, scale, turns,
                          True, 0, N, cfg, PL)  # fmt: skip
        else:
            state = _first(q, channels, done, end, item, last * N, hooks, scale, turns, N, cfg, OL)
        for j in range(begin, plain):
            state = _step(whose, state, channels, done + j, end, item, (last - j) * N, hooks, scale, turns,
                          True, 0, N, cfg, PL)  # fmt: skip
        for j in range(plain, head):
            state = _step(whose, state, channels, done + j, end, item, (last - j) * N, hooks, scale, turns,
                          False, 0, N, cfg, PL)  # fmt: skip
        for j in range(head, stop):
            state = _step(whose, state, channels, done + j, end, item, (last - j) * N, hooks, scale, turns,
                          True, 0, N, cfg, PL)  # fmt: skip
        if RIGHT and stop < kv_tiles:
            half = _step(whose, state, channels, end - 1, end, item, kv_tile * N + HALF, hooks, scale, turns,
                         True, HALF, HALF, cfg, PL)  # fmt: skip
            total = _last(half, channels, n, end - 1, HALF, cfg, PL)
        else:
            total = _last(state, channels, n, end - 1, 0, cfg, PL)
        done = end
        # The store of the item before has left the buffer.
        tma_store_wait(0)
        # Where memory is short the output leaves through that of this item's queries.
        outlet = n if cfg.share_out else 0
        _write(total, record, qo_head, output, o_desc, outputs, outlet, hooks, factors, scale, CID, cfg, OL)
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
