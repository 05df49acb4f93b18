"""Triton implementation of products with adapters."""

from flashinfer.ops.lora.triton.launch import expand, shrink

__all__ = ["expand", "shrink"]
