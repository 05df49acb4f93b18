"""Attention variants: small functions over tiles, composed with `&`. To add one: one file here, one line below."""

from flashinfer.ops.attention.variant import At, Part, Twin, Variant, clamped_bounds, variant
from flashinfer.ops.attention.variants.alibi import alibi, get_alibi_slopes
from flashinfer.ops.attention.variants.causal import causal
from flashinfer.ops.attention.variants.custom_mask import custom_mask
from flashinfer.ops.attention.variants.rope import rope
from flashinfer.ops.attention.variants.soft_cap import soft_cap
from flashinfer.ops.attention.variants.window import sliding_window

__all__ = [
    "At",
    "Part",
    "Twin",
    "Variant",
    "alibi",
    "causal",
    "clamped_bounds",
    "custom_mask",
    "get_alibi_slopes",
    "rope",
    "sliding_window",
    "soft_cap",
    "variant",
]
