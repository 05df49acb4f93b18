"""Launches of the kernels of this folder: one each, no host sync."""

from __future__ import annotations

import torch
import triton

from flashinfer.core.arch import arch_of
from flashinfer.core.check import FP8_DTYPES, FP8_MANTISSA_BITS
from flashinfer.core.launch import Prebound, alignment, integer_classes
from flashinfer.ops.quantization.spec import Fp4, Fp4Pages, SfLayout
from flashinfer.ops.quantization.triton.kernel import (
    Groups,
    Scales,
    Tokens,
    concat_heads_kernel,
    dequantize_fp4_kernel,
    dequantize_fp4_pages_kernel,
    dequantize_groups_kernel,
    packbits_kernel,
    quantize_by_scale_kernel,
    quantize_fp4_kernel,
    quantize_groups_kernel,
    segment_packbits_kernel,
)

NUM_WARPS = 4
BLOCK_BYTES = 512
# Elements of a program: 16 for each of 128 threads, two 16-byte vectors in half precision.
TILE = 2048
TILE_ROWS = {SfLayout.layout_128x4: 128, SfLayout.layout_8x4: 8, SfLayout.layout_linear: 1}
_launch_packbits = Prebound(packbits_kernel)
_launch_segments = Prebound(segment_packbits_kernel)
_launch_quantize_groups = Prebound(quantize_groups_kernel)
_launch_quantize_by_scale = Prebound(quantize_by_scale_kernel)
_launch_dequantize_groups = Prebound(dequantize_groups_kernel)
_launch_quantize_fp4 = Prebound(quantize_fp4_kernel)
_launch_dequantize_fp4 = Prebound(dequantize_fp4_kernel)
_launch_dequantize_fp4_pages = Prebound(dequantize_fp4_pages_kernel)
_launch_concat = Prebound(concat_heads_kernel)


