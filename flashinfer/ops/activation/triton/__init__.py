"""Triton implementation of the gated activations."""

from flashinfer.ops.activation.triton.launch import bind

__all__ = ["bind"]
