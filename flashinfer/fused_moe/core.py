"""Mixture of experts with FlashInfer's names and signatures."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch

from flashinfer.core import check
from flashinfer.core.replay import replayed
from flashinfer.core.select import BackendSupportedError
from flashinfer.fused_moe.checks import Call, checked_experts, checked_routes
from flashinfer.ops import moe as ops

__all__ = [
    "ActivationType",
    "cutlass_fused_moe",
    "cutlass_fused_moe_workspace_size",
    "interleave_moe_scales_for_sm90_mixed_gemm",
    "interleave_moe_weights_for_sm90_mixed_gemm",
]


class ActivationType(IntEnum):
    """Activations by FlashInfer's numbers."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    Identity = 7
    InvalidType = 8


ACTIVATIONS = {
    ActivationType.Gelu: "gelu",
    ActivationType.Relu: "relu",
    ActivationType.Silu: "silu",
    ActivationType.Swiglu: "swiglu",
    ActivationType.Geglu: "geglu",
    ActivationType.SwigluBias: "swiglu",
    ActivationType.Relu2: "relu2",
    ActivationType.Identity: "identity",
}
OUTPUT_DTYPES = check.FLOAT_DTYPES


def cutlass_fused_moe(
    input: torch.Tensor,
    token_selected_experts: torch.Tensor,
    token_final_scales: torch.Tensor,
    fc1_expert_weights: torch.Tensor,
    fc2_expert_weights: torch.Tensor,
    output_dtype: torch.dtype,
    quant_scales: Sequence[torch.Tensor] | None,
    fc1_expert_biases: torch.Tensor | None = None,
    fc2_expert_biases: torch.Tensor | None = None,
    input_sf: torch.Tensor | None = None,
    swiglu_alpha: torch.Tensor | None = None,
    swiglu_beta: torch.Tensor | None = None,
    swiglu_limit: torch.Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: torch.Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: ActivationType = ActivationType.Swiglu,
    swizzled_input_sf: bool = True,
    use_fused_finalize: bool = True,
    profile_ids: Sequence[int] | None = None,
    workspace_buffer: torch.Tensor | None = None,
    *,
    clamped_relu2_limit: torch.Tensor | None = None,
    situ_beta: torch.Tensor | None = None,
    situ_linear_beta: torch.Tensor | None = None,
    backend: str = "cutlass",
) -> torch.Tensor:
    """`out[t] = sum_j token_final_scales[t, j] * expert(token_selected_experts[t, j])(input[t])`, `[tokens, H]`.

    input: `[tokens, H]`, fp16, bf16 or (here only) fp32; e4m3 with per-tensor scales. token_selected_experts: int32 or
    int64 `[tokens, k]`, numbers of the whole model. token_final_scales: fp32, the same shape. fc1_expert_weights:
    `[E, 2 * I, H]`, first half up, second half gate (`[E, I, H]` without a gate); fc2_expert_weights: `[E, H, I]`; E
    experts of this rank, the first being `ep_rank * E`; I of this rank. output_dtype: of the result, in `output` where
    given. Biases `[E, 2 * I]` and `[E, H]`; the second is added by tp_rank 0. swiglu_alpha, _beta, _limit: fp32 `[E]`:
    `min(gate, limit) * sigmoid(alpha * gate) * (clamp(up) + beta)`.

    quant_scales by kind: e4m3 weights and input: [fc1 dequant, fc2 activation's scale (multiplied before the cast), fc2
    dequant, input dequant (contained in the first)], fp32 of one element or `[E]`. e4m3 weights with
    use_deepseek_fp8_block_scale: [fc1, fc2] fp32 `[E, N / 128, K / 128]`, the activations are quantised inside in
    blocks of 128. uint8 (mxfp4) weights with use_w4_group_scaling: [fc1, fc2] uint8 e8m0 `[E, N, K / 32]`, as they are
    stored by gpt-oss.

    Deterministic, whatever use_fused_finalize says; several ranks' results add up. cluster_size, enable_alltoall,
    tune_max_num_tokens, enable_pdl, profile_ids, workspace_buffer and backend change nothing.
    """
    refused = {
        "input_sf": input_sf is not None,
        "use_mxfp8_act_scaling": use_mxfp8_act_scaling,
        "min_latency_mode": min_latency_mode,
        "use_packed_weights": use_packed_weights,
        "use_wfp4afp8_humming": use_wfp4afp8_humming,
        "clamped_relu2_limit": clamped_relu2_limit is not None,
        "situ_beta": situ_beta is not None,
        "situ_linear_beta": situ_linear_beta is not None,
    }
    _refuse([name for name, given in refused.items() if given])
    check.choice("output_dtype", output_dtype, OUTPUT_DTYPES)
    if output is None:
        check.tensor("input", input, shape=(None, None))
        check.tensor("fc2_expert_weights", fc2_expert_weights, shape=(None, None, None))
        output = torch.empty(input.shape[0], fc2_expert_weights.shape[1], dtype=output_dtype, device=input.device)
    tensors = (input, token_selected_experts, token_final_scales, fc1_expert_weights, fc2_expert_weights)
    known = all(isinstance(x, torch.Tensor) for x in (output, *tensors))
    bias2 = fc2_expert_biases if tp_rank == 0 else None
    _fused_moe(
        output,
        tensors,
        tuple(quant_scales or ()),
        (fc1_expert_biases, bias2, swiglu_alpha, swiglu_beta, swiglu_limit),
        (activation_type, use_deepseek_fp8_block_scale, use_w4_group_scaling, output_dtype),
        (tp_size, ep_size, ep_rank),
        ops.scratch_for(output, input, token_selected_experts, *tensors[3:]) if known else None,
    )
    return output


