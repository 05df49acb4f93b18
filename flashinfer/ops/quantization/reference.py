"""Conversions between numbers and few bits, in plain torch: no host sync on a GPU, any strides."""

from __future__ import annotations

import torch
from torch.nn import functional

from flashinfer.ops.quantization.spec import Fp4, Fp4Pages, SfLayout, e2m1_codes, scale_offset


def _bytes(bits: torch.Tensor, little: bool) -> torch.Tensor:
    """uint8 `[n]` of bool `[n, 8]`; the first bit has weight 1 if `little`, else 128."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    if not little:
        place = 7 - place
    return (bits.to(torch.uint8) << place).sum(dim=1, dtype=torch.uint8)


@torch.no_grad()
def packbits(out: torch.Tensor, x: torch.Tensor, little: bool) -> None:
    """uint8 `[ceil(n / 8)]` of a mask `[n]`, the last byte filled with zeros."""
    padded = functional.pad(x != 0, (0, -x.numel() % 8))
    out.copy_(_bytes(padded.view(-1, 8), little))


@torch.no_grad()
def segment_packbits(
    out: torch.Tensor, x: torch.Tensor, indptr: torch.Tensor, byte_indptr: torch.Tensor, little: bool
) -> None:
    """Segment i of a mask fills bytes `byte_indptr[i]` to `byte_indptr[i + 1]`; bytes past the last are 0."""
    if x.numel() == 0:
        out.zero_()
        return
    byte = torch.arange(out.numel(), device=x.device)
    segment = torch.searchsorted(byte_indptr[1:], byte, right=True).clamp(max=indptr.numel() - 2)
    first_bit = indptr[segment] + 8 * (byte - byte_indptr[segment])
    bit = first_bit[:, None] + torch.arange(8, device=x.device)
    inside = bit < indptr[segment + 1][:, None]
    out.copy_(_bytes((x[bit.clamp(max=x.numel() - 1)] != 0) & inside, little))


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 to fp8 or int8: nearest even, saturating; NaN stays in fp8 and gives 0 in int8."""
    if dtype == torch.int8:
        return x.nan_to_num(nan=0.0).round().clamp(-128, 127).to(dtype)
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


@torch.no_grad()
def quantize_groups(out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, eps: float, power_of_two: bool) -> None:
    """Groups of a row `[rows, groups, group_size]` by the largest magnitude of each, NaN left aside."""
    limit = 127.0 if out.dtype == torch.int8 else torch.finfo(out.dtype).max
    wide = x.float()
    # A tensor, since a division by a number may become a product with its inverse.
    divisor = torch.full((), limit, dtype=torch.float32, device=x.device)
    scale = wide.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1).clamp(min=eps) / divisor
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    scales.copy_(scale)
    out.copy_(_rounded(wide / scale[..., None], out.dtype))


@torch.no_grad()
def quantize_by_scale(out: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    """Everything over one scale, fp32 `[1]`."""
    out.copy_(_rounded(x.float() / scale, out.dtype))


@torch.no_grad()
def dequantize_groups(out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor) -> None:
    """Groups `[rows, groups, group_size]` times their scales `[rows, groups]`."""
    out.copy_(x.float() * scales[..., None])


def _e2m1(x: torch.Tensor) -> torch.Tensor:
    """fp32 `[..., 2 * n]` of bytes `[..., n]`, the first of a pair in the low bits."""
    codes = torch.stack([x & 15, x >> 4], dim=-1).flatten(-2).int()
    exponent, last = codes >> 1 & 3, (codes & 1) / 2
    magnitudes = torch.where(exponent == 0, last, torch.ldexp(1 + last, exponent - 1))
    return torch.where(codes >= 8, -magnitudes, magnitudes)


@torch.no_grad()
def dequantize_fp4_pages(out: torch.Tensor, cache: Fp4Pages, table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """The tokens of each request, one behind the other; what lies behind its length stays as it is."""
    codes, scales, global_scale = cache
    page_size, position = codes.shape[1], torch.arange(out.shape[1], device=out.device)
    inside = position < seq_lens[:, None]
    entry = (position // page_size).clamp(max=table.shape[1] - 1).expand_as(inside)
    page = torch.where(inside, table.gather(1, entry), 0)
    slot = (position % page_size).expand_as(inside)
    # fp8 tensors cannot be indexed on every device; their bytes can.
    factor = scales.view(torch.uint8)[page, slot].view(torch.float8_e4m3fn).float() * global_scale
    values = _e2m1(codes[page, slot]) * factor.repeat_interleave(16, dim=-1)
    out.copy_(torch.where(inside[..., None, None], values.to(out.dtype), out))


@torch.no_grad()
def dequantize_fp4(
    out: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor | None, kind: Fp4
) -> None:
    """Codes `[rows, columns / 2]`, the first of a pair in the low bits, times their block's scale and the global."""
    values = _e2m1(x)
    num_rows, num_columns = values.shape[0], values.shape[1] // kind.group_size
    row = torch.arange(num_rows, device=x.device)[:, None]
    column = torch.arange(num_columns, device=x.device)
    found = scales.view(torch.uint8).reshape(-1)[scale_offset(row, column, num_columns, kind.layout)]
    if kind.ue8m0:
        factor = torch.ldexp(torch.ones(found.shape, device=x.device), found.int() - 127)
        factor = factor.masked_fill(found == 255, torch.nan)
    else:
        factor = found.view(torch.float8_e4m3fn).float()
    if global_scale is not None:
        factor = factor * global_scale
    out.copy_(values * factor.repeat_interleave(kind.group_size, dim=1))


@torch.no_grad()
def quantize_fp4(
    out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, global_scale: torch.Tensor | None, layout: SfLayout
) -> None:
    """Blocks of 16 by the largest magnitude of each, NaN left aside."""
    blocks = x.float().unflatten(-1, (-1, 16))
    # A tensor, since a division by a number may become a product with its inverse.
    six = torch.full((), 6.0, dtype=torch.float32, device=x.device)
    factor = torch.ones((), device=x.device) if global_scale is None else global_scale.view(())
    largest = blocks.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1)
    stored = (factor * (largest / six)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    divisor = (stored.float() / factor)[..., None]
    code = e2m1_codes(torch.where(stored.float()[..., None] == 0, 0.0, blocks / divisor)).flatten(-2)
    out.copy_(code[..., ::2] | code[..., 1::2] << 4)
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    column = torch.arange(stored.shape[1], device=x.device)
    scales[scale_offset(row, column, stored.shape[1], layout)] = stored.view(torch.uint8)


@torch.no_grad()
def concat_heads(k: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor) -> None:
    """`k[..., :nope] = k_nope` and `k[..., nope:] = k_rope` for every head."""
    nope = k_nope.shape[2]
    k[..., :nope].copy_(k_nope)
    k[..., nope:].copy_(k_rope.expand(-1, k.shape[1], -1))
