"""Triton implementation of the append and of its index functions."""

from flashinfer.ops.page.triton.launch import append, batch_indices_positions, seq_lens

__all__ = ["append", "batch_indices_positions", "seq_lens"]