@replayed
def _fused_moe(
    output: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    scales: tuple[torch.Tensor, ...],
    optional: tuple[torch.Tensor | None, ...],
    form: tuple[Any, ...],
    ranks: tuple[int, int, int],
    scratch: torch.Tensor | None,
) -> None:
    """Check and run: the arguments of `cutlass_fused_moe` in its order, biases and parameters in `optional`."""
    x, ids, weights, fc1, fc2 = tensors
    activation_type, blocks, groups, output_dtype = form
    tp_size, ep_size, ep_rank = ranks
    check.choice("activation_type", activation_type, tuple(ACTIVATIONS))
    check.positive("tp_size", tp_size)
    check.positive("ep_size", ep_size)
    call = Call(x, fc1, fc2, list(scales), blocks, groups)
    experts = checked_experts(call, ACTIVATIONS[activation_type], optional[2:], optional[:2])  # type: ignore[arg-type]
    routes = checked_routes(call, ids, weights, ep_rank)
    like, shape = ("input", x), (x.shape[0], fc2.shape[1])
    check.tensor("output", output, dtypes=(output_dtype,), shape=shape, like=like, inner_contiguous=True)
    ops.moe(x, routes, experts, out=output, scratch=scratch)


def _refuse(names: list[str]) -> None:
    """Raise for options that only other GPUs, or other kinds of weights, have."""
    if names:
        raise BackendSupportedError(
            f"cutlass_fused_moe: {', '.join(names)} is not supported, expected bf16, fp16, fp8 (per tensor or "
            "128 x 128 blocks) or mxfp4 weights. Leave it out."
        )


def cutlass_fused_moe_workspace_size(
    max_num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts_total: int,
    top_k: int,
    *,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    output_dtype: torch.dtype = torch.bfloat16,
    activation_type: ActivationType = ActivationType.Swiglu,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    min_latency_mode: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    use_fused_finalize: bool = True,
    use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False,
    device: torch.device | None = None,
    backend: str = "cutlass",
) -> int:
    """Bytes of workspace the caller must bring: 0, since scratch memory comes from torch's allocator for each call."""
    for name, value in (("max_num_tokens", max_num_tokens), ("hidden_size", hidden_size), ("top_k", top_k)):
        check.positive(name, value)
    return 0


def interleave_moe_weights_for_sm90_mixed_gemm(weight: torch.Tensor, quant_type: str = "fp4") -> torch.Tensor:
    """The weights as `cutlass_fused_moe` takes them: as they are, since our kernels need no order of their own."""
    check.choice("quant_type", quant_type, ("fp4",))
    check.tensor("weight", weight, dtypes=(torch.uint8,), shape=(None, None, None))
    return weight.contiguous()


def interleave_moe_scales_for_sm90_mixed_gemm(scales: torch.Tensor, group_size: int = 32) -> torch.Tensor:
    """The scales as `cutlass_fused_moe` takes them: as they are."""
    check.choice("group_size", group_size, (32,))
    check.tensor("scales", scales, dtypes=(torch.uint8,), shape=(None, None, None))
    return scales.contiguous()
