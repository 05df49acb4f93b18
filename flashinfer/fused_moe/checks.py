"""Checks of a mixture of experts, and the records they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from flashinfer.core import check
from flashinfer.ops.gemm import GATED, Activation, Weights
from flashinfer.ops.moe import BLOCK, Experts, Routes

E4M3 = torch.float8_e4m3fn
MXFP4_BLOCK = 32


class Call(NamedTuple):
    """What says of which kind the experts are."""

    x: torch.Tensor
    fc1: torch.Tensor
    fc2: torch.Tensor
    scales: list[torch.Tensor]
    blocks: bool
    groups: bool


class Quantised(NamedTuple):
    """Both weights with their scales, and the scale of the activations between them."""

    fc1: Weights
    fc2: Weights
    hidden_scale: torch.Tensor | None = None


def checked_routes(call: Call, ids: torch.Tensor, weights: torch.Tensor, ep_rank: int) -> Routes:
    """Where tokens go: `[tokens, top_k]` each."""
    like = ("input", call.x)
    check.tensor("token_selected_experts", ids, dtypes=check.POSITION_DTYPES, shape=(call.x.shape[0], None), like=like)
    check.tensor("token_final_scales", weights, dtypes=(torch.float32,), shape=tuple(ids.shape), like=like)
    if ids.shape[1] == 0:
        raise ValueError(check.problem("token_selected_experts", "no column", "at least one", "Choose an expert."))
    return Routes(ids.contiguous(), weights.contiguous(), ep_rank * call.fc1.shape[0])


def checked_experts(
    call: Call,
    activation: str,
    parameters: tuple[torch.Tensor | None, ...],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
) -> Experts:
    """The experts of this rank, of the kind that dtypes and options say."""
    x, fc1, fc2 = call.x, call.fc1, call.fc2
    check.tensor("input", x, shape=(None, None), inner_contiguous=True)
    like = ("input", x)
    for name, w in (("fc1_expert_weights", fc1), ("fc2_expert_weights", fc2)):
        check.tensor(name, w, dtypes=(fc1.dtype,), shape=(fc1.shape[0], None, None), like=like, inner_contiguous=True)
    quantised = _kind(call)
    packed = 2 if fc1.dtype == torch.uint8 else 1
    intermediate = fc2.shape[2] * packed
    rows = intermediate * (2 if activation in GATED else 1)
    experts, hidden = fc1.shape[0], fc2.shape[1]
    check.tensor("fc1_expert_weights", fc1, shape=(experts, rows, hidden // packed))
    check.tensor("input", x, shape=(None, hidden))
    for name, bias, width in (("fc1", biases[0], rows), ("fc2", biases[1], hidden)):
        if bias is not None:
            shape = (experts, width)
            check.tensor(
                f"{name}_expert_biases", bias, dtypes=check.FLOAT_DTYPES, shape=shape, like=like, inner_contiguous=True
            )
    if activation != "swiglu" and any(p is not None for p in parameters):
        fix = "Leave them out."
        raise ValueError(check.problem("swiglu_alpha, _beta, _limit", "tensors", f"None with {activation}", fix))
    for name, p in zip(("swiglu_alpha", "swiglu_beta", "swiglu_limit"), parameters, strict=True):
        if p is not None:
            check.tensor(name, p, dtypes=(torch.float32,), shape=(experts,), like=like, inner_contiguous=True)
    return Experts(quantised.fc1, quantised.fc2, Activation(activation, *parameters), *biases, quantised.hidden_scale)


def _kind(call: Call) -> Quantised:
    """Both weights with their scales."""
    if call.blocks:
        return _fp8_blocks(call)
    kind = KINDS.get(call.fc1.dtype)
    if kind is None:
        expected = "fp16, bf16, fp32, float8_e4m3fn or uint8 (mxfp4)"
        raise ValueError(check.problem("fc1_expert_weights", f"dtype {call.fc1.dtype}", expected, "Convert it."))
    return kind(call)


def _scales(call: Call, count: int, kind: str) -> None:
    if len(call.scales) != count:
        expected = f"{count} tensors for {kind} weights"
        raise ValueError(check.problem("quant_scales", f"{len(call.scales)} tensors", expected, "See the docstring."))


def _plain(call: Call) -> Quantised:
    check.tensor("input", call.x, dtypes=(call.fc1.dtype,))
    return Quantised(Weights(call.fc1), Weights(call.fc2))


def _fp8_tensor(call: Call) -> Quantised:
    _scales(call, 4, "float8_e4m3fn")
    check.tensor("input", call.x, dtypes=(E4M3,))
    factors = []
    for i, scale in enumerate(call.scales):
        check.tensor(f"quant_scales[{i}]", scale, dtypes=(torch.float32,), like=("input", call.x))
        check.choice(f"elements of quant_scales[{i}]", scale.numel(), (1, call.fc1.shape[0]))
        factors.append(scale.reshape(-1))
    fc1, fc2 = (
        Weights(w, kind="fp8_tensor", global_scale=factor)
        for w, factor in ((call.fc1, factors[0]), (call.fc2, factors[2]))
    )
    return Quantised(fc1, fc2, factors[1])


def _fp8_blocks(call: Call) -> Quantised:
    _scales(call, 2, "block-scaled float8_e4m3fn")
    check.tensor("fc1_expert_weights", call.fc1, dtypes=(E4M3,))
    check.tensor("input", call.x, dtypes=check.FLOAT_DTYPES)
    weights = []
    for i, (w, scale) in enumerate(zip((call.fc1, call.fc2), call.scales, strict=True)):
        shape = (w.shape[0], -(-w.shape[1] // BLOCK), -(-w.shape[2] // BLOCK))
        check.tensor(f"quant_scales[{i}]", scale, dtypes=(torch.float32,), shape=shape, like=("input", call.x))
        weights.append(Weights(w, scale=scale, kind="fp8_block"))
    if call.fc2.shape[2] % BLOCK:
        fix = "Pad the experts."
        raise ValueError(check.problem("intermediate size", call.fc2.shape[2], f"a multiple of {BLOCK}", fix))
    return Quantised(weights[0], weights[1])


def _mxfp4(call: Call) -> Quantised:
    if not call.groups:
        fix = "Pass use_w4_group_scaling=True."
        raise ValueError(check.problem("fc1_expert_weights", "uint8", "use_w4_group_scaling with mxfp4 weights", fix))
    _scales(call, 2, "mxfp4")
    check.tensor("input", call.x, dtypes=check.FLOAT_DTYPES)
    weights = []
    for i, (w, scale) in enumerate(zip((call.fc1, call.fc2), call.scales, strict=True)):
        shape = (*w.shape[:2], w.shape[2] * 2 // MXFP4_BLOCK)
        check.multiple("columns of the weights", w.shape[2] * 2, "the block", MXFP4_BLOCK)
        check.tensor(f"quant_scales[{i}]", scale, dtypes=(torch.uint8,), shape=shape, like=("input", call.x))
        weights.append(Weights(w, scale=scale, kind="mxfp4"))
    return Quantised(weights[0], weights[1])


KINDS: dict[torch.dtype, Callable[[Call], Quantised]] = {
    **dict.fromkeys(check.FLOAT_DTYPES, _plain),
    E4M3: _fp8_tensor,
    torch.uint8: _mxfp4,
}
