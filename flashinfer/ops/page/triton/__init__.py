"""Triton implementation of the append and of its index functions."""

from flashinfer.ops.page.triton.launch import append_fp4, batch_indices_positions, bind, seq_lens

__all__ = ["append_fp4", "batch_indices_positions", "bind", "seq_lens"]
