"""Grouped matrix products on Hopper: one producer warp, one or two consumer warpgroups, programs that stay.

out[r] = rows[r] @ weights[group of r]^T. A tile has `block_m` rows of one group. Warpgroups of 64 rows each share its
weights, or warpgroups of all rows share the columns among them; where groups are small the weights take the tensor
cores' rows, of which these always have 64, and the tokens their columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from flashinfer.device.channels import FIRST_BARRIER, Ring
from flashinfer.device.gluon import (
    constexpr_function,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    reinterpret,
    release_grids,
    tma_load,
    wait_for_grids,
)
from flashinfer.ops.gemm.gluon_sm90.plain import CONSUMER_WARPS, plain_consumer
from flashinfer.ops.gemm.gluon_sm90.scaled import scaled_consumer
from flashinfer.ops.gemm.gluon_sm90.scales import copy_scales, scale_tiles
from flashinfer.ops.gemm.gluon_sm90.schedule import Counts, nth_tile, rounds, weights_of

PRODUCER_WARPS = gl.constexpr(1)
# Bytes of K in a tile: a TMA box is at most that wide under the widest swizzle.
DEPTH_BYTES = 128
FP8_BITS = 8
# A coordinate past every tensor: TMA fills the box with zeros.
NOWHERE = gl.constexpr(0x7F000000)


class Shape(NamedTuple):
    """columns of the output, and depth (K)."""

    columns: int
    depth: int


@dataclass(frozen=True)
class GemmConfig:
    """Everything the kernel is compiled for, besides dtypes.

    block_m, block_n: rows, and rows of the weights, of a tile. stages: tiles in flight. consumers: warpgroups.
    split_rows: they share a tile by its rows, else by its columns. weights_first: weights are the product's rows.
    subtiles: products that a warpgroup's columns are made in. out_part: columns that it stores at once. band: tiles of
    rows worked on side by side. group_block: groups looked at at once, 0 where there is one group; many_groups: there
    are more than that. bits: of an operand's element. n_major: weights are [W, K, N]. scale_rows: rows that share a
    scale, 0 without block scales. gate_block: of pairs, the columns of up that stand in shared memory before those of
    their gates. finishes: whether anything is done to the sums. activation: a jitted function or None. turns: two
    warpgroups issue fp8 products in turn.
    """

    block_m: int
    block_n: int
    stages: int
    consumers: int
    split_rows: bool
    weights_first: bool
    subtiles: int
    out_part: int
    band: int
    group_block: int
    many_groups: bool
    bits: int
    n_major: bool
    scale_rows: int
    gate_block: int
    finishes: bool
    activation: Any
    turns: bool

    @property
    def scaled(self) -> bool:
        """Whether sums are added up in fp32 registers."""
        return self.bits == FP8_BITS

    @property
    def gated(self) -> bool:
        return self.gate_block > 0

    @property
    def block_k(self) -> int:
        return DEPTH_BYTES * 8 // self.bits

    @property
    def out_columns(self) -> int:
        """Columns of the output that a tile gives."""
        return self.block_n // 2 if self.gated else self.block_n

    @property
    def column_share(self) -> int:
        """Columns of the output from one warpgroup to the next."""
        return 0 if self.split_rows else self.out_columns // self.consumers

    @property
    def row_share(self) -> int:
        """Rows of the output from one warpgroup to the next."""
        return self.block_m // self.consumers if self.split_rows else 0

    @property
    def part_columns(self) -> int:
        """Rows of the weights that one product takes."""
        return self.block_n // (1 if self.split_rows else self.consumers) // self.subtiles

    @property
    def out_rows(self) -> int:
        """Rows that a warpgroup stores."""
        return self.row_share or self.block_m


@jit
def _load_weights(w_desc, weights, n, which, column, k, cfg: gl.constexpr):
    """Tile n of the weights: those of output columns from `column` on, K from k on."""
    BOXES: gl.constexpr = weights.BOXES
    for i in gl.static_range(BOXES):
        if cfg.gated:
            where = [which, column // cfg.gate_block, 0, 0, k]
        elif cfg.n_major:
            where = [which, k, column + i * cfg.block_k]
        else:
            where = [which, column, k]
        tma_load(w_desc, where, weights.landing(n), weights.box(n, i))


@jit
def producer(descs, rings, groups, counts, scales, cfg: gl.constexpr):
    """One warp: the rows and weights of every tile, by TMA, and copies of their scales."""
    x_desc, w_desc = descs
    rows, weights = rings[0], rings[1]
    steps = (counts.depth + cfg.block_k - 1) // cfg.block_k
    done = 0
    for t in range(0, rounds(groups, counts, PRODUCER_WARPS, cfg)):
        tile = nth_tile(groups, counts, t, PRODUCER_WARPS, cfg)
        group, row, column = tile[0], tile[1], tile[3] * cfg.out_columns
        which = weights_of(groups, group)
        place = (which, row, column)
        # Without weights the product is 0 of zeros: NaN in the rows must not come through.
        row = gl.where(which < 0, NOWHERE, row)
        for k in range(0, steps):
            n = done + k
            rows.acquire(n)
            rows.expect(n, weights.BYTES)
            _load_weights(w_desc, weights, n, which, column, k * cfg.block_k, cfg)
            tma_load(x_desc, [row, k * cfg.block_k], rows.landing(n), rows.box(n, 0))
            if cfg.scale_rows > 0:
                copy_scales(rings[2], rows.stage(n), scales, place, k, counts, cfg)
                rows.deliver(n)
        done += steps
    rows.drain(done)


@jit
def consumer(o_desc, rings, outputs, target, finish, groups, counts, CID: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup's share of every tile."""
    if cfg.scaled:
        scaled_consumer(o_desc, rings, outputs.index(CID), target, finish, groups, counts, CID, cfg)
    else:
        plain_consumer(o_desc, rings, outputs.index(CID), target, finish, groups, counts, CID, cfg)


