"""Sampling of tokens from logits and probabilities."""

from flashinfer.ops.sampling.reference import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    mask_logits,
    renormalise,
    sample,
    softmax,
    uniform,
)

__all__ = [
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "mask_logits",
    "renormalise",
    "sample",
    "softmax",
    "uniform",
]
