"""Tiles of the grouped product: which a spec gets for so many rows a group."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch

from flashinfer.core import tuning
from flashinfer.core.arch import Arch
from flashinfer.core.tuning import Imposed
from flashinfer.device.finish import PAIRED, SINGLE
from flashinfer.ops.gemm.measured import Size, size_of, tuning_key
from flashinfer.ops.gemm.spec import FP4_BLOCK, FP8_BLOCK, GemmSpec
from flashinfer.ops.gemm.triton.kernel import GemmConfig

BACKEND = "triton"
# Rows a group, up to which a tile is as high; more take the last.
HEIGHTS = (16, 32, 64, 128)
GROUP_BLOCK = (32, 1024)
# Shared memory that a program needs besides its stages.
SLACK = 1024


class Tile(NamedTuple):
    """What measuring decides. swap, band: see `GemmConfig`; stages: at most; per_sm: resident programs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    stages: int
    per_sm: int = 1
    swap: bool = False
    band: int = 8


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel's configuration and how it is launched; hashed by identity, since `choose` makes each but once.

    activation: a jitted function or None.
    """

    kernel: GemmConfig
    activation: Any
    num_warps: int
    num_stages: int
    per_sm: int


# Until `bench.tune_gemm` has measured: rates on an H200 (a prototype's, November 2026; of fp4 at heights 16 and 128,
# bench/results/trial-fp8-scales.txt) for what has tensor maps, and what fits registers elsewhere. By (operands, height
# of the tile).
HOPPER = {
    ("half", 16): Tile(16, 128, 64, 4, 6, 2, True),
    ("half", 32): Tile(32, 128, 64, 4, 6, 2, True),
    ("half", 64): Tile(64, 128, 64, 4, 5, 2),
    ("half", 128): Tile(128, 256, 64, 8, 4),
    ("fp8", 16): Tile(16, 128, 128, 4, 6, 2, True),
    ("fp8", 32): Tile(32, 128, 128, 4, 6, 2, True),
    ("fp8", 64): Tile(64, 128, 128, 4, 4, 2),
    ("fp8", 128): Tile(128, 128, 128, 8, 4),
    ("fp4", 16): Tile(16, 64, 128, 4, 4, 4, True),
    ("fp4", 32): Tile(32, 64, 128, 4, 4, 4, True),
    ("fp4", 64): Tile(64, 128, 64, 8, 4, 1, True),
    ("fp4", 128): Tile(128, 128, 128, 8, 3, 1, True),
}
OTHERS = {
    ("half", 16): Tile(16, 128, 64, 4, 4, 2),
    ("half", 32): Tile(32, 128, 64, 4, 4, 2),
    ("half", 64): Tile(64, 128, 64, 8, 3),
    ("half", 128): Tile(128, 128, 64, 8, 3),
    ("fp8", 16): Tile(16, 64, 128, 4, 4, 2),
    ("fp8", 32): Tile(32, 64, 128, 4, 4, 2),
    ("fp8", 64): Tile(64, 128, 128, 8, 3),
    ("fp8", 128): Tile(128, 64, 128, 8, 3),
    ("fp4", 16): Tile(16, 32, 128, 4, 3),
    ("fp4", 32): Tile(32, 32, 128, 4, 3),
    ("fp4", 64): Tile(64, 64, 64, 8, 3),
    ("fp4", 128): Tile(128, 64, 32, 8, 3),
}
# fp32 is multiplied without tensor cores.
WIDE = {height: Tile(min(height, 64), 64, 32, 4, 2) for height in HEIGHTS}

imposed: Imposed[Tile] = Imposed()


def operands_of(spec: GemmSpec) -> str:
    """What a tile is chosen by: the narrower operand."""
    if spec.kind in FP4_BLOCK:
        return "fp4"
    return {1: "fp8", 2: "half", 4: "wide"}[spec.weight_dtype.itemsize]


def height_for(rows_per_group: float) -> int:
    return next((m for m in HEIGHTS if m >= rows_per_group), HEIGHTS[-1])


@cache
def tuned(arch: str) -> dict[tuple[str, bool, int], Tile]:
    """What `bench.tune_gemm` measured and wrote: the tile of each (operands, gated, height); empty before."""
    path = files("flashinfer.ops.gemm").joinpath("tuned", f"{arch}.json")
    if not path.is_file():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return {(e["operands"], e["gated"], e["height"]): Tile(**e["tile"]) for e in entries}


def choose(spec: GemmSpec, arch: Arch, num_rows: int, num_groups: int, expected_rows: int = 0) -> Launch:
    """The launch for `num_rows` rows of all groups together; expected_rows: of one, 0 for their mean."""
    rows = expected_rows or num_rows / num_groups
    height = height_for(rows)
    tiles_m = num_groups * -(-int(rows) // height)
    group_block = min(max(1 << (num_groups - 1).bit_length(), GROUP_BLOCK[0]), GROUP_BLOCK[1])
    # Rows that all groups have room for, as far as tiles are concerned.
    room = FP8_BLOCK if spec.layout == "equal" and num_rows % (num_groups * FP8_BLOCK) == 0 else 0
    few = 0 if tiles_m >= arch.num_sms else max(tiles_m, 1)
    size = _size(num_rows, num_groups, expected_rows)
    tile = imposed.get() or _tile_of(spec, arch, height, size, tuning.generation())
    return _configured(spec, arch, few, group_block, room, tile)


def contenders(
    spec: GemmSpec, arch: Arch, num_rows: int, num_groups: int, expected_rows: int = 0
) -> tuple[str, list[Tile]]:
    """What the fastest tile is filed under, and the candidates; arguments as of `choose`."""
    height = height_for(expected_rows or num_rows / num_groups)
    key = tuning_key(BACKEND, spec, _size(num_rows, num_groups, expected_rows))
    return key, candidates(spec, arch, height)


def candidates(spec: GemmSpec, arch: Arch, height: int) -> list[Tile]:
    """What is worth measuring, the default first.

    The defaults of the heights beside, then what differs from it in width, depth, resident programs or sides.
    """
    default, operands = _tile(spec, arch, height), operands_of(spec)
    others = [_tile(spec, arch, m) for m in HEIGHTS if m in (height // 2, height * 2)]
    # With the weights on the left four warps take 64 of their rows at once.
    narrowest, widest = 16 * default.num_warps if default.swap else 32, 256 if operands == "half" else 128
    widths = (default.block_n // 2, default.block_n * 2)
    others += [default._replace(block_n=n) for n in widths if narrowest <= n <= widest]
    if operands != "fp8":  # which is as deep as its block scales
        others.append(default._replace(block_k=64 if default.block_k == 128 else 2 * default.block_k))
    if default.num_warps == 4:
        others.append(default._replace(per_sm=default.per_sm // 2 or 2))
    if arch.has_wgmma and height >= 64 and operands in ("half", "fp8"):
        others.append(default._replace(swap=not default.swap))
    return list(dict.fromkeys((default, *others)))


def _size(num_rows: int, num_groups: int, expected_rows: int) -> Size:
    return size_of(expected_rows * num_groups or num_rows, num_groups)


@lru_cache(maxsize=4096)
def _tile_of(spec: GemmSpec, arch: Arch, height: int, size: Size, generation: int) -> Tile:
    """What `autotune` measured, else the default of the height."""
    found = tuning.chosen(tuning_key(BACKEND, spec, size), arch, candidates(spec, arch, height))
    return found or _tile(spec, arch, height)


@cache
def _configured(spec: GemmSpec, arch: Arch, few: int, group_block: int, room: int, tile: Tile) -> Launch:
    """few: row tiles, where they are fewer than multiprocessors. room: rows that all groups have room for, or 0."""
    tile = _fitted(tile, spec, arch, few)
    maps = arch.has_tma
    single = spec.layout == "one" or (room % tile.block_m == 0 and room > 0)
    packed = 2 if spec.kind in FP4_BLOCK else 1
    one_scale = spec.scale_cols % tile.block_n == 0 and (not spec.gated or spec.out_cols % tile.block_n == 0)
    kernel = GemmConfig(
        kind=spec.kind,
        block_m=tile.block_m,
        block_n=tile.block_n,
        block_k=tile.block_k,
        band=tile.band,
        group_block=group_block,
        single=single,
        shared_room=spec.layout == "equal" and single,
        swap=tile.swap,
        row_map=spec.row_map and maps and not spec.gathered,
        weight_map=spec.weight_map and maps,
        out_map=spec.out_map and maps,
        transposed=spec.transposed,
        packed=packed,
        scale_block=FP4_BLOCK.get(spec.kind, FP8_BLOCK),
        scale_rows=spec.scale_rows,
        scale_cols=spec.scale_cols,
        one_scale=one_scale,
        gated=spec.gated,
        fp4_pairs=packed == 2 and arch.is_nvidia and spec.row_dtype == torch.bfloat16,
    )
    activation = PAIRED[spec.activation] if spec.gated else SINGLE[spec.activation]
    return Launch(kernel, activation, tile.num_warps, _stages(tile, spec, arch), tile.per_sm)


def _tile(spec: GemmSpec, arch: Arch, height: int) -> Tile:
    operands = operands_of(spec)
    if operands == "wide":
        return WIDE[height]
    measured = tuned(arch.name).get((operands, spec.gated, height))
    return measured or (HOPPER if arch.has_wgmma else OTHERS)[operands, height]


def _fitted(tile: Tile, spec: GemmSpec, arch: Arch, few: int) -> Tile:
    """`tile` no wider than the result, narrower where that gives work to more multiprocessors, and to fit registers."""
    block_n = min(tile.block_n, max(16, 1 << (spec.out_cols - 1).bit_length()))
    # Two accumulators; block scales take a third, and where products are not asynchronous operands lie in registers.
    share = (2 if spec.kind == "fp8_block" else 1) * (1 if arch.has_wgmma else 4 if spec.kind == "fp8_block" else 2)
    block_m = min(tile.block_m, 64) if spec.gated and not arch.has_wgmma else tile.block_m
    while spec.gated and block_n > 16 and block_n * block_m * share > 128 * 128 * tile.num_warps // 8:
        block_n //= 2
    while few and block_n > 64 and few * -(-spec.out_cols // block_n) * 2 <= arch.num_sms * tile.per_sm:
        block_n //= 2
    block_k = tile.block_k
    if spec.kind != "fp8_block":
        block_k = min(block_k, max(32, 1 << (max(spec.k, 1) - 1).bit_length()))
    return tile._replace(block_m=block_m, block_n=block_n, block_k=block_k)


def _stages(tile: Tile, spec: GemmSpec, arch: Arch) -> int:
    """As many as shared memory has room for, besides the result on its way out."""
    packed = 2 if spec.kind in FP4_BLOCK else 1
    matrices = 2 if spec.gated else 1
    rows = tile.block_m * tile.block_k * spec.row_dtype.itemsize
    columns = matrices * tile.block_n * tile.block_k * spec.weight_dtype.itemsize // packed
    budget = max(arch.smem_bytes, 49_152) // tile.per_sm - tile.block_m * tile.block_n * spec.out_dtype.itemsize - SLACK
    if packed == 2 and not tile.swap:
        # Decoded, for an instruction that takes its right operand from there; the left one it takes from registers.
        budget -= 2 * tile.block_n * tile.block_k * matrices
    return max(2, min(tile.stages, budget // (rows + columns)))
