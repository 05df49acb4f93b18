"""Grouped matrix products on Hopper: one producer, one or two consumer warpgroups, programs that stay.

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
    wait_for_grids,
)
from flashinfer.ops.gemm.gluon_sm90.plain import CONSUMER_WARPS, plain_consumer
from flashinfer.ops.gemm.gluon_sm90.producer import producer
from flashinfer.ops.gemm.gluon_sm90.scaled import scaled_consumer
from flashinfer.ops.gemm.gluon_sm90.scales import scale_tiles
from flashinfer.ops.gemm.gluon_sm90.schedule import Counts, tile_memory

# Bytes of K in a tile: a TMA box is at most that wide under the widest swizzle.
DEPTH_BYTES = 128
FP8_BITS = 8
# Rows stored at once, at most.
OUT_ROWS = 128
# Warps that bring tiles: one asks TMA, a warpgroup copies.
TMA_WARPS, COPY_WARPS = 1, 4


class Rings(NamedTuple):
    """Memory of what comes for each step of K. rows, weights: `Ring`. tiles: numbers of the tile that begins there
    (`schedule.tell`). beside: rows of tails `[stages, tail, block_k]`, or scales (`scales.scale_tiles`), or nothing."""

    rows: Any
    weights: Any
    tiles: Any
    beside: Any


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
    are more than that. bits: of an element of the rows. n_major: weights are [W, K, N]. scale_rows: rows that share a
    scale, 0 without block scales. tail: rows past a tile's that its group may have left, which it takes along.
    gate_block: of pairs, the columns of up that stand in shared memory before those of their gates. finishes: whether
    anything is done to the sums. gathered: rows are copied to their places, else they come by TMA. activation: a jitted
    function or None. turns: two warpgroups issue fp8 products in turn. scale_block: columns of 4-bit weights that share
    a scale, 0 for other weights.
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
    gathered: bool
    activation: Any
    turns: bool
    tail: int
    scale_block: int

    @property
    def scaled(self) -> bool:
        """Whether sums are added up in fp32 registers."""
        return self.bits == FP8_BITS

    @property
    def producer_warps(self) -> int:
        return COPY_WARPS if self.gathered else TMA_WARPS

    @property
    def producer_threads(self) -> int:
        return 32 * self.producer_warps

    @property
    def row_box(self) -> int:
        """Rows that TMA brings at once."""
        return self.tail or self.block_m

    @property
    def tail_bytes(self) -> int:
        return self.tail * DEPTH_BYTES

    @property
    def gated(self) -> bool:
        return self.gate_block > 0

    @property
    def block_k(self) -> int:
        return DEPTH_BYTES * 8 // self.bits

    @property
    def weight_depth(self) -> int:
        """Elements of the weights' memory, along K, in a tile."""
        return self.block_k // 2 if self.scale_block else self.block_k

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
        """Rows that a warpgroup stores at once."""
        return self.row_share or min(self.block_m, OUT_ROWS)


@jit
def consumer(o_desc, rings, outputs, target, finish, groups, counts, scales, CID: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup's share of every tile."""
    if cfg.scaled:
        scaled_consumer(o_desc, rings, outputs.index(CID), target, finish, groups, counts, CID, cfg)
    else:
        plain_consumer(o_desc, rings, outputs.index(CID), target, finish, groups, counts, scales, CID, cfg)


@constexpr_function
def shared_layout(columns, bits):
    """The widest swizzle that `columns` fill."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, columns * bits // 8), element_bitwidth=bits, rank=2)


@jit
def _rings(w_type: gl.constexpr, cfg: gl.constexpr):
    """Those of the rows and of the weights, whose tiles come and go together, and what else comes with them."""
    x_type: gl.constexpr = gl.bfloat16 if cfg.scale_block > 0 else w_type
    SHARED: gl.constexpr = shared_layout(cfg.block_k, cfg.bits)
    DEPTH: gl.constexpr = cfg.weight_depth
    WEIGHTS: gl.constexpr = shared_layout(DEPTH, w_type.primitive_bitwidth)
    STAGES: gl.constexpr = cfg.stages
    # TMA's bytes, and each thread that copies, rows or scales.
    ARRIVALS: gl.constexpr = 1 + cfg.producer_threads if cfg.gathered or cfg.scale_rows > 0 else 1
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=ARRIVALS)
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
        w_boxes = gl.allocate_shared_memory(w_type, [STAGES, cfg.block_n, DEPTH], WEIGHTS)
        w_parts = reinterpret(w_boxes, w_type, [WEIGHT_PARTS, cfg.part_columns, DEPTH], WEIGHTS)
    THREADS: gl.constexpr = cfg.producer_threads
    x_boxes = x
    if not cfg.gathered:
        BOXES_A_TILE: gl.constexpr = cfg.block_m // cfg.row_box
        x_boxes = reinterpret(x, x_type, [STAGES * BOXES_A_TILE, cfg.row_box, cfg.block_k], SHARED)
    rows = Ring(x_parts, x_boxes, full, STAGES, FIRST_BARRIER, cfg.consumers, THREADS, cfg.gathered)
    weights = Ring(w_parts, w_boxes, full, STAGES, FIRST_BARRIER, cfg.consumers, THREADS, False)
    if cfg.scale_rows > 0:
        return Rings(rows, weights, tile_memory(cfg), scale_tiles(cfg))
    elif cfg.tail > 0:
        tails = gl.allocate_shared_memory(x_type, [STAGES, cfg.tail, cfg.block_k], SHARED)
        return Rings(rows, weights, tile_memory(cfg), tails)
    else:
        return Rings(rows, weights, tile_memory(cfg), ())


@jit(do_not_specialize=["num_rows", "num_groups"])
def grouped_kernel(x_source, w_desc, o_desc, target, finish, groups, num_rows, num_groups, shape, scales,
                   cfg: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr):  # fmt: skip
    """Grid: as many programs as stay, or as there are tiles.

    x_source: a map of rows `[rows, K]`, or `Scattered`. Descriptors: weights `[W, N, K]`, n_major `[W, K, N]`,
    gated `[W, N / 2 / gate_block, 2, gate_block, K]`; out `[rows, columns]`; for their boxes see `launch.boxes`.
    target: `Target`; finish: `Finish`, or None; groups: `Groups`; shape: `Shape`; scales: `Scales`,
    `BlockScales`, or None.
    """
    counts = Counts(num_rows, num_groups, shape.columns, shape.depth)
    rings = _rings(w_desc.dtype, cfg)
    OUT: gl.constexpr = shared_layout(cfg.out_part, 16)
    outputs = gl.allocate_shared_memory(o_desc.dtype, [cfg.consumers, cfg.out_rows, cfg.out_part], OUT)
    fence_async_shared()
    # The next launch may begin where this one leaves room, and waits in this place for the end of this one.
    release_grids()
    wait_for_grids()
    sources = (x_source, w_desc)
    PRODUCER_WARPS: gl.constexpr = cfg.producer_warps
    if cfg.consumers == 2:
        gl.warp_specialize(
            [
                (consumer, (o_desc, rings, outputs, target, finish, groups, counts, scales, 0, cfg)),
                (consumer, (o_desc, rings, outputs, target, finish, groups, counts, scales, 1, cfg)),
                (producer, (sources, rings, groups, counts, scales, cfg)),
            ],
            [CONSUMER_WARPS, PRODUCER_WARPS],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (o_desc, rings, outputs, target, finish, groups, counts, scales, 0, cfg)),
                (producer, (sources, rings, groups, counts, scales, cfg)),
            ],
            [PRODUCER_WARPS],
            [PRODUCER_REGISTERS],
        )
