"""A kernel for tests: every byte of two codes of e2m1 with every scale of ue8m0."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flashinfer.device.decode import decode_e2m1, decode_e2m1_pairs, decode_ue8m0


@triton.jit
def decode_kernel(out, PAIRS: tl.constexpr):
    """Grid: scales / 16. out: bf16 `[256 scales, 512 numbers]`."""
    scale = tl.program_id(0) * 16 + tl.arange(0, 16)
    codes = tl.broadcast_to(tl.arange(0, 256)[None, :], (16, 256)).to(tl.uint8)
    factor = decode_ue8m0(scale)[:, None]
    if PAIRS:
        value = decode_e2m1_pairs(codes, factor)
    else:
        low, high = decode_e2m1(codes & 15) * factor, decode_e2m1(codes >> 4) * factor
        value = tl.join(low, high).reshape(16, 512).to(tl.bfloat16)
    tl.store(out + scale[:, None] * 512 + tl.arange(0, 512)[None, :], value)


def decoded(pairs: bool) -> torch.Tensor:
    """On the GPU, two at a time or one by one."""
    out = torch.full((256, 512), float("nan"), dtype=torch.bfloat16, device="cuda")
    decode_kernel[(16,)](out, pairs)
    return out
