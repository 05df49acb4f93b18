"""Triton implementation of the collectives, over memory that all ranks write to."""

from flashinfer.ops.collectives.triton.launch import bind

__all__ = ["bind"]
