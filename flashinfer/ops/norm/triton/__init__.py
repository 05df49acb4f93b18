"""Triton implementation of the norms."""

from flashinfer.ops.norm.triton.launch import bind

__all__ = ["bind"]
