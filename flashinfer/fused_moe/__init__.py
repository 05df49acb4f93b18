"""Mixture of experts with FlashInfer's names and signatures: re-exports, nothing else."""

from flashinfer.fused_moe.core import (
    ActivationType,
    cutlass_fused_moe,
    cutlass_fused_moe_workspace_size,
    interleave_moe_scales_for_sm90_mixed_gemm,
    interleave_moe_weights_for_sm90_mixed_gemm,
)
from flashinfer.fused_moe.routing import RoutingMethodType, fused_topk_deepseek, hash_topk, route

__all__ = [
    "ActivationType",
    "RoutingMethodType",
    "cutlass_fused_moe",
    "cutlass_fused_moe_workspace_size",
    "fused_topk_deepseek",
    "hash_topk",
    "interleave_moe_scales_for_sm90_mixed_gemm",
    "interleave_moe_weights_for_sm90_mixed_gemm",
    "route",
]
