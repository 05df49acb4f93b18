"""Masks as bits, numbers as fp8, int8 and fp4, with FlashInfer's names and signatures where it has them.

Rounding to 8 bits is to nearest even and saturates; NaN stays NaN in fp8 and gives 0 in int8. A scale is what the codes
are multiplied by to get the numbers back. Functions raise TypeError and ValueError for wrong arguments.
"""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.core.kv_cache import PagedKVCache, paged_views
from flashinfer.core.kv_cache import kv_layout as checked_layout
from flashinfer.core.replay import replayed
from flashinfer.ops import quantization as ops
from flashinfer.ops.quantization import SfLayout

__all__ = [
    "SfLayout",
    "block_scale_interleave",
    "dequantize_8bit",
    "e2m1_and_ufp8sf_scale_to_float",
    "int8_kv_dequantize",
    "int8_kv_quantize",
    "mxfp4_dequantize",
    "mxfp4_dequantize_host",
    "nvfp4_block_scale_interleave",
    "nvfp4_kv_dequantize",
    "nvfp4_kv_dequantize_paged",
    "packbits",
    "per_tensor_quant_8bit",
    "per_token_group_quant_8bit",
    "per_token_quant_8bit",
    "segment_packbits",
]

BITORDERS = ("big", "little")
MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)
CODE_DTYPES = (*check.FP8_DTYPES, torch.int8)
Pair = tuple[torch.Tensor, torch.Tensor]


