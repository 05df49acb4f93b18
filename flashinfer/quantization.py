"""Packing of boolean masks into bits, with FlashInfer's names and signatures."""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.ops import quantization as ops

BITORDERS = ("big", "little")
MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)


def _mask(x: torch.Tensor, bitorder: str) -> torch.Tensor:
    check.choice("bitorder", bitorder, BITORDERS)
    return check.tensor("x", x, dtypes=MASK_DTYPES, shape=(None,)).to(torch.bool)


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Pack a mask into bytes, as `numpy.packbits` does.

    x: `[n]`, bool or an integer dtype (non-zero is True). bitorder: "big" puts the first element in the highest bit of
    its byte, "little" in the lowest (what attention masks use). Returns uint8 `[ceil(n / 8)]`, zeros in the last bits.
    """
    return ops.packbits(_mask(x, bitorder), bitorder)


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> tuple[torch.Tensor, torch.Tensor]:
    """Pack each segment of a mask into bytes of its own.

    x: `[indptr[-1]]`, bool or an integer dtype. indptr: `[batch_size + 1]`, int32 or int64, offsets of the segments in
    elements, on x's device. Returns (uint8 `[new_indptr[-1]]`, new_indptr like indptr in bytes).
    On a GPU this waits once for the device, because the size of the result is only known there.
    """
    bits = _mask(x, bitorder)
    check.tensor("indptr", indptr, dtypes=(torch.int32, torch.int64), like=("x", x))
    check.indptr("indptr", indptr, total=x.numel())
    byte_indptr = ops.packed_indptr(indptr)
    packed = ops.segment_packbits(bits, indptr, byte_indptr, int(byte_indptr[-1]), bitorder)
    return packed, byte_indptr
