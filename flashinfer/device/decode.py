"""Narrow floats to fp32, in integers: no architecture need know them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_fp8(code, MANTISSA_BITS: tl.constexpr):
    """Bytes of e4m3fn (3 mantissa bits) or e5m2 (2) to fp32.

    Exponent and mantissa are moved to their place in fp32 and the difference of the biases multiplied in, which makes
    subnormal numbers right too.
    """
    BIAS: tl.constexpr = 7 if MANTISSA_BITS == 3 else 15
    bits = code.to(tl.int32)
    magnitude = bits & 0x7F
    value = (magnitude << (23 - MANTISSA_BITS)).to(tl.float32, bitcast=True) * 2.0 ** (127 - BIAS)
    if MANTISSA_BITS == 3:
        value = tl.where(magnitude == 0x7F, float("nan"), value)
    else:
        value = tl.where(magnitude == 0x7C, float("inf"), tl.where(magnitude > 0x7C, float("nan"), value))
    return _signed(value, bits & 0x80, 24)


@triton.jit
def _signed(value, sign, SHIFT: tl.constexpr):
    """`value` >= 0 with a sign bit, which is moved to its place: 0 - 0 would lose that of -0."""
    return (value.to(tl.int32, bitcast=True) | (sign << SHIFT)).to(tl.float32, bitcast=True)


@triton.jit
def decode_e2m1(code):
    """4-bit codes of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign, to fp32."""
    bits = code.to(tl.int32)
    value = ((bits & 7) << 22).to(tl.float32, bitcast=True) * 2.0**126
    return _signed(value, bits & 8, 28)


@triton.jit
def decode_ue8m0(code):
    """Bytes b to 2^(b - 127) in fp32; 255 is NaN."""
    bits = code.to(tl.int32)
    value = tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
    return tl.where(bits == 255, float("nan"), value)
