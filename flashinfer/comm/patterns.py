"""What may go before and after an all-reduce: FlashInfer's numbers for it, and what they mean."""

from __future__ import annotations

from typing import NamedTuple


class AllReduceStrategyType:
    """How an all-reduce is done; AUTO leaves it to the number of bytes."""

    NCCL = 0
    MIN_LATENCY = 1
    UB = 2
    AUTO = 3
    ONESHOT = 4
    TWOSHOT = 5
    LOWPRECISION = 6


class AllReduceStrategyConfig:
    """Bits of TensorRT-LLM's all-reduce: copies by the copy engine, ranks that write instead of reading."""

    USE_MEMCPY = 1
    PUSH_MODE = 2


class AllReduceFusionOp:
    """What TensorRT-LLM's all-reduce is followed by."""

    NONE = 0
    RESIDUAL_RMS_NORM = 1
    LAST_PROCESS_FOR_UB = 2
    RESIDUAL_RMS_PREPOST_NORM = 3
    RESIDUAL_RMS_NORM_QUANT_FP8 = 4
    RESIDUAL_RMS_NORM_QUANT_NVFP4 = 5
    RESIDUAL_RMS_NORM_OUT_QUANT_FP8 = 6
    RESIDUAL_RMS_NORM_OUT_QUANT_NVFP4 = 7
    MOE_ALLREDUCE_RESIDUAL_RMS_NORM = 8
    MOE_FINALIZE_ALLREDUCE_RESIDUAL_RMS_NORM = 9


class AllReduceFusionPattern:
    """What `allreduce_fusion` does around the sum; AR: all-reduce, Out: the norm is given back beside its codes."""

    kAllReduce = 0
    kARResidualRMSNorm = 1
    kARResidualRMSNormFP8Quant = 2
    kARResidualRMSNormFP4Quant = 3
    kARResidualRMSNormOutFP8Quant = 4
    kARResidualRMSNormOutFP4Quant = 5
    kMoEReductionARResidualRMSNorm = 6
    kMoEFinalizeARResidualRMSNorm = 7
    kARResidualRMSNormPerTokenGroupFP8PackedQuant = 8
    kARResidualRMSNormOutPerTokenGroupFP8PackedQuant = 9
    kARResidualRMSNormDynamicFP8Quant = 10
    kARResidualRMSNormOutDynamicFP8Quant = 11


class QuantizationSFLayout:
    """Order of the scales of fp4 blocks (`SfLayout` of the same numbers)."""

    SWIZZLED_128x4 = 0
    SWIZZLED_8x4 = 1
    LINEAR = 2


class Fusion(NamedTuple):
    """What a pattern means. norm: residual and RMSNorm follow the sum. codes: what the norm is turned into: "" nothing,
    "fp8" by one scale, "fp8_rows" by one a row, "fp8_groups" by one a group of a row, "fp4". keeps_norm: the norm
    itself is a result.
    """

    norm: bool
    codes: str = ""
    keeps_norm: bool = False


FUSIONS = {
    AllReduceFusionPattern.kAllReduce: Fusion(False),
    AllReduceFusionPattern.kARResidualRMSNorm: Fusion(True, "", True),
    AllReduceFusionPattern.kARResidualRMSNormFP8Quant: Fusion(True, "fp8"),
    AllReduceFusionPattern.kARResidualRMSNormFP4Quant: Fusion(True, "fp4"),
    AllReduceFusionPattern.kARResidualRMSNormOutFP8Quant: Fusion(True, "fp8", True),
    AllReduceFusionPattern.kARResidualRMSNormOutFP4Quant: Fusion(True, "fp4", True),
    AllReduceFusionPattern.kARResidualRMSNormPerTokenGroupFP8PackedQuant: Fusion(True, "fp8_groups"),
    AllReduceFusionPattern.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant: Fusion(True, "fp8_groups", True),
    AllReduceFusionPattern.kARResidualRMSNormDynamicFP8Quant: Fusion(True, "fp8_rows"),
    AllReduceFusionPattern.kARResidualRMSNormOutDynamicFP8Quant: Fusion(True, "fp8_rows", True),
}
MOE_PATTERNS = (
    AllReduceFusionPattern.kMoEReductionARResidualRMSNorm,
    AllReduceFusionPattern.kMoEFinalizeARResidualRMSNorm,
)
