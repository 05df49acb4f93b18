"""Triton implementation of the append."""

from flashinfer.ops.page.triton.launch import append

__all__ = ["append"]
