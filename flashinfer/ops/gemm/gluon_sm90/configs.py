"""Tiles of the Hopper products: which a spec gets for so many rows a group."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

from flashinfer.core import tuning
from flashinfer.core.arch import Arch
from flashinfer.core.tuning import Imposed
from flashinfer.device.finish import PAIRED, SINGLE
from flashinfer.ops.gemm.gluon_sm90.kernel import FP8_BITS, GemmConfig
from flashinfer.ops.gemm.measured import Size, size_of, tuning_key
from flashinfer.ops.gemm.spec import FP4_BLOCK, GemmSpec

BACKEND = "gluon_sm90"
# Rows a group, up to which a tile is as high; more take the last.
HEIGHTS = (16, 32, 64, 128, 256, 512)
# Groups looked at at once, at least and at most; of still more, so many, in a loop that leaves fewer registers.
GROUP_BLOCK = (32, 256)
MANY_BLOCK = 128
# By consumers and programs a multiprocessor: what each thread starts with of its 65,536 registers, then what a thread
# of a consumer has (the first takes what is left), and one of the producer.
REGISTERS = {(2, 1): (168, 232, 40), (2, 2): (80, 96, 48), (1, 1): (152, 0, 40)}
# The same where a warpgroup copies rows.
COPY_REGISTERS = {(2, 1): (168, 208, 88), (2, 2): (80, 96, 48)}
# Columns stored at once, at most.
OUT_PART = 128
# Columns of an accumulator that fp8 sums beside them leave registers for.
SUM_COLUMNS = 128
# Columns of up before those of their gates: both then lie in registers of one thread.
GATE_BLOCK = 8


class Tile(NamedTuple):
    """What measuring decides; fields as in `GemmConfig`. per_sm: resident programs of a multiprocessor.

    turns: where there are block scales.
    """

    block_m: int
    block_n: int
    stages: int
    consumers: int = 2
    split_rows: bool = False
    weights_first: bool = False
    per_sm: int = 1
    band: int = 8
    turns: bool = False
    tail: int = 0


class Workload(NamedTuple):
    """What a tile is chosen by, besides the spec. few: tiles of the widest kind would not occupy the GPU. groups: their
    class, 0 where there is one. finishes: whether anything is done to the sums."""

    height: int
    few: bool
    groups: int
    finishes: bool


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel's configuration and how it is launched; hashed by identity, since `choose` makes each but once."""

    kernel: GemmConfig
    registers: tuple[int, int, int]
    per_sm: int


TILES = {
    ("128x256", 16): Tile(128, 256, 4, split_rows=True),
    ("128x256t", 16): Tile(128, 256, 4, split_rows=True, tail=32),
    ("64x256", 16): Tile(64, 256, 4),
    ("64x128x2", 16): Tile(64, 128, 4, per_sm=2),
    ("swap32", 16): Tile(32, 128, 8, weights_first=True),
    ("swap16", 16): Tile(16, 128, 8, weights_first=True),
    ("128x256", 8): Tile(128, 256, 4, split_rows=True, turns=True),
    ("128x64", 8): Tile(128, 64, 8, split_rows=True, turns=True),
    ("64x128", 8): Tile(64, 128, 8),
    ("64x64", 8): Tile(64, 64, 8, consumers=1, split_rows=True),
    ("256x128", 4): Tile(256, 128, 5, weights_first=True),
    ("128x128", 4): Tile(128, 128, 8, weights_first=True),
    ("64x128", 4): Tile(64, 128, 8, weights_first=True),
    ("64x128x2", 4): Tile(64, 128, 5, weights_first=True, per_sm=2),
}
# By rows a group and bits of the narrower operand, for tiles enough for all multiprocessors and for fewer. From rates
# on an H200 (bench/results/trial-grouped-tiles.txt, trial-tails.txt, trial-fp8-scales.txt, trial-fp4-hopper.txt,
# 2026-11-22).
RULES = {
    (16, 16): ("swap16", "swap16"),
    (32, 16): ("swap32", "swap32"),
    (64, 16): ("64x128x2", "64x128x2"),
    (128, 16): ("128x256t", "64x128x2"),
    (256, 16): ("128x256t", "64x256"),
    (512, 16): ("128x256", "64x256"),
    (16, 8): ("64x128", "64x64"),
    (32, 8): ("64x128", "64x64"),
    (64, 8): ("64x128", "64x64"),
    (128, 8): ("128x256", "128x64"),
    (256, 8): ("128x256", "64x128"),
    (512, 8): ("128x256", "64x128"),
    (64, 4): ("64x128x2", "64x128x2"),
    (128, 4): ("128x128", "64x128x2"),
    (256, 4): ("256x128", "128x128"),
    (512, 4): ("256x128", "128x128"),
}

imposed: Imposed[Tile] = Imposed()


@cache
def tuned() -> dict[tuple[int, int, bool, bool], Tile]:
    """What was measured and written: the tile of each (bits, height, gated, few); empty before."""
    path = files("flashinfer.ops.gemm").joinpath("tuned", "gluon_sm90.json")
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return {(e["bits"], e["height"], e["gated"], e["few"]): Tile(**e["tile"]) for e in entries}