@constexpr_function
def shared_layout(columns, bits):
    """The widest swizzle that `columns` fill."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, columns * bits // 8), element_bitwidth=bits, rank=2)


@jit
def _rings(x_type: gl.constexpr, cfg: gl.constexpr):
    """Those of the rows and of the weights, whose tiles come and go together; with block scales, also these' memory."""
    SHARED: gl.constexpr = shared_layout(cfg.block_k, cfg.bits)
    STAGES: gl.constexpr = cfg.stages
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # Of scales, every thread says when what it copied has landed.
        mbarrier.init(full.index(i), count=1 + 32 * PRODUCER_WARPS if cfg.scale_rows > 0 else 1)
    x = gl.allocate_shared_memory(x_type, [STAGES, cfg.block_m, cfg.block_k], SHARED)
    x_parts = x
    if cfg.split_rows:
        x_parts = reinterpret(x, x_type, [STAGES * cfg.consumers, cfg.out_rows, cfg.block_k], SHARED)
    WEIGHT_PARTS: gl.constexpr = STAGES * (cfg.block_n // cfg.part_columns)
    if cfg.n_major:
        w_parts = gl.allocate_shared_memory(x_type, [WEIGHT_PARTS, cfg.block_k, cfg.part_columns], SHARED)
        BOXES: gl.constexpr = STAGES * cfg.block_n // cfg.block_k
        w_boxes = reinterpret(w_parts, x_type, [BOXES, cfg.block_k, cfg.block_k], SHARED)
    else:
        w_boxes = gl.allocate_shared_memory(x_type, [STAGES, cfg.block_n, cfg.block_k], SHARED)
        w_parts = reinterpret(w_boxes, x_type, [WEIGHT_PARTS, cfg.part_columns, cfg.block_k], SHARED)
    rows = Ring(x_parts, x, full, STAGES, FIRST_BARRIER, cfg.consumers, 32 * PRODUCER_WARPS, False)
    weights = Ring(w_parts, w_boxes, full, STAGES, FIRST_BARRIER, cfg.consumers, 32 * PRODUCER_WARPS, False)
    if cfg.scale_rows > 0:
        return rows, weights, scale_tiles(cfg)
    else:
        return rows, weights


@jit(do_not_specialize=["num_rows", "num_groups"])
def grouped_kernel(x_desc, w_desc, o_desc, target, finish, groups, num_rows, num_groups, shape, scales,
                   cfg: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    """Grid: as many programs as stay, or as there are tiles.

    Descriptors: rows `[rows, K]`; weights `[W, N, K]`, n_major `[W, K, N]`, gated `[W, N / 2 / gate_block, 2,
    gate_block, K]`; out `[rows, columns]`; for their boxes see `launch.boxes`. target: `Target`; finish: `Finish`, or
    None; groups: `Groups`; shape: `Shape`; scales: `Scales`, or None.
    """
    counts = Counts(num_rows, num_groups, shape.columns, shape.depth)
    rings = _rings(x_desc.dtype, cfg)
    OUT: gl.constexpr = shared_layout(cfg.out_part, 16)
    outputs = gl.allocate_shared_memory(o_desc.dtype, [cfg.consumers, cfg.out_rows, cfg.out_part], OUT)
    fence_async_shared()
    # The next launch may begin where this one leaves room, and waits in this place for the end of this one.
    release_grids()
    wait_for_grids()
    descs = (x_desc, w_desc)
    if cfg.consumers == 2:
        gl.warp_specialize(
            [
                (consumer, (o_desc, rings, outputs, target, finish, groups, counts, 0, cfg)),
                (consumer, (o_desc, rings, outputs, target, finish, groups, counts, 1, cfg)),
                (producer, (descs, rings, groups, counts, scales, cfg)),
            ],
            [CONSUMER_WARPS, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (o_desc, rings, outputs, target, finish, groups, counts, 0, cfg)),
                (producer, (descs, rings, groups, counts, scales, cfg)),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )
