"""Tile shapes of the Hopper products."""

from __future__ import annotations

from typing import NamedTuple

from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig

# Tiles of rows worked on side by side.
BAND = 8
# 65,536 registers of a multiprocessor: what each warp starts with, then a consumer's and the producer's.
REGISTERS = {(2, 1): (168, 232, 40), (2, 2): (80, 96, 48), (1, 1): (152, 0, 40), (1, 2): (128, 0, 40)}


class Tile(NamedTuple):
    """The part of a configuration that measuring decides; fields as in `GemmConfig`. programs: a multiprocessor."""

    block_m: int
    block_n: int
    stages: int
    consumers: int = 2
    split_rows: bool = False
    weights_first: bool = False
    programs: int = 1


TILES16 = {
    "128x256": Tile(128, 256, 4, split_rows=True),
    "128x128": Tile(128, 128, 6, split_rows=True),
    "64x256": Tile(64, 256, 4),
    "64x128": Tile(64, 128, 8),
    "64x128x2": Tile(64, 128, 4, programs=2),
    "swap64": Tile(64, 128, 8, weights_first=True),
    "swap64x2": Tile(64, 128, 4, weights_first=True, programs=2),
    "swap32": Tile(32, 128, 8, weights_first=True),
    "swap16": Tile(16, 128, 8, weights_first=True),
}
TILES8 = {
    "128x256": Tile(128, 256, 4, split_rows=True),
    "128x128": Tile(128, 128, 6, split_rows=True),
    "128x64": Tile(128, 64, 8, split_rows=True),
    "64x256": Tile(64, 256, 4),
    "64x128": Tile(64, 128, 8),
    "64x64": Tile(64, 64, 8, consumers=1, split_rows=True),
}


def configured(tile: Tile, bits: int, max_groups: int, n_major: bool = False) -> GemmConfig:
    """The kernel of a tile for operands of `bits` bits."""
    columns = tile.block_n if tile.split_rows else tile.block_n // tile.consumers
    scaled = bits == 8
    return GemmConfig(
        block_m=tile.block_m,
        block_n=tile.block_n,
        stages=tile.stages,
        consumers=tile.consumers,
        split_rows=tile.split_rows,
        weights_first=tile.weights_first,
        out_part=min(columns, 128),
        band=BAND,
        max_groups=max_groups,
        bits=bits,
        n_major=n_major,
        scaled=scaled,
        subtiles=columns // 128 if scaled and columns > 128 else 1,
    )
