"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from flashinfer.core.arch import SMEM_BYTES, Arch
from flashinfer.device.rows import Rows
from flashinfer.ops.norm.spec import NormSpec
from flashinfer.ops.norm.triton.configs import choose
from flashinfer.ops.norm.triton.kernel import norm_kernel
from flashinfer.testing.gate import ALL_ARCHS, GateCase

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SPELLED = {BF16: "bf16", FP16: "fp16", FP32: "fp32", E4M3: "u8", E5M2: "u8"}
NUM_SMS = 132
FEW, MANY = 1, 1 << 20
# name, hidden size, input, weight, output, centred, adds, flat
KINDS = (
    ("rms4096", 4096, BF16, BF16, BF16, False, False, True),
    ("rms_heads128", 128, BF16, BF16, BF16, False, False, False),
    ("rms_odd", 577, FP16, FP32, FP16, False, False, False),
    ("rms_widest", 16384, FP32, FP32, FP32, False, False, True),
    ("add8192", 8192, BF16, BF16, BF16, False, True, True),
    ("add_widest", 16384, BF16, BF16, BF16, False, True, True),
    ("layer5120", 5120, BF16, FP32, BF16, True, False, True),
    ("layer_widest", 16384, FP16, FP32, FP16, True, False, True),
    ("rms_e4m3", 4096, BF16, BF16, E4M3, False, False, True),
    ("add_e5m2", 7168, FP16, FP16, E5M2, False, True, True),
    ("layer_e4m3", 1024, BF16, FP32, E4M3, True, False, True),
)


def cases() -> Iterator[GateCase]:
    """Each kind of norm for few rows and for many."""
    for kind, num_rows, native in product(KINDS, (FEW, MANY), (True, False)):
        name, hidden_size, dtype, weight_dtype, out_dtype, centred, adds, flat = kind
        is_fp8 = out_dtype in (E4M3, E5M2)
        archs = tuple(a for a in ALL_ARCHS if not is_fp8 or Arch(a, NUM_SMS, 0).converts_to_fp8 == native)
        if not archs or native > is_fp8:
            continue
        arch = Arch(archs[0], NUM_SMS, SMEM_BYTES.get(archs[0], 0))
        launch = choose(NormSpec(hidden_size, dtype, weight_dtype, out_dtype, centred, adds, 0.0), arch, num_rows, flat)
        rows = Rows(f"*{SPELLED[dtype]}", "i32", "i32")
        signature = {
            "out": Rows(f"*{SPELLED[out_dtype]}", "i32", "i32"),
            "input": rows,
            "residual": rows if adds else "constexpr",
            "weight": f"*{SPELLED[weight_dtype]}",
            "shift": f"*{SPELLED[weight_dtype]}" if centred else "constexpr",
            "scale": "*fp32" if is_fp8 else "constexpr",
            "num_rows": "i32",
            "num_inner": "i32",
            "eps": "fp32",
            "cfg": "constexpr",
        }
        absent = {a: None for a, kind in signature.items() if kind == "constexpr"}
        wide = 1 if hidden_size % 16 else 3
        aligned = [(i, j) for i in range(3 if adds else 2) for j in range(wide)] + [(3,), (4,), (5,)]
        aligned = [path for path in aligned if list(signature.values())[path[0]] != "constexpr"]
        yield GateCase(
            name=f"norm_{name}.{'few' if num_rows == FEW else 'many'}{'.native' if native else ''}",
            kernel=norm_kernel,
            signature=signature,
            constexprs={**absent, "cfg": launch.kernel},
            attrs={path: [["tt.divisibility", 16]] for path in aligned},
            options={"num_warps": launch.num_warps},
            archs=archs,
        )
