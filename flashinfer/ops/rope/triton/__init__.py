"""Triton implementation of the rotation."""

from flashinfer.ops.rope.triton.launch import rotate

__all__ = ["rotate"]
