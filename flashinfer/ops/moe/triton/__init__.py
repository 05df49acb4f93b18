"""Triton implementation of the mixture of experts."""

from flashinfer.ops.moe.triton.launch import bind

__all__ = ["bind"]
