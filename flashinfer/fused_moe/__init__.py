"""Mixture of experts with FlashInfer's names and signatures: re-exports, nothing else."""

from flashinfer.fused_moe.core import (
    ActivationType,
    cutlass_fused_moe,
    cutlass_fused_moe_workspace_size,
    interleave_moe_scales_for_sm90_mixed_gemm,
    interleave_moe_weights_for_sm90_mixed_gemm,
)
from flashinfer.fused_moe.routing import RoutingMethodType, fused_topk_deepseek, hash_topk, route
from flashinfer.moe_lora import (
    bgmv_moe,
    bgmv_moe_expand,
    bgmv_moe_gemm1_lora_delta,
    bgmv_moe_gemm2_lora_delta,
    bgmv_moe_shrink,
    fill_w_ptr,
    has_bgmv_moe,
)

__all__ = [
    "ActivationType",
    "RoutingMethodType",
    "bgmv_moe",
    "bgmv_moe_expand",
    "bgmv_moe_gemm1_lora_delta",
    "bgmv_moe_gemm2_lora_delta",
    "bgmv_moe_shrink",
    "cutlass_fused_moe",
    "cutlass_fused_moe_workspace_size",
    "fill_w_ptr",
    "fused_topk_deepseek",
    "has_bgmv_moe",
    "hash_topk",
    "interleave_moe_scales_for_sm90_mixed_gemm",
    "interleave_moe_weights_for_sm90_mixed_gemm",
    "route",
]
