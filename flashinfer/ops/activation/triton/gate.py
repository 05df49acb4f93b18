"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from flashinfer.core.arch import SMEM_BYTES, Arch
from flashinfer.device.rows import Rows
from flashinfer.ops.activation.spec import GatedSpec
from flashinfer.ops.activation.triton.kernel import ACTIVATIONS, gated_kernel
from flashinfer.ops.activation.triton.launch import NUM_WARPS, choose
from flashinfer.testing.gate import ALL_ARCHS, GateCase

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SPELLED = {BF16: "bf16", FP16: "fp16", FP32: "fp32", E4M3: "u8", E5M2: "u8"}
NUM_SMS = 132
FEW, MANY = 1, 1 << 20
# name, activation, columns of the result, input, output, flat
KINDS = (
    ("silu14336", "silu", 14336, BF16, BF16, True),
    ("silu_views", "silu", 200, FP16, FP16, False),
    ("gelu4096", "gelu", 4096, BF16, BF16, True),
    ("gelu_tanh11008", "gelu_tanh", 11008, FP32, FP32, True),
    ("silu_e4m3", "silu", 14336, BF16, E4M3, True),
    ("gelu_tanh_e5m2", "gelu_tanh", 4096, FP16, E5M2, True),
)


def cases() -> Iterator[GateCase]:
    """Each activation for few rows and for many, and the ways to write fp8."""
    for kind, num_rows, native in product(KINDS, (FEW, MANY), (True, False)):
        name, activation, width, dtype, out_dtype, flat = kind
        is_fp8 = out_dtype in (E4M3, E5M2)
        archs = tuple(a for a in ALL_ARCHS if not is_fp8 or Arch(a, NUM_SMS, 0).converts_to_fp8 == native)
        if not archs or native > is_fp8:
            continue
        arch = Arch(archs[0], NUM_SMS, SMEM_BYTES.get(archs[0], 0))
        signature = {
            "out": Rows(f"*{SPELLED[out_dtype]}", "i32", "i32"),
            "input": Rows(f"*{SPELLED[dtype]}", "i32", "i32"),
            "scale": "*fp32" if is_fp8 else "constexpr",
            "num_rows": "i32",
            "num_inner": "i32",
            "activation": "constexpr",
            "cfg": "constexpr",
        }
        constexprs = {
            "activation": ACTIVATIONS[activation],
            "cfg": choose(GatedSpec(activation, width, dtype, out_dtype), arch, num_rows, flat),
        }
        aligned = [(i, j) for i in range(2) for j in range(3)] + ([(2,)] if is_fp8 else [])
        yield GateCase(
            name=f"{name}.{'few' if num_rows == FEW else 'many'}{'.native' if native else ''}",
            kernel=gated_kernel,
            signature=signature,
            constexprs=constexprs | ({} if is_fp8 else {"scale": None}),
            attrs={path: [["tt.divisibility", 16]] for path in aligned},
            options={"num_warps": NUM_WARPS},
            archs=archs,
        )
