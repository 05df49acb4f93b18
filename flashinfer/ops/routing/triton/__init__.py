"""Triton implementation of routing."""

from flashinfer.ops.routing.triton.launch import bind

__all__ = ["bind"]