def _mask(x: torch.Tensor, bitorder: str) -> bool:
    """Check a mask; whether its order of bits is "little"."""
    check.tensor("x", x, dtypes=MASK_DTYPES, shape=(None,))
    return bool(check.choice("bitorder", bitorder, BITORDERS) == "little")


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Pack a mask into bytes, as `numpy.packbits` does.

    x: `[n]`, bool or an integer dtype (non-zero is True). bitorder: "big" puts the first element in the highest bit of
    its byte, "little" in the lowest (what attention masks use). Returns uint8 `[ceil(n / 8)]`, zeros in the last bits.
    """
    little = _mask(x, bitorder)
    out = torch.empty((x.shape[0] + 7) // 8, dtype=torch.uint8, device=x.device)
    ops.packbits(out, x, little)
    return out


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> Pair:
    """Pack each segment of a mask into bytes of its own.

    x: `[indptr[-1]]`, bool or an integer dtype. indptr: `[batch_size + 1]`, int32 or int64, offsets of the segments in
    elements, on x's device or the host. Returns (uint8 `[new_indptr[-1]]`, new_indptr like indptr in bytes).
    With indptr on a GPU this waits for it once, so a CUDA graph cannot capture it: callers of FlashInfer rely on a
    result of exactly that size, which depends on values. With indptr on the host nothing waits.
    """
    _mask(x, bitorder)
    like = None if isinstance(indptr, torch.Tensor) and indptr.is_cpu else ("x", x)
    check.tensor("indptr", indptr, dtypes=check.POSITION_DTYPES, like=like)
    check.indptr("indptr", indptr, total=x.numel())
    byte_indptr = ops.packed_indptr(indptr)
    num_bytes = int(byte_indptr[-1])
    begins, ends = ops.moved(indptr, x.device), ops.moved(byte_indptr, x.device)
    return ops.segment_packbits(x, begins, ends, num_bytes, bitorder), byte_indptr


def _numbers(x: torch.Tensor, dst_dtype: torch.dtype | None) -> torch.dtype:
    """Check what is to be quantised; the dtype of the codes."""
    check.tensor("x", x, dtypes=check.FLOAT_DTYPES, inner_contiguous=True)
    dtype = torch.float8_e4m3fn if dst_dtype is None else dst_dtype
    check.choice("dst_dtype", dtype, CODE_DTYPES)
    return dtype


def per_token_group_quant_8bit(
    x: torch.Tensor,
    group_size: int,
    eps: float = 1e-10,
    dst_dtype: torch.dtype | None = None,
    column_major_scales: bool = False,
    scale_tma_aligned: bool = False,
    scale_ue8m0: bool = False,
    backend: str = "cutile",
) -> Pair:
    """Quantise groups of `group_size` elements of the last dimension, each by its largest magnitude.

    x: fp32, fp16 or bf16 `[..., width]`, any strides with the innermost 1, width a multiple of group_size. The scale of
    a group is `max(largest |x|, eps) / largest code`, with scale_ue8m0 rounded up to a power of two. dst_dtype: e4m3fn
    (default), e5m2 or int8. column_major_scales: for two dimensions, scales of one group of all tokens lie side by
    side; scale_tma_aligned: and those of the next begin on 16 bytes. backend: "cutile" and "auto" mean the same.
    Returns (codes like x, contiguous; fp32 scales `[..., width / group_size]`).
    """
    check.choice("backend", backend, ("auto", "cutile", "triton"))
    dtype = _numbers(x, dst_dtype)
    check.positive("group_size", group_size)
    if x.dim() == 0 or (column_major_scales and x.dim() != 2):
        expected = "2 dimensions for column_major_scales, at least 1 without"
        raise ValueError(check.problem("x", f"{x.dim()} dimensions", expected, "Reshape x."))
    check.multiple("last dimension of x", x.shape[-1], "group_size", group_size)
    if (scale_tma_aligned or scale_ue8m0) and not column_major_scales:
        name = "scale_tma_aligned" if scale_tma_aligned else "scale_ue8m0"
        raise ValueError(
            check.problem(name, True, "False without column_major_scales", "Pass column_major_scales=True.")
        )
    num_groups = x.shape[-1] // group_size
    lead = x.shape[:-1]
    if column_major_scales:
        step = 4 if scale_tma_aligned else 1
        padded = (x.shape[0] + step - 1) // step * step
        scales = torch.empty((num_groups, padded), dtype=torch.float32, device=x.device).t()[: x.shape[0]]
    else:
        scales = torch.empty((*lead, num_groups), dtype=torch.float32, device=x.device)
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() > 0:
        _quantize_groups(codes, scales, x, group_size, float(eps), scale_ue8m0)
    return codes, scales


@replayed
def _quantize_groups(
    codes: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, group_size: int, eps: float, power_of_two: bool
) -> None:
    num_groups = scales.shape[-1]
    groups = (-1, num_groups, group_size)
    rows = scales if scales.dim() == 2 else scales.view(-1, num_groups)
    ops.quantize_groups(codes.view(groups), rows, x.reshape(groups), eps, power_of_two)


def per_token_quant_8bit(x: torch.Tensor, eps: float = 1e-10, dst_dtype: torch.dtype | None = None) -> Pair:
    """Quantise each row by its largest magnitude: tokens of activations, output channels of weights `[N, K]`.

    See `per_token_group_quant_8bit` with one group a row. Returns (codes like x, fp32 scales `[..., 1]`).
    """
    check.tensor("x", x)
    return per_token_group_quant_8bit(x, max(x.shape[-1] if x.dim() else 0, 1), eps, dst_dtype)


def per_tensor_quant_8bit(
    x: torch.Tensor, scale: torch.Tensor | None = None, dst_dtype: torch.dtype | None = None, eps: float = 1e-10
) -> Pair:
    """Quantise everything by one scale: the given one, fp32 `[1]`, or `max(largest |x|, eps) / largest code`.

    Returns (codes like x, contiguous; fp32 scale `[1]`). Does not wait for the device.
    """
    dtype = _numbers(x, dst_dtype)
    if scale is None:
        scale = ops.tensor_scale(x, dtype, eps)
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    _quantize_by_scale(codes, x, scale)
    return codes, scale


@replayed
def _quantize_by_scale(codes: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    check.tensor("scale", scale, dtypes=(torch.float32,), shape=(1,), like=("x", x))
    ops.quantize_by_scale(codes, x.contiguous(), scale)


def dequantize_8bit(x: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Codes times scales, in fp32, then `output_dtype`; undoes the functions above.

    x: fp8 or int8 `[..., width]`. scales: fp32 `[..., groups]`, width a multiple of groups. Returns `[..., width]`.
    """
    check.tensor("x", x, dtypes=CODE_DTYPES, inner_contiguous=True)
    check.choice("output_dtype", output_dtype, check.FLOAT_DTYPES)
    check.tensor("scales", scales, dtypes=(torch.float32,), shape=(*x.shape[:-1], None), like=("x", x))
    num_groups = scales.shape[-1]
    check.multiple("last dimension of x", x.shape[-1], "the groups of scales", num_groups)
    out = torch.empty(x.shape, dtype=output_dtype, device=x.device)
    if x.numel() > 0:
        groups = (-1, num_groups, x.shape[-1] // num_groups)
        ops.dequantize_groups(out.view(groups), x.reshape(groups), scales.reshape(-1, num_groups))
    return out


def int8_kv_quantize(x: torch.Tensor, eps: float = 1e-10) -> Pair:
    """Keys or values `[..., num_kv_heads, head_dim]` as int8 with a scale a head; also of a cache of such.

    Returns (int8 like x, fp32 scales `[..., num_kv_heads]`).
    """
    codes, scales = per_token_quant_8bit(x, eps, torch.int8)
    return codes, scales.squeeze(-1)


def int8_kv_dequantize(
    x: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Undo `int8_kv_quantize`."""
    check.tensor("x", x, dtypes=(torch.int8,))
    check.tensor("scales", scales, shape=x.shape[:-1])
    return dequantize_8bit(x, scales.unsqueeze(-1), output_dtype)


def _from_fp4(
    x: torch.Tensor,
    scales: torch.Tensor,
    global_scale: torch.Tensor | None,
    kind: tuple[int, bool, SfLayout],
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """kind: elements a scale, whether scales are powers of two, their layout."""
    group_size, ue8m0, layout = kind
    check.tensor("fp4 data", x, dtypes=(torch.uint8,), shape=(None, None))
    num_rows, width = x.shape[0], 2 * x.shape[1]
    check.multiple("twice the last dimension of the fp4 data", width, "elements a scale", group_size)
    check.tensor("block scales", scales, dtypes=(torch.uint8, *check.FP8_DTYPES), like=("fp4 data", x))
    needed = ops.scales_needed(num_rows, width // group_size, layout)
    if scales.numel() < needed:
        got = f"{scales.numel()} scales"
        raise ValueError(check.problem("block scales", got, f"{needed} in {layout!r}", "Pass all, padding included."))
    if global_scale is not None:
        shape = () if isinstance(global_scale, torch.Tensor) and global_scale.dim() == 0 else (1,)
        check.tensor("global_scale", global_scale, dtypes=(torch.float32,), shape=shape, like=("fp4 data", x))
    check.choice("output_dtype", output_dtype, check.FLOAT_DTYPES)
    out = torch.empty((num_rows, width), dtype=output_dtype, device=x.device)
    ops.dequantize_fp4(out, x.contiguous(), scales.contiguous(), global_scale, group_size, ue8m0, int(layout))
    return out


def e2m1_and_ufp8sf_scale_to_float(
    e2m1_tensor: torch.Tensor,
    ufp8_scale_tensor: torch.Tensor,
    global_scale_tensor: torch.Tensor | None = None,
    sf_vec_size: int = 16,
    ufp8_type: int = 1,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
) -> torch.Tensor:
    """fp4 with block scales as fp32 `[M, K]`: code times block scale times global scale.

    e2m1_tensor: uint8 `[M, K / 2]`, the first of two codes in the low bits. ufp8_scale_tensor: bytes of scales, one for
    sf_vec_size (16 or 32) elements; ufp8_type 0: powers of two (UE8M0), 1: e4m3. Scales lie in tiles of 128 x 4, or
    8 x 4, if swizzled, padding included. global_scale_tensor: fp32 `[1]`.
    """
    check.choice("sf_vec_size", sf_vec_size, (16, 32))
    check.choice("ufp8_type", ufp8_type, (0, 1))
    swizzled = SfLayout.layout_8x4 if is_sf_8x4_layout else SfLayout.layout_128x4
    layout = swizzled if is_sf_swizzled_layout else SfLayout.layout_linear
    kind = (sf_vec_size, ufp8_type == 0, layout)
    return _from_fp4(e2m1_tensor, ufp8_scale_tensor, global_scale_tensor, kind, torch.float32)


def mxfp4_dequantize(
    a_fp4: torch.Tensor, a_sf: torch.Tensor, sfLayout: SfLayout = SfLayout.layout_128x4
) -> torch.Tensor:
    """MXFP4 (a power of two for 32 elements) as fp32 `[M, K]`; a_fp4 uint8 `[M, K / 2]`, a_sf uint8."""
    return _from_fp4(a_fp4, a_sf, None, (32, True, SfLayout(sfLayout)), torch.float32)


def mxfp4_dequantize_host(weight: torch.Tensor, scale: torch.Tensor, group_size: int = 32) -> torch.Tensor:
    """MXFP4 with scales row after row, `[M, K / group_size]`, as fp32 `[M, K]`; on whatever device the tensors are."""
    check.choice("group_size", group_size, (16, 32, 64, 128))
    return _from_fp4(weight, scale, None, (group_size, True, SfLayout.layout_linear), torch.float32)


def nvfp4_kv_dequantize(
    fp4_data: torch.Tensor,
    block_scales: torch.Tensor,
    global_scale: torch.Tensor,
    output_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """NVFP4 KV (e4m3 scales of 16 elements, row after row) as `[M, K]` of output_dtype.

    fp4_data uint8 `[M, K / 2]`, block_scales `[M, K / 16]` (uint8 or e4m3fn), global_scale fp32 `[1]`.
    """
    return _from_fp4(fp4_data, block_scales, global_scale, (16, False, SfLayout.layout_linear), output_dtype)


def nvfp4_kv_dequantize_paged(
    paged_kv_cache: PagedKVCache,
    kv_cache_sf: PagedKVCache,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    output_k: torch.Tensor,
    output_v: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Gather the pages of each request from an NVFP4 cache into output_k and output_v, as numbers.

    paged_kv_cache: uint8, a tuple of `[pages, page_size, num_kv_heads, head_dim / 2]` (heads before tokens for "HND")
    or one tensor `[pages, 2, ...]`. kv_cache_sf: e4m3 scales or their bytes in the same form, `head_dim / 16` wide.
    block_tables: int32 or int64 `[batch, max_pages]`. seq_lens: int32 `[batch]`, at most max_seq_len. k_scale, v_scale:
    fp32 of one element; a number is code times block scale times these. output_k, output_v: `[batch, max_seq_len,
    num_kv_heads, head_dim]`, fp32, fp16 or bf16, innermost stride 1; what lies behind seq_lens stays as it is.
    """
    caches, outs = (paged_kv_cache, kv_cache_sf), (output_k, output_v)
    _dequantize_pages(*caches, block_tables, seq_lens, (k_scale, v_scale), outs, kv_layout)


@replayed
def _dequantize_pages(
    cache: PagedKVCache,
    cache_sf: PagedKVCache,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    factors: Pair,
    outs: Pair,
    kv_layout: str,
) -> None:
    layout = checked_layout(kv_layout)
    codes, scales = paged_views(cache, layout), paged_views(cache_sf, layout)
    for i, (name, out) in enumerate(zip(("output_k", "output_v"), outs, strict=True)):
        like = (name, out)
        check.tensor(name, out, dtypes=check.FLOAT_DTYPES, shape=(None,) * 4, inner_contiguous=True)
        batch_size, _, num_heads, head_dim = out.shape
        check.multiple(f"last dimension of {name}", head_dim, "elements a scale", 16)
        shape = (None, None, num_heads, head_dim // 2)
        check.tensor("paged_kv_cache", codes[i], dtypes=(torch.uint8,), shape=shape, like=like, inner_contiguous=True)
        dtypes, shape = (torch.uint8, torch.float8_e4m3fn), (*codes[i].shape[:3], head_dim // 16)
        check.tensor("kv_cache_sf", scales[i], dtypes=dtypes, shape=shape, like=like, inner_contiguous=True)
        check.tensor("block_tables", block_tables, dtypes=check.POSITION_DTYPES, shape=(batch_size, None), like=like)
        lens = check.tensor("seq_lens", seq_lens, dtypes=check.INDEX_DTYPES, shape=(batch_size,), like=like)
        factor = check.scalar(("k_scale", "v_scale")[i], factors[i], like)
        ops.dequantize_fp4_pages(out, codes[i], scales[i], factor, block_tables, lens.contiguous())


def block_scale_interleave(unswizzled_sf: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Block scales row after row, `[M, blocks]` or `[batch, M, blocks]`, brought into tiles of 128 x 4.

    uint8, or a wider dtype moved alike. Returns them flat, padding zero; `out` is filled if given.
    """
    check.tensor("unswizzled_sf", unswizzled_sf)
    if unswizzled_sf.dim() not in (2, 3):
        got = f"{unswizzled_sf.dim()} dimensions"
        raise ValueError(check.problem("unswizzled_sf", got, "2 or 3", "Pass rows of scales, or a batch of them."))
    result = ops.interleave_scales(unswizzled_sf if unswizzled_sf.dim() == 3 else unswizzled_sf[None])
    if out is None:
        return result
    dtypes = (unswizzled_sf.dtype,)
    check.tensor("out", out, dtypes=dtypes, shape=result.shape, like=("unswizzled_sf", unswizzled_sf))
    return out.copy_(result)


nvfp4_block_scale_interleave = block_scale_interleave
