"""Normalisation over the last dimension."""

from flashinfer.ops.norm.reference import fused_add_rmsnorm, layernorm, rmsnorm

__all__ = ["fused_add_rmsnorm", "layernorm", "rmsnorm"]
