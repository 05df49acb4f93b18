"""Triton implementation of the append and of its index functions."""

from flashinfer.ops.page.triton.launch import batch_indices_positions, bind, seq_lens

__all__ = ["batch_indices_positions", "bind", "seq_lens"]
