"""Triton implementation of the merge."""

from flashinfer.ops.merge.triton.launch import merge_many, merge_pair

__all__ = ["merge_many", "merge_pair"]