def height_for(num_rows: int, num_groups: int) -> int:
    """Of the tile for so many rows a group, on average: group sizes are not known here."""
    return next((m for m in HEIGHTS if m * num_groups >= num_rows), HEIGHTS[-1])


def bits_of(spec: GemmSpec) -> int:
    """Of an element of the narrower operand."""
    return 4 if spec.kind in FP4_BLOCK else spec.row_dtype.itemsize * 8


def choose(spec: GemmSpec, arch: Arch, num_rows: int, num_groups: int, finishes: bool) -> Launch:
    """The launch for about `num_rows` rows of all groups together. finishes: whether anything is done to the sums."""
    load = _workload(spec, arch, num_rows, num_groups, finishes)
    tile = imposed.get() or _tile_of(spec, arch, load, size_of(num_rows, num_groups), tuning.generation())
    return _configured(spec, load, tile)


def contenders(spec: GemmSpec, arch: Arch, num_rows: int, num_groups: int, finishes: bool) -> tuple[str, list[Tile]]:
    """What the fastest tile is filed under, and the candidates; arguments as of `choose`."""
    load = _workload(spec, arch, num_rows, num_groups, finishes)
    return tuning_key(BACKEND, spec, size_of(num_rows, num_groups)), candidates(spec, load)


def _workload(spec: GemmSpec, arch: Arch, num_rows: int, num_groups: int, finishes: bool) -> Workload:
    height = height_for(num_rows, num_groups)
    bits = bits_of(spec)
    wide = TILES[RULES[height, bits][0], bits]
    row_tiles = max(num_groups, -(-num_rows // wide.block_m))
    few = row_tiles * -(-spec.n // wide.block_n) < arch.num_sms * wide.per_sm
    groups = 0 if spec.layout == "one" else group_class(num_groups)
    return Workload(height, few, groups, finishes)


def candidates(spec: GemmSpec, load: Workload) -> list[Tile]:
    """What is worth measuring, the default first: every tile of these operands, with scales also with other turns."""
    bits = bits_of(spec)
    tiles = [tile for (_, width), tile in TILES.items() if width == bits]
    others = [tile._replace(turns=not tile.turns) for tile in tiles if spec.scale_rows and tile.consumers == 2]
    return list(dict.fromkeys((default_tile(spec, load), *tiles, *others)))


def default_tile(spec: GemmSpec, load: Workload) -> Tile:
    """That of the file of `bench.tune_gemm`, else the rules'."""
    bits = bits_of(spec)
    written = tuned().get((bits, load.height, spec.gated, load.few))
    return written or TILES[RULES[load.height, bits][load.few], bits]


@lru_cache(maxsize=4096)
def _tile_of(spec: GemmSpec, arch: Arch, load: Workload, size: Size, generation: int) -> Tile:
    found = tuning.chosen(tuning_key(BACKEND, spec, size), arch, candidates(spec, load))
    return found or default_tile(spec, load)


def group_class(num_groups: int) -> int:
    """All numbers of groups for which one kernel serves have one class: a power of two."""
    return min(max(1 << (num_groups - 1).bit_length(), GROUP_BLOCK[0]), 2 * GROUP_BLOCK[1])


@cache
def _configured(spec: GemmSpec, load: Workload, tile: Tile) -> Launch:
    kernel = configured(spec, tile, load.groups, load.finishes)
    registers = (COPY_REGISTERS if spec.gathered else REGISTERS)[tile.consumers, tile.per_sm]
    return Launch(kernel, registers, tile.per_sm)


def configured(spec: GemmSpec, tile: Tile, groups: int, finishes: bool) -> GemmConfig:
    """The kernel of a tile. groups: their class, 0 where there is one."""
    bits = spec.row_dtype.itemsize * 8
    columns = tile.block_n if tile.split_rows else tile.block_n // tile.consumers
    # Of fp8 pairs, up and gate have sums and scales of their own.
    subtiles = 2 if bits == FP8_BITS and (spec.gated or columns > SUM_COLUMNS) else 1
    gate_block = columns // 2 if bits == FP8_BITS else GATE_BLOCK
    many = groups > GROUP_BLOCK[1]
    # Of weights [W, K, N] no part of the columns lies by itself.
    tail = 0 if spec.transposed or spec.layout == "one" else tile.tail
    assert not tail or (bits == 16 and tile.split_rows and tile.consumers == 2), "no other consumer knows of tails"
    return GemmConfig(
        block_m=tile.block_m,
        block_n=tile.block_n,
        stages=tile.stages,
        consumers=tile.consumers,
        split_rows=tile.split_rows,
        weights_first=tile.weights_first,
        subtiles=subtiles,
        # Rows of tails take the memory of half of what is stored at once.
        out_part=min(columns // (2 if spec.gated else subtiles), OUT_PART // (2 if tail else 1)),
        band=tile.band,
        group_block=MANY_BLOCK if many else groups,
        many_groups=many,
        bits=bits,
        n_major=spec.transposed,
        scale_rows=spec.scale_rows,
        gate_block=gate_block if spec.gated else 0,
        finishes=finishes,
        gathered=spec.gathered,
        activation=PAIRED[spec.activation] if spec.gated else SINGLE[spec.activation],
        tail=tail,
        scale_block=FP4_BLOCK.get(spec.kind, 0),
        turns=tile.turns and tile.consumers == 2 and spec.scale_rows > 0,
    )
