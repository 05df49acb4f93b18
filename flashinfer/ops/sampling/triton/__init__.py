"""Triton implementation of sampling."""

from flashinfer.ops.sampling.triton.choose import select, verify_chain, verify_tree
from flashinfer.ops.sampling.triton.launch import keep, sample
from flashinfer.ops.sampling.triton.softmax_launch import softmax

__all__ = ["keep", "sample", "select", "softmax", "verify_chain", "verify_tree"]
