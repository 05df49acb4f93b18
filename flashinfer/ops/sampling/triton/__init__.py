"""Triton implementation of sampling."""

from flashinfer.ops.sampling.triton.launch import mask_logits, renormalise, sample, softmax

__all__ = ["mask_logits", "renormalise", "sample", "softmax"]
