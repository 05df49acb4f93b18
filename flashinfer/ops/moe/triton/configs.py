"""How a mixture of experts is cut into programs: by measurement where there is one, else by rule."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import triton

from flashinfer.core.arch import Arch
from flashinfer.core.tuning import chosen, generation
from flashinfer.ops.gemm import MAP_BYTES
from flashinfer.ops.moe.spec import BLOCK, MoESpec
from flashinfer.ops.moe.triton.combine import CombineConfig
from flashinfer.ops.moe.triton.few import FewConfig
from flashinfer.ops.moe.triton.prepare import RowsConfig
from flashinfer.ops.moe.triton.sort import SortConfig

# Up to so many tokens the time is that of reading weights, and `few_kernel` runs.
FEW_TOKENS = 64
# Up to so many pairs each program finds its own among them, which saves a launch.
SCAN = 64
# Programs an SM that keep the memory busy to the end.
WAVES = 3
MAX_SPLITS = 8
# Pairs that one program sorts, beyond which there are several, as many as run at once.
SORT_ALONE = 512
MAX_SORT_BLOCKS = 128
# Pairs compared with each other, one a thread: each waits for one load, and registers hold what is compared.
WARPS_SORT, SORT_CHUNK = 4, 128
# Counts that a program reads at a time, and the fewest experts: as many as the widest warp has threads.
SORT_TILE, SORT_EXPERTS = 8192, 64
# Bytes of weights that a program asks for before it waits: what the memory sends while one launch follows another.
AHEAD_BYTES = 65_536
# Parts of rows that a program of the last sum reads at once, and columns of it: for few tokens, and for many.
COMBINE_FEW, COMBINE_MANY = (32, 256), (16, 1024)
# Rows an expert, and columns of the first product, from which on copying rows side by side pays.
NEIGHBOUR_ROWS, NEIGHBOUR_COLUMNS = 256, 4096
# Rows of a program that brings them into order: a few wide ones where they are copied.
ROWS_QUANTISED, ROWS_COPIED, COPIED_COLUMNS = 16, 4, 1024


class Tiles(NamedTuple):
    """One cut of `few_kernel`; of `FewConfig`, and the launch's options."""

    block_r: int
    block_k: int
    num_stages: int
    num_warps: int
    weights_left: bool
    splits: int


def token_class(tokens: int) -> int:
    """Numbers of tokens that are cut alike: up to the next power of two."""
    return int(triton.next_power_of_2(tokens))


def block_m(spec: MoESpec, arch: Arch, tokens: int) -> int:
    """Rows of a tile: what hardly an expert has more of, where tokens go anywhere; one with more takes several turns.

    The mean and two deviations. Where blocks have sums of their own registers hold fewer.
    """
    most = 64
    if spec.kind == "fp8_block":
        most = 32 if arch.converts_to_fp8 else 16
    mean = token_class(tokens) * spec.top_k / spec.num_experts
    rows = int(triton.next_power_of_2(math.ceil(mean + 2 * mean**0.5 + 1)))
    return min(max(min(rows, token_class(tokens)), 16), most)


def slots_of(spec: MoESpec, tokens: int) -> int:
    """Experts that `tokens` tokens can go to."""
    return min(tokens * spec.top_k, spec.num_experts)


