"""Launch of the rotation kernel."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

from flashinfer.core.arch import Arch, arch_of
from flashinfer.core.check import FP8_MANTISSA_BITS
from flashinfer.core.launch import Prebound, alignment, integer_classes
from flashinfer.ops.rope.spec import Move, RopeSpec, Rotation
from flashinfer.ops.rope.triton.kernel import AngleView, Factors, Part, RopeConfig, Table, Target, View, rope_kernel

# A program of 128 threads moves about this many elements of q: 32 a thread, four 16-byte vectors in half precision.
TILE = 4096
MAX_TOKENS = 16
NUM_WARPS = 4
_launch = Prebound(rope_kernel)


def block(dim: int) -> int:
    """The tile for `dim` components; 0 for none."""
    return triton.next_power_of_2(dim) if dim else 0


@lru_cache(maxsize=4096)
def configure(spec: RopeSpec, arch: Arch, search_steps: int) -> tuple[RopeConfig, int]:
    """The kernel's configuration and the number of head blocks."""
    block_half = block(spec.rotary_dim // 2)
    width = 2 * block_half + block(spec.q_rest)
    most = max(1, TILE // width)
    head_blocks = max(1, triton.cdiv(spec.num_qo_heads, most))
    block_q = block(max(1, triton.cdiv(spec.num_qo_heads, head_blocks)))
    head_blocks = max(1, triton.cdiv(spec.num_qo_heads, block_q))
    block_k = block(max(1, triton.cdiv(spec.num_kv_heads, head_blocks)))
    head_blocks = max(head_blocks, triton.cdiv(spec.num_kv_heads, block_k))
    cfg = RopeConfig(
        spec.num_qo_heads,
        spec.num_kv_heads,
        spec.rotary_dim,
        spec.q_rest,
        spec.k_rest,
        spec.v_dim,
        spec.interleave,
        spec.tabulated,
        search_steps,
        FP8_MANTISSA_BITS.get(spec.out_dtype, 0),
        arch.converts_to_fp8,
        1 << min(MAX_TOKENS, max(1, TILE // (block_q * width))).bit_length() - 1,
        block_q,
        block_k,
        block_half,
        block(spec.q_rest),
        block(spec.k_rest),
        block(spec.v_dim),
    )
    return cfg, head_blocks


def _part(move: Move | None, paged: bool) -> Part | None:
    if move is None:
        return None
    source, target = move
    if target.element_size() == 1:
        target = target.view(torch.uint8)
    strides = target.stride() if paged else (0, *target.stride())
    return Part(View(source, *source.stride()[:2]), Target(target, *strides[:3]))


def rotate(spec: RopeSpec, rotation: Rotation) -> None:
    """Rotate q and k, copy what is not rotated, write every target: one launch, no host sync."""
    q, k, angle, v, table, weights = rotation
    source = q.rope.source
    batch_size = 0 if angle.offsets is None else angle.offsets.shape[0]
    # Even an empty batch takes a step, so that its one compiled form does not read positions.
    steps = 0 if angle.offsets is None else max(1, batch_size.bit_length())
    cfg, head_blocks = configure(spec, arch_of(source.device), steps)
    parts = (
        _part(q.rope, False),
        _part(q.rest, False),
        _part(k.rope, spec.paged),
        _part(k.rest, spec.paged),
        _part(v, spec.paged),
    )
    pages = None if table is None else Table(*table, k.rope.target.shape[1])
    q_weight, k_weight, eps = (None, None, 0.0) if weights is None else weights
    stride = angle.table.stride(0)
    strides: tuple[int, ...] = (stride, batch_size, 0 if pages is None else pages.page_size)
    tensors = [angle.table, angle.positions, angle.offsets, q_weight, k_weight, *(table or ())]
    for part in parts:
        if part is not None:
            (read, *from_strides), (written, *to_strides) = part
            strides += (*from_strides, *to_strides)
            tensors += (read, written)
    dtypes = tuple([x.dtype for x in tensors if x is not None])
    num_tokens = source.shape[0]
    _launch(
        (triton.cdiv(num_tokens, cfg.block_tokens), head_blocks, 1),
        (spec, steps, integer_classes(strides), dtypes, alignment(*tensors)),
        (
            *parts,
            AngleView(angle.table, stride, angle.positions, angle.offsets, batch_size),
            pages,
            Factors(q.scale, k.scale, q_weight, k_weight, eps),
            num_tokens,
            cfg,
        ),
        source.device,
        num_warps=NUM_WARPS,
    )
