"""Triton implementation of the conversions."""

from flashinfer.ops.quantization.triton.launch import (
    concat_heads,
    dequantize_fp4,
    dequantize_fp4_pages,
    dequantize_groups,
    packbits,
    quantize_by_scale,
    quantize_fp4,
    quantize_groups,
    segment_packbits,
)

__all__ = [
    "concat_heads",
    "dequantize_fp4",
    "dequantize_fp4_pages",
    "dequantize_groups",
    "packbits",
    "quantize_by_scale",
    "quantize_fp4",
    "quantize_groups",
    "segment_packbits",
]
