"""What tests need: an fp64 oracle, computed tolerances, NaN-poisoned tensors and repeatable random seeds."""

from __future__ import annotations

from flashinfer.testing.oracle import AttentionOptions, alibi_slopes, attention, attention_noise, rotate
from flashinfer.testing.tolerance import assert_close_to_oracle, assert_lse_close_to_oracle, poisoned, set_seed

__all__ = [
    "AttentionOptions",
    "alibi_slopes",
    "assert_close_to_oracle",
    "assert_lse_close_to_oracle",
    "attention",
    "attention_noise",
    "poisoned",
    "rotate",
    "set_seed",
]
