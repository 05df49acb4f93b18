"""Sliding window: each query sees `window_left` tokens to its left and itself; the right side is left open."""

from __future__ import annotations

from flashinfer.ops.attention.variant import Twin, Variant, variant


def _mask(captured, at):
    return at.kv_idx + captured[0] >= at.kv_len - at.qo_len + at.qo_idx


def _bounds(captured, q_lo, q_hi, qo_len, kv_len):
    return kv_len - qo_len + q_lo - captured[0], kv_len, kv_len - qo_len + q_hi - 1 - captured[0], kv_len


def sliding_window(window_left: int) -> Variant:
    """window_left: tokens to the left of the query that stay visible, >= 0."""
    return variant("sliding_window", captured=(window_left,), mask=_mask, bounds=_bounds, twin=Twin(mask=_mask))
