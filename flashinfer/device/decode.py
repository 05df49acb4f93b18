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


@triton.jit
def multiply_pairs(x, y):
    """Products of two bf16 each, in 32 bits: subnormal numbers count, -0 stays. PTX, from sm_80 on."""
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;",
        "=r,r,r,r",
        [x, y, -2147450880],  # 0x80008000: twice -0
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def twice(factor):
    """fp32 that is exact in bf16, as two equal bf16 in 32 bits."""
    half = (factor.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    return half | (half << 16)


@triton.jit
def e2m1_pairs(bits):
    """Bytes of two codes of e2m1, as int32, to two bf16 in 32 bits, the lower code first.

    On NVIDIA's GPUs only. The three bits of a magnitude go to the lowest of the exponent and the highest of the
    mantissa, as in `decode_e2m1`.
    """
    # Codes lie 12 bits further apart than in the byte: signs in bits 15 and 31, magnitudes from bits 6 and 22 on.
    signs = (bits * 0x1001000) & -2147450880
    pairs = ((bits * 0x40040) & 0x01C001C0) | signs
    return multiply_pairs(pairs, 0x7E807E80)  # 2^126


@triton.jit
def decode_e2m1_pairs(codes, factor):
    """Bytes `[R, C]` of two codes of e2m1 to bf16 `[R, 2 * C]`, the low four bits first, times `factor`.

    factor: fp32 `[R, C / n]`, exact in bf16, one for n bytes. Two numbers at a time, on NVIDIA's GPUs only.
    """
    ROWS: tl.constexpr = codes.shape[0]
    BYTES: tl.constexpr = codes.shape[1]
    BLOCKS: tl.constexpr = factor.shape[1]
    both = tl.broadcast_to(twice(factor)[:, :, None], (ROWS, BLOCKS, BYTES // BLOCKS)).reshape(ROWS, BYTES)
    pairs = multiply_pairs(e2m1_pairs(codes.to(tl.int32)), both)
    low = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high).reshape(ROWS, 2 * BYTES)
