"""Triton implementation of grouped products."""

from flashinfer.ops.gemm.triton.launch import bind

__all__ = ["bind"]