def block_of(group_size: int) -> tuple[int, int, int]:
    """(groups of a program, their tile, warps): at least one group, and more warps for a large one."""
    block = triton.next_power_of_2(group_size)
    return max(1, TILE // block), block, min(16, max(NUM_WARPS, block // 1024))


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """bool and fp8 as uint8."""
    return x.view(torch.uint8) if x.dtype == torch.bool or x.dtype in FP8_DTYPES else x


def packbits(out: torch.Tensor, x: torch.Tensor, little: bool) -> None:
    """uint8 `[ceil(n / 8)]` of a mask `[n]`."""
    x = _bytes(x.contiguous())
    num_bits = x.shape[0]
    _launch_packbits(
        (-(-num_bits // (8 * BLOCK_BYTES)), 1, 1),
        (x.dtype, little, num_bits >= 2**31, alignment(x, out)),
        (x, out, num_bits, little, BLOCK_BYTES),
        x.device,
        num_warps=NUM_WARPS,
    )


def segment_packbits(
    out: torch.Tensor, x: torch.Tensor, indptr: torch.Tensor, byte_indptr: torch.Tensor, little: bool
) -> None:
    """Segment i of a mask fills bytes `byte_indptr[i]` to `byte_indptr[i + 1]`."""
    x = _bytes(x)
    num_segments = indptr.shape[0] - 1
    steps = num_segments.bit_length()
    _launch_segments(
        (-(-out.shape[0] // BLOCK_BYTES), 1, 1),
        (x.dtype, indptr.dtype, little, out.shape[0] >= 2**31, alignment(x, indptr, byte_indptr, out)),
        (x, indptr, byte_indptr, out, out.shape[0], num_segments, steps, little, BLOCK_BYTES),
        x.device,
        num_warps=NUM_WARPS,
    )


def quantize_groups(out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, eps: float, power_of_two: bool) -> None:
    """Groups by the largest magnitude of each."""
    num_rows, num_groups, group_size = x.shape
    limit = 127.0 if out.dtype == torch.int8 else torch.finfo(out.dtype).max
    kind = (limit, group_size, power_of_two, FP8_MANTISSA_BITS.get(out.dtype, 0), arch_of(x.device).converts_to_fp8)
    codes = _bytes(out)
    strides = (x.stride(), codes.stride(), scales.stride())
    block_groups, block, num_warps = block_of(group_size)
    _launch_quantize_groups(
        (-(-num_rows * num_groups // block_groups), 1, 1),
        (kind, x.dtype, integer_classes((*sum(strides, ()), num_groups)), alignment(x, codes, scales)),
        (
            Groups(x, *strides[0][:2]),
            Groups(codes, *strides[1][:2]),
            Scales(scales, *strides[2]),
            num_rows,
            num_groups,
            eps,
            *kind,
            block_groups,
            block,
        ),
        x.device,
        num_warps=num_warps,
    )


def quantize_by_scale(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    """Everything over one scale."""
    kind = (FP8_MANTISSA_BITS.get(out.dtype, 0), arch_of(x.device).converts_to_fp8)
    codes, num_elements = _bytes(out), x.numel()
    _launch_quantize_by_scale(
        (-(-num_elements // TILE), 1, 1),
        (kind, x.dtype, num_elements >= 2**31, alignment(x, scale, codes)),
        (x, scale, codes, num_elements, *kind, TILE),
        x.device,
        num_warps=NUM_WARPS,
    )


def dequantize_groups(out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor) -> None:
    """Groups times their scales."""
    num_rows, num_groups, group_size = x.shape
    mantissa_bits = FP8_MANTISSA_BITS.get(x.dtype, 0)
    codes = _bytes(x)
    strides = (codes.stride(), scales.stride(), out.stride())
    block_groups, block, num_warps = block_of(group_size)
    _launch_dequantize_groups(
        (-(-num_rows * num_groups // block_groups), 1, 1),
        (
            (group_size, mantissa_bits, out.dtype),
            integer_classes((*sum(strides, ()), num_groups)),
            alignment(codes, scales, out),
        ),
        (
            Groups(codes, *strides[0][:2]),
            Scales(scales, *strides[1]),
            Groups(out, *strides[2][:2]),
            num_rows,
            num_groups,
            group_size,
            mantissa_bits,
            block_groups,
            block,
        ),
        x.device,
        num_warps=num_warps,
    )


def dequantize_fp4(
    out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor | None, kind: Fp4
) -> None:
    """Codes times their block's scale and the global one."""
    num_rows, num_groups = x.shape[0], x.shape[1] * 2 // kind.group_size
    block_groups = TILE // kind.group_size
    scales = scales.view(torch.uint8)
    _launch_dequantize_fp4(
        (-(-num_rows * num_groups // block_groups), 1, 1),
        (
            kind,
            out.dtype,
            global_scale is None,
            integer_classes((num_groups,)),
            alignment(x, scales, global_scale, out),
        ),
        (
            x,
            scales,
            global_scale,
            out,
            num_rows,
            num_groups,
            kind.group_size,
            kind.ue8m0,
            TILE_ROWS[kind.layout],
            block_groups,
        ),
        x.device,
        num_warps=NUM_WARPS,
    )


def quantize_fp4(
    out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, global_scale: torch.Tensor | None, layout: SfLayout
) -> None:
    """Blocks of 16 to codes and their scales."""
    num_rows, num_groups = x.shape[0], x.shape[1] // 16
    native, block_groups = arch_of(x.device).converts_to_fp8, TILE // 16
    aligned = alignment(x, global_scale, out, scales)
    _launch_quantize_fp4(
        (-(-num_rows * num_groups // block_groups), 1, 1),
        (layout, x.dtype, global_scale is None, integer_classes((num_groups,)), aligned),
        (x, global_scale, out, scales, num_rows, num_groups, native, TILE_ROWS[layout], block_groups),
        x.device,
        num_warps=NUM_WARPS,
    )


def fp4_tile(head_dim: int) -> tuple[int, int]:
    """(head_dim rounded up, tokens of a program)."""
    block_dim = triton.next_power_of_2(head_dim)
    return block_dim, max(1, TILE // block_dim)


def dequantize_fp4_pages(out: torch.Tensor, cache: Fp4Pages, table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """The tokens of each request."""
    codes, scales, global_scale = cache
    scales = scales.view(torch.uint8)
    batch_size, max_tokens, num_heads, head_dim = out.shape
    block_dim, block_tokens = fp4_tile(head_dim)
    strides = (codes.stride()[:3], scales.stride()[:3], out.stride()[:3])
    table = table.contiguous()
    sizes = (*sum(strides, ()), table.shape[1], codes.shape[1])
    _launch_dequantize_fp4_pages(
        (-(-max_tokens // block_tokens), batch_size, num_heads),
        (
            head_dim,
            out.dtype,
            table.dtype,
            integer_classes(sizes),
            alignment(codes, scales, out, global_scale, table, seq_lens),
        ),
        (
            *(Tokens(x, *stride) for x, stride in zip((codes, scales, out), strides, strict=True)),
            global_scale,
            table,
            table.shape[1],
            seq_lens,
            codes.shape[1],
            max_tokens,
            head_dim,
            block_dim,
            block_tokens,
        ),
        out.device,
        num_warps=NUM_WARPS,
    )


def concat_heads(k: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor) -> None:
    """Both parts of each head."""
    k, k_nope, k_rope = _bytes(k), _bytes(k_nope), _bytes(k_rope)
    num_tokens, num_heads, _ = k.shape
    dims = (k_nope.shape[2], k_rope.shape[2])
    blocks = [triton.next_power_of_2(dim) for dim in dims]
    block_heads = min(triton.next_power_of_2(num_heads), max(1, 2 * TILE // sum(blocks)))
    block_heads = 1 << block_heads.bit_length() - 1
    strides = (k.stride(), k_nope.stride(), k_rope.stride())
    _launch_concat(
        (num_tokens, -(-num_heads // block_heads), 1),
        (k.dtype, dims, block_heads, integer_classes((*sum(strides, ()), num_heads)), alignment(k, k_nope, k_rope)),
        (
            *(Groups(x, *stride[:2]) for x, stride in zip((k, k_nope, k_rope), strides, strict=True)),
            num_tokens,
            num_heads,
            *dims,
            block_heads,
            *blocks,
        ),
        k.device,
        num_warps=NUM_WARPS,
    )
