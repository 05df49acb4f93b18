"""Triton implementation of the all-to-all, over memory that all ranks see."""

from flashinfer.ops.alltoall.triton.launch import bind

__all__ = ["bind"]
