"""Triton implementation of sampling."""

from flashinfer.ops.sampling.triton.choose import select, verify_chain, verify_tree
from flashinfer.ops.sampling.triton.launch import mask_logits, renormalise, sample, softmax

__all__ = ["mask_logits", "renormalise", "sample", "select", "softmax", "verify_chain", "verify_tree"]
