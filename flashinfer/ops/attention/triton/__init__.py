"""Triton implementation of attention: plan on the device, run in one launch."""

from flashinfer.ops.attention.triton.launch import plan, run

__all__ = ["plan", "run"]
