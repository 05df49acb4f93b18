"""Triton implementation of the rotation."""

from flashinfer.ops.rope.triton.launch import bind

__all__ = ["bind"]
