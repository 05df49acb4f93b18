"""Launch of the rotation kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

from flashinfer.core.arch import Arch
from flashinfer.core.check import FP8_DTYPES, FP8_MANTISSA_BITS
from flashinfer.core.launch import Prebound, alignment, integer_classes
from flashinfer.ops.rope.spec import RopeSpec, Rotation
from flashinfer.ops.rope.triton.kernel import (
    AllStrides,
    AngleView,
    Data,
    Factors,
    RopeConfig,
    Strides,
    Table,
    rope_kernel,
)

# A program of 128 threads moves about this many elements of q: 32 a thread, four 16-byte vectors in half precision.
TILE = 4096
# Where such tiles would be too few to give every multiprocessor one.
FEW_TILE = 1024
MAX_TOKENS = 16
NUM_WARPS = 4
_launch = Prebound(rope_kernel)


def block(dim: int) -> int:
    """The tile for `dim` components; 0 for none."""
    return triton.next_power_of_2(dim) if dim else 0


@lru_cache(maxsize=4096)
def configure(spec: RopeSpec, arch: Arch, few: bool) -> tuple[RopeConfig, int]:
    """The kernel's configuration and the number of head blocks. few: whether large tiles would be too few."""
    tile = FEW_TILE if few else TILE
    block_half = block(spec.rotary_dim // 2)
    width = 2 * block_half + block(spec.q_rest)
    most = max(1, tile // width)
    head_blocks = max(1, -(-spec.num_qo_heads // most))
    block_q = block(max(1, -(-spec.num_qo_heads // head_blocks)))
    head_blocks = max(1, -(-spec.num_qo_heads // block_q))
    block_k = block(max(1, -(-spec.num_kv_heads // head_blocks)))
    head_blocks = max(head_blocks, -(-spec.num_kv_heads // block_k))
    cfg = RopeConfig(
        spec.num_qo_heads,
        spec.num_kv_heads,
        spec.rotary_dim,
        spec.q_rest,
        spec.k_rest,
        spec.v_dim,
        spec.interleave,
        spec.tabulated,
        spec.ragged,
        FP8_MANTISSA_BITS.get(spec.out_dtype, 0),
        arch.converts_to_fp8,
        1 << min(MAX_TOKENS, max(1, tile // (block_q * width))).bit_length() - 1,
        block_q,
        block_k,
        block_half,
        block(spec.q_rest),
        block(spec.k_rest),
        block(spec.v_dim),
    )
    return cfg, head_blocks


@dataclass(frozen=True, eq=False)
class Layout:
    """What a launch takes of strides and sizes. Compared by identity, so that it makes a key at no cost."""

    cfg: RopeConfig
    head_blocks: int
    strides: AllStrides
    classes: Hashable


def _strides(pair: tuple[tuple[int, ...], tuple[int, ...]] | None) -> Strides | None:
    """From the strides of source and target."""
    if pair is None:
        return None
    source, target = pair
    written = target[:3] if len(target) == 4 else (0, *target[:2])
    return Strides(source[0], source[1], *written)


def bind(spec: RopeSpec, arch: Arch) -> Callable[[Rotation], None]:
    """The call for one kind of rotation: one launch, no host sync."""

    @lru_cache(maxsize=4096)
    def layout(few: bool, table_stride: int, page_size: int, *pairs: Any) -> Layout:
        cfg, head_blocks = configure(spec, arch, few)
        parts = AllStrides(*(_strides(pair) for pair in pairs))
        flat = [n for part in parts if part is not None for n in part]
        return Layout(cfg, head_blocks, parts, integer_classes((table_stride, page_size, *flat)))

    def run(rotation: Rotation) -> None:
        q, k, angle, v, table, weights = rotation
        steps = batch_size = 0
        if angle.offsets is not None:
            batch_size = angle.offsets.shape[0]
            steps = batch_size.bit_length()
        moves = (q.rope, k.rope, q.rest, k.rest, v)
        stride, page_size = angle.table.stride(0), 0 if table is None else k.rope.target.shape[1]
        pairs = [None if move is None else (move.source.stride(), move.target.stride()) for move in moves]
        num_tokens = q.rope.source.shape[0]
        few = num_tokens * spec.num_qo_heads * (spec.rotary_dim + spec.q_rest) < TILE * arch.num_sms
        found = layout(few, stride, page_size, *pairs)
        tensors = [x for move in moves for x in (move or (None, None))]
        data = Data(*(tensors if spec.out_dtype not in FP8_DTYPES else map(_bytes, tensors)))
        q_weight, k_weight, eps = (None, None, 0.0) if weights is None else weights
        indices = () if table is None else table
        aligned = alignment(*data, *angle, q_weight, k_weight, *indices)
        _launch(
            (-(-num_tokens // found.cfg.block_tokens), found.head_blocks, 1),
            (found, angle.positions.dtype, integer_classes((batch_size, steps)), aligned),
            (
                data,
                found.strides,
                AngleView(angle.table, stride, angle.positions, angle.offsets, batch_size, steps),
                None if table is None else Table(*table, page_size),
                Factors(q.scale, k.scale, q_weight, k_weight, eps),
                num_tokens,
                found.cfg,
            ),
            data.q.device,
            num_warps=NUM_WARPS,
        )

    return run


def _bytes(x: torch.Tensor | None) -> torch.Tensor | None:
    """fp8 seen as uint8."""
    return x.view(torch.uint8) if x is not None and x.dtype in FP8_DTYPES else x