def default_tiles(spec: MoESpec, arch: Arch, tokens: int, first: bool) -> Tiles:
    """By rule: tiles of 16 KB, three or four on their way; enough programs that the memory never rests.

    On Hopper small ones of 4-bit weights: programs that decode keep each other company.
    """
    bits = {"plain": 8 * spec.weight_dtype.itemsize, "mxfp4": 4}.get(spec.kind, 8)
    many_rows = block_m(spec, arch, tokens) > 32
    decoded = bits == 4 and arch.has_wgmma
    block_k = 64 if decoded or bits > 16 else 128
    block_r = 128 if bits == 8 and arch.has_wgmma else 64
    # Weights that are converted in registers want more threads, and so do sums beside those of a block of 32 rows.
    as_stored = bits >= 16 or (spec.kind == "fp8_block" and arch.converts_to_fp8 and block_m(spec, arch, tokens) == 16)
    num_warps = 4 if as_stored or decoded else 8
    if many_rows and not arch.has_wgmma:
        num_warps = 8
    depth = spec.hidden_size if first else spec.intermediate_size
    splits = 1
    if not first:
        programs = slots_of(spec, token_class(tokens)) * triton.cdiv(spec.hidden_size, block_r)
        splits = max(1, min(triton.cdiv(WAVES * arch.num_sms, programs), depth // (4 * block_k), MAX_SPLITS))
    if spec.kind in ("plain", "fp8_tensor"):
        block_k, splits = _without_rest(depth, block_k, splits)
    stages = 3 if many_rows else 6 if decoded else 4
    # Shared memory holds the tiles of both sides.
    itemsize = 1 if spec.kind == "fp8_block" else spec.dtype.itemsize if first else spec.hidden_dtype.itemsize
    row_bytes = block_k * itemsize * block_m(spec, arch, tokens)
    room = (arch.smem_bytes or 1 << 20) // 2 if arch.smem_bytes > 120_000 else arch.smem_bytes or 1 << 20
    while stages > 2 and stages * (block_r * block_k * bits // 8 + row_bytes) > room:
        stages -= 1
    return Tiles(block_r, block_k, stages, num_warps, arch.has_wgmma, splits)


def _without_rest(depth: int, block_k: int, splits: int) -> tuple[int, int]:
    """Columns of a tile, half as many or about as many splits as asked for, so that all tiles are full: no masks."""
    for parts in range(splits, splits // 2, -1):
        for columns in (block_k, block_k // 2):
            if depth % (columns * parts) == 0:
                return columns, parts
    return block_k, splits


def candidates(spec: MoESpec, arch: Arch, tokens: int, first: bool) -> list[Tiles]:
    """What is worth measuring, the default first."""
    default = default_tiles(spec, arch, tokens, first)
    found = [default]
    depths = (128,) if spec.kind == "fp8_block" else (default.block_k // 2, default.block_k, 2 * default.block_k)
    for block_r in (32, 64, 128):
        for block_k in depths:
            for left in (True, False):
                for splits in {1, default.splits, 2 * default.splits} if not first else {1}:
                    stages = 3 if block_r * block_k > default.block_r * default.block_k else default.num_stages
                    warps = 8 if block_r == 128 else 4
                    if left and block_r < 64:
                        continue
                    if splits <= MAX_SPLITS:
                        found.append(Tiles(block_r, block_k, stages, warps, left, splits))
    return list(dict.fromkeys(found))


def tuning_key(spec: MoESpec, tokens: int, first: bool) -> str:
    """What measured tiles are filed under."""
    sizes = f"{spec.num_experts}x{spec.hidden_size}x{spec.intermediate_size}_k{spec.top_k}"
    kind = f"{spec.kind}_{str(spec.dtype).removeprefix('torch.')}{'_gated' if spec.gated else ''}"
    return f"moe_few_{1 if first else 2}/{kind}/{sizes}/t{token_class(tokens)}"


def tiles_of(spec: MoESpec, arch: Arch, tokens: int, first: bool) -> Tiles:
    """The measured ones, or the default."""
    return _tiles_of(spec, arch, token_class(tokens), first, generation())


@lru_cache(maxsize=4096)
def _tiles_of(spec: MoESpec, arch: Arch, tokens: int, first: bool, generation: int) -> Tiles:
    found = chosen(tuning_key(spec, tokens, first), arch, candidates(spec, arch, tokens, first))
    return found or default_tiles(spec, arch, tokens, first)


def few_config(spec: MoESpec, arch: Arch, tokens: int, tiles: Tiles, first: bool, early: bool) -> FewConfig:
    """The compiled form of one product."""
    scans = tokens * spec.top_k <= SCAN
    return FewConfig(
        first=first,
        fp4=spec.kind == "mxfp4",
        fp8=spec.kind in ("fp8_tensor", "fp8_block"),
        blocks=spec.kind == "fp8_block",
        width=spec.intermediate_size if first else spec.hidden_size,
        depth=spec.hidden_size if first else spec.intermediate_size,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        gated=first and spec.gated,
        block_r=tiles.block_r,
        block_m=block_m(spec, arch, tokens),
        block_k=tiles.block_k,
        splits=tiles.splits,
        scan=SCAN if scans else 0,
        by_expert=not scans or tokens * spec.top_k >= spec.num_experts,
        weights_left=tiles.weights_left,
        scale_rows=spec.scale_rows[0 if first else 1],
        fp8_out=first and spec.kind == "fp8_tensor",
        native_fp8=arch.converts_to_fp8,
        fp4_pairs=arch.is_nvidia,
        num_stages=tiles.num_stages,
        early=early,
        ahead=ahead_of(spec, tiles, first) if early else 0,
    )


def ahead_of(spec: MoESpec, tiles: Tiles, first: bool) -> int:
    """Columns of weights to ask for early; the first product follows another launch only where x is quantised."""
    if first and spec.kind != "fp8_block":
        return 0
    bits = 4 if spec.kind == "mxfp4" else 8 * spec.weight_dtype.itemsize
    return AHEAD_BYTES // tiles.block_r * 8 // bits


def combine_config(spec: MoESpec, splits: int, few: bool, early: bool) -> CombineConfig:
    parts, columns = COMBINE_FEW if few else COMBINE_MANY
    block = min(columns, max(128, int(triton.next_power_of_2(spec.hidden_size))))
    together = min(max(1, parts // splits), spec.top_k)
    return CombineConfig(spec.hidden_size, spec.num_experts, spec.top_k, splits, block, together, early)


def rows_config(arch: Arch, quantise: bool, early: bool) -> RowsConfig:
    rows, columns = (ROWS_QUANTISED, BLOCK) if quantise else (ROWS_COPIED, COPIED_COLUMNS)
    return RowsConfig(rows, columns, quantise, arch.converts_to_fp8, early)


def pays_for_neighbours(spec: MoESpec, arch: Arch, num_pairs: int) -> bool:
    """Whether rows side by side, which TMA brings faster than threads gather them, save more than a copy of them costs.

    They save about 7 % of a product of 16-bit rows that multiplies all the time (bench/results/trial-tails.txt), 13 %
    with 4-bit weights (trial-fp4-hopper.txt).
    """
    many = num_pairs >= NEIGHBOUR_ROWS * spec.num_experts
    by_map = arch.has_wgmma and spec.dtype.itemsize == 2 and spec.hidden_size * 2 % MAP_BYTES == 0
    return by_map and many and spec.fc1_rows >= NEIGHBOUR_COLUMNS


def sort_config(spec: MoESpec, early: bool) -> SortConfig:
    experts = max(SORT_EXPERTS, int(triton.next_power_of_2(spec.num_experts)))
    blocks = max(1, min(64, SORT_TILE // experts))
    return SortConfig(spec.num_experts, spec.top_k, experts, SORT_CHUNK, blocks, early)


def sort_blocks(num_pairs: int) -> tuple[int, int]:
    """(blocks, pairs of each)."""
    per_block = SORT_ALONE
    if num_pairs > SORT_ALONE:
        per_block = SORT_CHUNK * triton.cdiv(num_pairs, SORT_CHUNK * MAX_SORT_BLOCKS)
    return triton.cdiv(num_pairs, per_block), per_block
