"""Packing of boolean masks into bits."""

from flashinfer.ops.quantization.reference import packbits, packed_indptr, segment_packbits

__all__ = ["packbits", "packed_indptr", "segment_packbits"]
