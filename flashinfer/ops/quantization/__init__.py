"""Conversions between numbers and few bits: bit masks, fp8 and int8 with scales, fp4."""

from __future__ import annotations

from types import ModuleType

import torch
from torch.nn import functional

from flashinfer.core import check, library
from flashinfer.core.select import Choice, Impl
from flashinfer.ops.quantization.spec import (
    Fp4,
    Fp4Pages,
    QuantSpec,
    SfLayout,
    e2m1_codes,
    scale_offset,
    scales_needed,
)
from flashinfer.ops.quantization.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.quantization.triton", triton_supports),
    Impl("torch", "flashinfer.ops.quantization.reference", torch_supports),
)


CHOICE = Choice(IMPLS)


def _chosen(call: str, x: torch.Tensor, out: torch.Tensor) -> ModuleType:
    return CHOICE.module(QuantSpec(call, x.dtype, out.dtype), x.device)


@library.register("packbits(Tensor(a!) out, Tensor x, bool little) -> ()")
def packbits(out: torch.Tensor, x: torch.Tensor, little: bool) -> None:
    """uint8 `[ceil(n / 8)]` of a mask `[n]` (non-zero is True), the last byte filled with zeros."""
    if x.shape[0] > 0:
        _chosen("packbits", x, out).packbits(out, x, little)


def packed_indptr(indptr: torch.Tensor) -> torch.Tensor:
    """Byte offsets `[batch_size + 1]` of segments with bit offsets `indptr`, each segment starting on a byte."""
    num_bytes = torch.div(indptr.diff() + 7, 8, rounding_mode="floor")
    return functional.pad(num_bytes.cumsum(0, dtype=indptr.dtype), (1, 0))


