"""Custom mask: one bit for each (query, token), packed little-endian, each request starting on a byte.

Row-major `[qo_len, kv_len]` per request; 1 = keep. `byte_indptr` says where a request's bytes begin.
"""

from __future__ import annotations

import torch

from flashinfer.device.language import tl
from flashinfer.ops.attention.variant import Twin, Variant, variant


def _mask(captured, at):
    # Bits of one request can pass 2^31: the row's part is 64 bits wide, what is added for a token need not be.
    # Out-of-range queries and tokens are not read.
    inside = (at.qo_idx < at.qo_len) & (at.kv_idx < at.kv_len)
    row_bit = at.qo_idx.to(tl.int64) * at.kv_len
    row = captured[0] + tl.load(captured[1] + at.request).to(tl.int64) + (row_bit >> 3)
    bit = (row_bit & 7).to(tl.int32) + at.kv_idx
    byte = tl.load(row + (bit >> 3), mask=inside, other=0).to(tl.int32)
    return ((byte >> (bit & 7)) & 1) != 0


def _twin(captured, at):
    packed, byte_indptr = captured
    bit = at.qo_idx.to(torch.int64) * at.kv_len + at.kv_idx
    byte = packed[byte_indptr[at.request].to(torch.int64) + (bit >> 3)].to(torch.int64)
    return ((byte >> (bit & 7)) & 1) != 0


def custom_mask(packed: torch.Tensor, byte_indptr: torch.Tensor) -> Variant:
    """packed: uint8 `[bytes]`; byte_indptr: int32 `[batch + 1]`, on the device of the queries."""
    return variant("custom_mask", captured=(packed, byte_indptr), mask=_mask, twin=Twin(mask=_twin))
