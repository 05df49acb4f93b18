"""Mixture of experts with FlashInfer's names and signatures: re-exports, nothing else."""

from flashinfer.fused_moe.routing import RoutingMethodType, fused_topk_deepseek, hash_topk, route

__all__ = ["RoutingMethodType", "fused_topk_deepseek", "hash_topk", "route"]
