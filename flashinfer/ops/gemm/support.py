"""Which implementation runs which product: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.check import FP8_DTYPES
from flashinfer.core.select import triton_missing
from flashinfer.ops.gemm.spec import FEW_ROWS, FP4_BLOCK, FP8_BLOCK, GemmSpec

# Triton releases whose code for the Hopper kernel was run.
HOPPER_TRITON = "3.6."
HOPPER_DTYPES = (torch.float16, torch.bfloat16)
# Elements of a gathered row in a tile.
COPIED_DEPTH = 64
# Pairs of up and gate go to registers in blocks of so many columns, fp8 ones with a scale of their own.
HALF_PAIRS, FP8_PAIRS = 8, 128


def torch_supports(spec: GemmSpec, arch: Arch) -> str | None:
    """The torch implementation runs everything."""
    return None


def triton_supports(spec: GemmSpec, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter, and instructions for fp8."""
    missing = triton_missing(arch)
    if missing is not None:
        return missing
    if spec.weight_dtype in FP8_DTYPES and not arch.has_fp8:
        return f"{arch.name} has no fp8 numbers"
    if arch.is_cpu and torch.bfloat16 in (spec.row_dtype, spec.out_dtype):
        return "the Triton interpreter multiplies bf16 wrongly"
    return None


def gluon_sm90_supports(spec: GemmSpec, arch: Arch) -> str | None:
    """Hopper's own kernel: operands go from tensor maps to the tensor cores, 4-bit weights through registers."""
    if not arch.has_wgmma:
        return f"warpgroup products are Hopper's, this is {arch.name}"
    if arch.triton is None or not arch.triton.startswith(HOPPER_TRITON):
        return f"Triton {arch.triton}: the kernel was run with {HOPPER_TRITON}x only"
    return _operand_problem(spec) or _layout_problem(spec) or _pair_problem(spec)


def _operand_problem(spec: GemmSpec) -> str | None:
    dtypes = (spec.row_dtype, spec.weight_dtype)
    fp8, fp4 = spec.kind in ("fp8_tensor", "fp8_block"), spec.kind in FP4_BLOCK
    if fp4 and spec.row_dtype != torch.bfloat16:
        return f"{spec.kind} weights are decoded to bf16, tensor cores take rows of the same type"
    if fp4 and spec.few_rows:
        return f"tiles of {spec.kind} weights are for more than {FEW_ROWS} rows a group on average"
    if fp8 and dtypes != (torch.float8_e4m3fn,) * 2:
        return "fp8 operands must both be e4m3fn"
    if spec.kind == "plain" and (dtypes[0] != dtypes[1] or dtypes[0] not in HOPPER_DTYPES):
        return "tensor cores take both operands in one 16-bit type here"
    if spec.out_dtype not in HOPPER_DTYPES:
        return "the output leaves through shared memory of a 16-bit type"
    if spec.kind == "fp8_block" and not (spec.scale_rows and spec.scale_cols == FP8_BLOCK):
        return f"block scales must be of 1 x {FP8_BLOCK} or {FP8_BLOCK} x {FP8_BLOCK} elements, for rows and weights"
    return None


def _layout_problem(spec: GemmSpec) -> str | None:
    if spec.gathered and spec.row_dtype not in HOPPER_DTYPES:
        return "tensor maps bring neighbouring rows, and 16-bit ones are copied; these are gathered"
    if spec.gathered and spec.k % COPIED_DEPTH:
        return f"gathered rows are copied {COPIED_DEPTH} elements at a time, they have {spec.k}"
    for name, usable in (("rows", spec.row_map), ("weights", spec.weight_map), ("out", spec.out_map)):
        if not usable:
            return (
                f"{name}: address and all strides but the innermost must be in multiples of 16 bytes, for tensor maps"
            )
    if spec.transposed and spec.weight_dtype.itemsize == 1:
        return "weights of less than 16 bits are read along K only, their stride of 1 is that of N"
    return None


def _pair_problem(spec: GemmSpec) -> str | None:
    if not spec.gated:
        return None
    if spec.transposed:
        return "gates and ups of weights [W, K, N] do not come in one box"
    pairs = FP8_PAIRS if spec.row_dtype.itemsize == 1 else HALF_PAIRS
    if spec.out_cols % pairs:
        return f"gated columns come in blocks of {pairs}, there are {spec.out_cols}"
    return None
