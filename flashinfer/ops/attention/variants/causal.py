"""Causal mask, bottom-right aligned: query i of a request sees the tokens up to kv_len - qo_len + i."""

from __future__ import annotations

from flashinfer.ops.attention.variant import Twin, Variant, variant


def _mask(captured, at):
    return at.kv_idx <= at.kv_len - at.qo_len + at.qo_idx


def _bounds(captured, q_lo, q_hi, qo_len, kv_len):
    return 0, kv_len - qo_len + q_hi, 0, kv_len - qo_len + q_lo + 1


def causal() -> Variant:
    return variant("causal", mask=_mask, bounds=_bounds, twin=Twin(mask=_mask))
