"""Conversion of fp32 to the bytes of fp8 and int8: nearest even, saturating."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode_fp8(x, MANTISSA_BITS: tl.constexpr):
    """fp32 to the bytes of e4m3fn (3 mantissa bits) or e5m2 (2): nearest even, saturating, NaN kept.

    Integer arithmetic: sm_80 has no instruction for e4m3, and the interpreter rounds as a GPU does.
    """
    LIMIT: tl.constexpr = 448.0 if MANTISSA_BITS == 3 else 57344.0
    BIAS: tl.constexpr = 7 if MANTISSA_BITS == 3 else 15
    SHIFT: tl.constexpr = 23 - MANTISSA_BITS
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), LIMIT)
    bits = magnitude.to(tl.int32, bitcast=True)
    rounded = bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)
    normal = (rounded >> SHIFT) - ((127 - BIAS) << MANTISSA_BITS)
    # Below the smallest normal number the fp32 adder rounds: added to `ANCHOR`, the last place is one subnormal step.
    ANCHOR: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA_BITS)
    anchor = tl.full(x.shape, ANCHOR, tl.float32)
    subnormal = (magnitude + anchor).to(tl.int32, bitcast=True) - anchor.to(tl.int32, bitcast=True)
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)
    code = tl.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    return (tl.where(x == x, code, 0x7F) | sign).to(tl.uint8)


@triton.jit
def to_fp8(x, MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr):
    """`encode_fp8`, by the GPU's own instruction where it has one (NATIVE; `Arch.converts_to_fp8`)."""
    if NATIVE:
        if MANTISSA_BITS == 3:
            return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            return x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    else:
        return encode_fp8(x, MANTISSA_BITS)


@triton.jit
def to_int8(x):
    """fp32 to int8: nearest even, saturating at -128 and 127; NaN gives 0."""
    ROUNDER: tl.constexpr = 12582912.0  # 1.5 * 2^23: added to it, the last place of a small number is one
    bounded = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -128.0), 127.0)
    rounder = tl.full(x.shape, ROUNDER, tl.float32)
    return ((bounded + rounder) - rounder).to(tl.int8)
