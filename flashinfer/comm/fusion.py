"""An all-reduce with what goes around it, on tensors that are there; `allreduce.py` makes those missing."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.comm.patterns import Fusion
from flashinfer.core import check
from flashinfer.core.replay import replayed
from flashinfer.ops import collectives as ops
from flashinfer.ops import quantization
from flashinfer.ops.quantization import SfLayout, scales_needed

FP4_GROUP = 16
Factor = torch.Tensor | float | None


class Norm(NamedTuple):
    """RMSNorm of the sum and a residual: all of `[num_tokens, hidden_size]` and one dtype, weight `[hidden_size]`.

    output: the sum, None if not wanted. residual: None adds nothing. residual_out, out: None if not wanted.
    """

    output: torch.Tensor | None
    residual: torch.Tensor | None
    residual_out: torch.Tensor | None
    out: torch.Tensor | None
    weight: torch.Tensor | None
    eps: float = 1e-6
    weight_bias: float = 0.0


class Codes(NamedTuple):
    """Where the codes of a norm go, with what scales.

    out: fp8 `[num_tokens, hidden_size]`, or the bytes of two codes of fp4 each. scales: those that come out, in bytes
    of e4m3 (fp4, in the order `layout`), fp32 `[num_tokens, 1]` ("fp8_rows") or packed exponents ("fp8_groups", of
    `group_size` numbers). factor: fp32 of one element: the divisor of "fp8", the multiplier of fp4's scales.
    """

    out: torch.Tensor | None
    scales: torch.Tensor | None
    factor: torch.Tensor | None
    layout: int | None = None
    group_size: int | None = None


def factor_of(value: Factor, device: torch.device) -> torch.Tensor | None:
    """A scale as fp32 of one element on the device; numbers are written there by a launch."""
    if value is None or isinstance(value, torch.Tensor):
        return value if value is None else value.to(torch.float32)
    return torch.full((1,), float(value), dtype=torch.float32, device=device)


def two_shot(use_oneshot: bool | None) -> bool | None:
    return None if use_oneshot is None else not use_oneshot


def _check_norm(like: torch.Tensor, shape: tuple[int, ...], norm: Norm) -> None:
    """Check the tensors of a norm against the dtype and device of `like`, and `shape`."""
    rows = {"output": norm.output, "residual_in": norm.residual, "residual_out": norm.residual_out}
    for name, x in {**rows, "norm_out": norm.out}.items():
        if x is not None:
            check.tensor(name, x, dtypes=(like.dtype,), shape=shape, like=("input", like))
    check.contiguous(input=like, rms_gamma=norm.weight, norm_out=norm.out, **rows)
    if norm.weight is not None:
        check.tensor("rms_gamma", norm.weight, dtypes=check.FLOAT_DTYPES, shape=shape[1:], like=("input", like))


@replayed
def _reduce(
    input: torch.Tensor,
    output: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    normed: torch.Tensor | None,
    weight: torch.Tensor | None,
    quantised: torch.Tensor | None,
    scale: torch.Tensor | None,
    scales: torch.Tensor | None,
    workspace: int,
    eps: float,
    weight_bias: float,
    shots: bool | None,
) -> None:
    like = ("input", input)
    check.tensor("input", input, dtypes=check.FLOAT_DTYPES, shape=(None, None))
    _check_norm(input, tuple(input.shape), Norm(output, residual, residual_out, normed, weight))
    if quantised is not None:
        check.tensor("quant_out", quantised, dtypes=check.FP8_DTYPES, shape=input.shape, like=like)
        check.contiguous(quant_out=quantised, scale_out=scales)
    if scale is not None:
        check.scalar("scale_factor", scale, like)
    if scales is not None:
        check.tensor("scale_out", scales, dtypes=(torch.float32,), shape=(input.shape[0], 1), like=like)
    tensors = ops.Reduce(input, output, residual, residual_out, normed, weight, quantised, scale, scales)
    ops.all_reduce(tensors, workspace, eps, weight_bias, shots)


@replayed
def _mixed_reduce(
    input: torch.Tensor,
    table: torch.Tensor | None,
    factors: torch.Tensor | None,
    added: torch.Tensor | None,
    sizes: tuple[int, int, int],
    factor: float,
    output: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    normed: torch.Tensor | None,
    weight: torch.Tensor | None,
    workspace: int,
    eps: float,
    weight_bias: float,
) -> None:
    num_tokens, num_parts, hidden_size = sizes
    shape, like = (num_tokens, hidden_size), ("input", input)
    num_rows = None if table is not None else num_tokens * num_parts
    check.tensor("input", input, dtypes=check.FLOAT_DTYPES, shape=(num_rows, hidden_size))
    _check_norm(input, shape, Norm(output, residual, residual_out, normed, weight))
    if table is not None:
        name = "expanded_idx_to_permuted_idx"
        check.tensor(name, table, dtypes=(torch.int32,), shape=(num_tokens, num_parts), like=like)
    if factors is not None:
        pairs = (num_tokens, num_parts) if table is not None else (num_parts, num_tokens)
        check.tensor("the experts' scales", factors, dtypes=check.FLOAT_DTYPES, shape=pairs, like=like)
    if added is not None:
        check.tensor("what is added to the experts", added, dtypes=(input.dtype,), shape=shape, like=like)
    check.contiguous(expanded_idx_to_permuted_idx=table, scales=factors, added=added)
    tensors = ops.Reduce(input, output, residual, residual_out, normed, weight)
    mix = ops.Mix(num_tokens, num_parts, table, factors, added, factor)
    ops.all_reduce(tensors, workspace, eps, weight_bias, None, mix)


@replayed
def _quantise_fp4(
    out: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, factor: torch.Tensor | None, layout: int
) -> None:
    like, (num_rows, hidden_size) = ("input", x), x.shape
    check.multiple("hidden_size", hidden_size, "the 16 numbers of an fp4 block", FP4_GROUP)
    check.choice("layout_code", layout, [int(known) for known in SfLayout])
    for name, given, needed in (
        ("quant_out", out, num_rows * hidden_size // 2),
        ("scale_out", scales, scales_needed(num_rows, hidden_size // FP4_GROUP, SfLayout(layout))),
    ):
        check.contiguous(**{name: check.tensor(name, given, like=like)})
        if given.numel() * given.element_size() < needed:
            got, fix = f"{given.numel() * given.element_size()} bytes", "Make it of that size."
            raise ValueError(check.problem(name, got, f"at least {needed} bytes", fix))
    if factor is not None:
        check.scalar("scale_factor", factor, like)
    codes = out.view(-1).view(torch.uint8)[: num_rows * hidden_size // 2]
    quantization.quantize_fp4(codes.view(num_rows, -1), scales.view(-1).view(torch.uint8), x, factor, layout)


def _quantise_groups(codes: Codes, x: torch.Tensor) -> None:
    """fp8 of groups with scales 2^n: their exponents, four in an int32, column by column, padding zero."""
    out, scales, size = codes.out, codes.scales, check.positive("block_quant_group_size", codes.group_size or 0)
    assert out is not None and scales is not None
    num_rows, hidden_size = x.shape
    check.multiple("hidden_size", hidden_size, "block_quant_group_size", size)
    check.tensor("quant_out", out, dtypes=(torch.float8_e4m3fn,), shape=x.shape, like=("input", x))
    check.contiguous(quant_out=out)
    num_groups, aligned = hidden_size // size, -(-num_rows // 4) * 4
    packed = -(-num_groups // 4)
    check.tensor("scale_out", scales, dtypes=(torch.int32,), shape=(num_rows, packed), like=("input", x))
    if num_rows == 0:
        return
    if scales.stride(0) != 1 or (packed > 1 and scales.stride(1) != aligned):
        got, expected = f"strides {tuple(scales.stride())}", f"strides {(1, aligned)}"
        raise ValueError(check.problem("scale_out", got, expected, "Make it with torch.empty_strided."))
    factors = torch.empty(num_rows, num_groups, dtype=torch.float32, device=x.device)
    groups = (num_rows, num_groups, size)
    quantization.quantize_groups(out.view(groups), factors, x.view(groups), 1e-10, True)
    exponents = torch.nn.functional.pad(factors.view(torch.int32) >> 23, (0, -num_groups % 4))
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=x.device)
    torch.as_strided(scales, (num_rows + (packed - 1) * aligned,), (1,)).zero_()
    scales.copy_((exponents.view(num_rows, packed, 4) << shifts).sum(-1, dtype=torch.int32))


def _quantise(fusion: Fusion, codes: Codes, x: torch.Tensor) -> None:
    """What the kernel of the sum leaves to another launch."""
    if fusion.codes == "fp8_groups":
        return _quantise_groups(codes, x)
    assert codes.out is not None and codes.scales is not None
    layout = SfLayout.layout_128x4 if codes.layout is None else codes.layout
    _quantise_fp4(codes.out, codes.scales, x, codes.factor, int(layout))


def run(
    fusion: Fusion, input: torch.Tensor, norm: Norm, codes: Codes, workspace: ops.Workspace, shots: bool | None
) -> None:
    """The sum of `input` `[num_tokens, hidden_size]`, and what the pattern asks for."""
    inside = fusion.codes in ("fp8", "fp8_rows")
    later = fusion.codes in ("fp4", "fp8_groups")
    normed = norm.out if fusion.keeps_norm else None
    if later and normed is None:
        normed = torch.empty_like(input)
    fp8 = (codes.out, None, codes.scales) if fusion.codes == "fp8_rows" else (codes.out, codes.factor, None)
    quantised = fp8 if inside else (None, None, None)
    rows = (input, norm.output, norm.residual, norm.residual_out, normed, norm.weight)
    _reduce(*rows, *quantised, workspace.number, norm.eps, norm.weight_bias, shots)
    if later and normed is not None and input.numel() > 0:
        _quantise(fusion, codes, normed)


def run_mixed(input: torch.Tensor, mix: ops.Mix, norm: Norm, codes: Codes | None, workspace: ops.Workspace) -> None:
    """`run` for sums of rows of `input` (`Mix`), fp4 codes behind it where codes are given."""
    assert norm.weight is not None
    hidden_size = norm.weight.shape[0]
    normed = norm.out
    if codes is not None and normed is None:
        normed = input.new_empty(mix.num_rows, hidden_size)
    sizes = (mix.num_rows, mix.num_parts, hidden_size)
    rows = (norm.output, norm.residual, norm.residual_out, normed, norm.weight)
    parts = (input, mix.table, mix.factors, mix.added, sizes, mix.scale)
    _mixed_reduce(*parts, *rows, workspace.number, norm.eps, norm.weight_bias)
    if codes is not None and normed is not None and normed.numel() > 0:
        _quantise(Fusion(True, "fp4"), codes, normed)
