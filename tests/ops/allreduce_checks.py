"""Problems of fused all-reduces that all ranks know whole, and what their results may be off by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flashinfer.comm import AllReduceFusionPattern as Pattern
from flashinfer.comm import allreduce_fusion

FP8 = torch.float8_e4m3fn
EPS = 1e-5


@dataclass
class Problem:
    """inputs, residual, gamma: of all ranks, of all, on the device. The rest: fp64, and bounds of the errors."""

    inputs: list[torch.Tensor]
    residual: torch.Tensor
    gamma: torch.Tensor
    scale: torch.Tensor
    bias: float
    total: torch.Tensor
    sum: torch.Tensor
    normed: torch.Tensor
    total_bound: torch.Tensor
    sum_bound: torch.Tensor
    norm_bound: torch.Tensor


def problem(
    shape: tuple[int, int], dtype: torch.dtype, world_size: int, seed: int, device: torch.device, bias: float = 0.0
) -> Problem:
    """Random numbers, some of them zeros of both signs, the same on all ranks."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def rand(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    inputs = [rand(*shape) for _ in range(world_size)]
    for rank, x in enumerate(inputs):
        x.view(-1)[rank::7] = 0.0
        x.view(-1)[rank::11] = -0.0
    residual, gamma = rand(*shape), rand(shape[1])
    scale = torch.rand(1, generator=generator, device=device) * 0.01 + 0.01
    return solved(inputs, residual, gamma, scale, bias)


def solved(
    inputs: list[torch.Tensor], residual: torch.Tensor, gamma: torch.Tensor, scale: torch.Tensor, bias: float
) -> Problem:
    """A problem with its solution: sums are rounded to the dtype once (two shots: once more before they are used)."""
    last = torch.finfo(inputs[0].dtype).eps
    total = sum((x.double() for x in inputs), torch.zeros_like(residual, dtype=torch.float64))
    size = sum((x.abs().double() for x in inputs), torch.zeros_like(total))
    total_bound = last * total.abs() + 2.0**-22 * size
    result = total + residual.double()
    sum_bound = total_bound + last * result.abs()
    factor = torch.rsqrt(result.square().mean(-1, keepdim=True) + EPS)
    weight = gamma.double() + bias
    normed = result * factor * weight
    # The mean of squares is off by no more than its terms, relative to their size.
    drift = (total_bound * result.abs()).mean(-1, keepdim=True) * factor.square()
    norm_bound = total_bound * factor * weight.abs() + normed.abs() * (drift + last + 2.0**-20) + 1e-7
    bounds = (total_bound, sum_bound, norm_bound)
    return Problem(inputs, residual, gamma, scale, bias, total, result, normed, *bounds)


def within(name: str, got: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor, case: object) -> None:
    """Every element is off by no more than its bound."""
    over = ((got.double() - exact).abs() - bound).max().item()
    assert over <= 0, f"{case}: {name} is {over:g} over its bound"


def fp8_within(name: str, codes: torch.Tensor, scale: torch.Tensor, p: Problem, case: object) -> None:
    """Codes times their scale are the norm, to half a last place of e4m3; beyond its largest number they saturate."""
    limit = 448.0 * scale.double()
    exact = torch.minimum(torch.maximum(p.normed, -limit), limit)
    bound = p.norm_bound + torch.maximum((exact.abs() + p.norm_bound) * 2.0**-4, scale.double() * 2.0**-10)
    within(name, codes.double() * scale.double(), exact, bound * (1 + 2.0**-10), case)


def outputs(p: Problem) -> dict[str, torch.Tensor]:
    """NaN where results go, of input's shape."""
    return {name: torch.full_like(p.residual, float("nan")) for name in ("output", "residual_out", "norm_out")}


def fuse(p: Problem, rank: int, workspace: Any, pattern: int, **given: Any) -> torch.Tensor:
    """A call with the tensors of a problem."""
    common = {"residual_in": p.residual, "rms_gamma": p.gamma, "rms_eps": EPS, "weight_bias": p.bias}
    return allreduce_fusion(p.inputs[rank], workspace, pattern, **{**common, **given})


def check_all_outputs(p: Problem, rank: int, workspace: Any, oneshot: bool | None, case: object) -> None:
    """One call that writes everything: the sum, with residual, the norm, its codes."""
    outs, codes = outputs(p), torch.empty_like(p.residual, dtype=FP8)
    given = {**outs, "quant_out": codes, "scale_factor": p.scale, "use_oneshot": oneshot}
    result = fuse(p, rank, workspace, Pattern.kARResidualRMSNormOutFP8Quant, **given)
    assert result is codes
    check_outputs(p, outs, codes, case)


def check_outputs(p: Problem, outs: dict[str, torch.Tensor], codes: torch.Tensor, case: object) -> None:
    """What `check_all_outputs` asks for."""
    within("output", outs["output"], p.total, p.total_bound, case)
    within("residual_out", outs["residual_out"], p.sum, p.sum_bound, case)
    within("norm_out", outs["norm_out"], p.normed, p.norm_bound, case)
    fp8_within("quant_out", codes, p.scale, p, case)


def fp8_bound(inputs: list[torch.Tensor], group_size: int) -> torch.Tensor:
    """Of each element of an all-reduce sent in fp8, the largest error: half a last place of each part and of the sum.

    A number is off by 2^-4 of itself at most, or below the smallest normal number by half the smallest code, 2^-10.
    """

    def off(x: torch.Tensor, about: torch.Tensor) -> torch.Tensor:
        groups = torch.nn.functional.pad((x.abs() + about).flatten(), (0, -x.numel() % group_size))
        scale = groups.view(-1, group_size).amax(1).clamp(min=2.0**-100) / 448
        least = scale.repeat_interleave(group_size)[: x.numel()].view(x.shape) * 2.0**-10
        return torch.maximum((x.abs() + about) * 2.0**-4, least)

    none = torch.zeros_like(inputs[0], dtype=torch.float64)
    parts = sum((off(x.double(), none) for x in inputs), none)
    total = sum((x.double() for x in inputs), none)
    return (parts + off(total, parts)) * (1 + 2**-10) + total.abs() * 2.0**-8
