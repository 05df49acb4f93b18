"""DeepGEMM's grouped fp8 products with FlashInfer's names and signatures."""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.gemm_fp8 import batch_deepgemm_fp8_nt_groupwise, group_deepgemm_fp8_nt_groupwise
from flashinfer.ops.gemm import FP8_BLOCK

__all__ = [
    "get_m_alignment_for_contiguous_layout",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
]

RECIPE = (1, FP8_BLOCK, FP8_BLOCK)
Scaled = tuple[torch.Tensor, torch.Tensor]


def get_m_alignment_for_contiguous_layout() -> int:
    """Rows that groups of `m_grouped_fp8_gemm_nt_contiguous` begin at multiples of."""
    return FP8_BLOCK


def m_grouped_fp8_gemm_nt_contiguous(
    a_fp8: Scaled,
    b_fp8: Scaled,
    d: torch.Tensor,
    m_indices: torch.Tensor,
    recipe: tuple[int, int, int] | None = None,
    compiled_dims: str = "nk",
) -> None:
    """`d[r] = a[r] @ b[m_indices[r]].T`; see `group_deepgemm_fp8_nt_groupwise`.

    a_fp8, b_fp8: (values, fp32 scales). d: bf16, fp16 or fp32 `[m, n]`. recipe: None or (1, 128, 128). compiled_dims:
    no effect.
    """
    check.choice("recipe", tuple(recipe or RECIPE), (RECIPE,))
    group_deepgemm_fp8_nt_groupwise(a_fp8[0], b_fp8[0], a_fp8[1], b_fp8[1], m_indices, out=d)


def m_grouped_fp8_gemm_nt_masked(
    a_fp8: Scaled,
    b_fp8: Scaled,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: tuple[int, int, int] | None = None,
    compiled_dims: str = "nk",
) -> None:
    """`d[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T`; see `batch_deepgemm_fp8_nt_groupwise`.

    a_fp8, b_fp8: (values, fp32 scales). d: bf16, fp16 or fp32 `[groups, m, n]`. recipe, compiled_dims: as above.
    """
    check.choice("recipe", tuple(recipe or RECIPE), (RECIPE,))
    batch_deepgemm_fp8_nt_groupwise(a_fp8[0], b_fp8[0], a_fp8[1], b_fp8[1], masked_m, expected_m, out=d)