def moved(indptr: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`indptr` on `device`, from pinned memory, so that nothing waits for the copy."""
    if indptr.device == device:
        return indptr
    return indptr.pin_memory().to(device, non_blocking=True)


@library.register("segment_packbits(Tensor(a!) out, Tensor x, Tensor indptr, Tensor byte_indptr, bool little) -> ()")
def fill_segments(
    out: torch.Tensor, x: torch.Tensor, indptr: torch.Tensor, byte_indptr: torch.Tensor, little: bool
) -> None:
    """Segment i of mask `x` fills bytes `byte_indptr[i]` to `byte_indptr[i + 1]`; the rest of `out` is 0."""
    if out.shape[0] > 0:
        _chosen("segment_packbits", x, out).segment_packbits(out, x, indptr, byte_indptr, little)


def segment_packbits(
    x: torch.Tensor, indptr: torch.Tensor, byte_indptr: torch.Tensor, num_bytes: int, bitorder: str
) -> torch.Tensor:
    """uint8 `[num_bytes]`: segment i of mask `x` fills bytes `byte_indptr[i]` to `byte_indptr[i + 1]`.

    num_bytes: at least `byte_indptr[-1]`, known on the host (the rest is 0); nothing here waits for the device.
    """
    out = torch.empty(num_bytes, dtype=torch.uint8, device=x.device)
    fill_segments(out, x.contiguous(), indptr.contiguous(), byte_indptr, bitorder == "little")
    return out


@torch.no_grad()
def tensor_scale(x: torch.Tensor, dtype: torch.dtype, eps: float) -> torch.Tensor:
    """fp32 `[1]`: `max(largest |x|, eps) / largest code` of `dtype`; a NaN does not count."""
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    magnitude = x.abs().nan_to_num(nan=0.0, posinf=torch.inf).float().flatten()
    largest = magnitude.amax(dim=0, keepdim=True) if x.numel() else magnitude.new_zeros(1)
    return largest.clamp(min=eps) / limit


@torch.no_grad()
def interleave_scales(scales: torch.Tensor) -> torch.Tensor:
    """Block scales `[batch, rows, blocks]` in tiles of 128 x 4 (`scale_offset`), flat, padding zero."""
    batch, num_rows, num_columns = scales.shape
    padded = functional.pad(scales, (0, -num_columns % 4, 0, -num_rows % 128))
    tiles = padded.view(batch, -1, 4, 32, padded.shape[2] // 4, 4)
    return tiles.permute(0, 1, 4, 3, 2, 5).reshape(-1)


@torch.no_grad()
def linear_scales(scales: torch.Tensor, num_rows: int, num_columns: int, layout: SfLayout) -> torch.Tensor:
    """Block scales `[rows, columns]`, row by row, of scales in the order `layout`; dtype as given."""
    row = torch.arange(num_rows, device=scales.device)[:, None]
    column = torch.arange(num_columns, device=scales.device)
    found = scales.contiguous().view(torch.uint8).reshape(-1)[scale_offset(row, column, num_columns, layout)]
    return found.view(scales.dtype)


@library.register("quantize_groups(Tensor(a!) out, Tensor(b!) scales, Tensor x, float eps, bool power_of_two) -> ()")
def quantize_groups(out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, eps: float, power_of_two: bool) -> None:
    """`scales = max(largest |x|, eps) / limit` of a group, if asked rounded up to a power of two; `out = x / scales`.

    out (fp8 or int8, contiguous), x `[rows, groups, group_size]`; scales fp32 `[rows, groups]`, any strides. A NaN does
    not count for the scale and stays NaN (0 in int8).
    """
    if x.numel() > 0:
        _chosen("quantize_groups", x, out).quantize_groups(out, scales, x, eps, power_of_two)


@library.register("quantize_by_scale(Tensor(a!) out, Tensor x, Tensor scale) -> ()")
def quantize_by_scale(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    """`out = x / scale`, fp8 or int8. x contiguous, scale fp32 `[1]`."""
    if x.numel() > 0:
        _chosen("quantize_by_scale", x, out).quantize_by_scale(out, x, scale)


@library.register("dequantize_groups(Tensor(a!) out, Tensor x, Tensor scales) -> ()")
def dequantize_groups(out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor) -> None:
    """`out = x * scales` for groups `[rows, groups, group_size]` of fp8 or int8; scales fp32 `[rows, groups]`."""
    if x.numel() > 0:
        _chosen("dequantize_groups", x, out).dequantize_groups(out, x, scales)


@library.register(
    "dequantize_fp4(Tensor(a!) out, Tensor x, Tensor scales, Tensor? global_scale, int group_size, bool ue8m0, "
    "int layout) -> ()"
)
def dequantize_fp4(
    out: torch.Tensor,
    x: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor | None,
    group_size: int,
    ue8m0: bool,
    layout: int,
) -> None:
    """`out [rows, columns]` = e2m1 codes `x [rows, columns / 2]` times block scales (bytes) and the global scale."""
    if x.numel() > 0:
        kind = Fp4(group_size, ue8m0, SfLayout(layout))
        _chosen("dequantize_fp4", x, out).dequantize_fp4(out, x, scales, global_scale, kind)


@library.register("quantize_fp4(Tensor(a!) out, Tensor(b!) scales, Tensor x, Tensor? global_scale, int layout) -> ()")
def quantize_fp4(
    out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, global_scale: torch.Tensor | None, layout: int
) -> None:
    """NVFP4: the scale of 16 numbers is `global_scale * largest |x| / 6` in e4m3, codes `x * global_scale / scale`.

    out: uint8 `[rows, columns / 2]`, the first of a pair in the low bits. scales: bytes, flat, in the order `layout`;
    what lies between them stays. x `[rows, columns]`, contiguous. global_scale: fp32 of one element, None for 1. A NaN
    does not count for the scale and gives 6.
    """
    if x.numel() > 0:
        _chosen("quantize_fp4", x, out).quantize_fp4(out, scales, x, global_scale, SfLayout(layout))


@library.register(
    "dequantize_fp4_pages(Tensor(a!) out, Tensor codes, Tensor scales, Tensor global_scale, Tensor table, "
    "Tensor seq_lens) -> ()"
)
def dequantize_fp4_pages(
    out: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor,
    table: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """`out [batch, max_seq_len, num_heads, head_dim]` of `Fp4Pages`, found through `table` `[batch, pages]`.

    What lies behind `seq_lens` `[batch]` stays as it is.
    """
    if seq_lens.is_cpu:
        check.index_range("seq_lens", seq_lens, 0, min(out.shape[1], table.shape[1] * codes.shape[1]) + 1)
        used = torch.arange(table.shape[1]) * codes.shape[1] < seq_lens[:, None]
        check.index_range("block_tables", table[used], 0, codes.shape[0])
    if out.numel() > 0 and table.numel() > 0:
        pages = Fp4Pages(codes, scales, global_scale)
        _chosen("dequantize_fp4_pages", codes, out).dequantize_fp4_pages(out, pages, table, seq_lens)


@library.register("concat_mla_k(Tensor(a!) k, Tensor k_nope, Tensor k_rope) -> ()")
def concat_heads(k: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor) -> None:
    """`k [nnz, num_heads, nope + rope]` from `k_nope` of each head and `k_rope` `[nnz, 1, rope]` of all."""
    if k.numel() > 0:
        _chosen("concat_mla_k", k, k).concat_heads(k, k_nope, k_rope)


__all__ = [
    "CHOICE",
    "IMPLS",
    "Fp4",
    "Fp4Pages",
    "QuantSpec",
    "SfLayout",
    "concat_heads",
    "dequantize_fp4",
    "dequantize_fp4_pages",
    "dequantize_groups",
    "e2m1_codes",
    "interleave_scales",
    "linear_scales",
    "moved",
    "packbits",
    "packed_indptr",
    "quantize_by_scale",
    "quantize_groups",
    "scale_offset",
    "scales_needed",
    "segment_packbits",
    "tensor_scale",
]
