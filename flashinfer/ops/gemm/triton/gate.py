"""What the offline compile gate compiles of this folder: every kind of operands, of tiles and of loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from flashinfer.core.arch import SMEM_BYTES, Arch
from flashinfer.device.finish import Finish
from flashinfer.ops.gemm.spec import FP4_BLOCK, GemmSpec
from flashinfer.ops.gemm.triton.configs import HEIGHTS, Launch, choose
from flashinfer.ops.gemm.triton.kernel import grouped_gemm_kernel
from flashinfer.ops.gemm.triton.operands import RowSide, WeightSide
from flashinfer.ops.gemm.triton.schedule import Groups
from flashinfer.testing.gate import AMD_ARCHS, NVIDIA_ARCHS, Constant, GateCase, case_of, tensor_map

BF16, FP16, E4M3, U8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8
ARCHS = {
    "half": (*NVIDIA_ARCHS, *AMD_ARCHS),
    "fp8": ("sm89", "sm90", "sm100", "sm120", "gfx950"),
}
NUM_GROUPS = 8
BASE = GemmSpec("plain", BF16, BF16, BF16, n=4096, k=4096)
BLOCK = BASE._replace(kind="fp8_block", row_dtype=E4M3, weight_dtype=E4M3, scale_rows=1, scale_cols=128)


class Problem(NamedTuple):
    """One compiled path. heights: of tiles, as rows a group."""

    name: str
    spec: GemmSpec
    heights: tuple[int, ...] = HEIGHTS
    archs: str = "half"


PROBLEMS = (
    Problem("bf16", BASE),
    Problem("bf16_swiglu", BASE._replace(activation="swiglu")),
    Problem("bf16_moe_up", BASE._replace(activation="swiglu", gathered=True, row_map=False, bias=True), (16, 64, 128)),
    Problem("fp16_kn", BASE._replace(row_dtype=FP16, weight_dtype=FP16, out_dtype=FP16, transposed=True), (64, 128)),
    Problem("bf16_pointers", BASE._replace(row_map=False, weight_map=False, out_map=False, indexed=True), (16, 128)),
    Problem("bf16_relu2", BASE._replace(activation="relu2", row_weights=True, layout="padded"), (64,)),
    Problem("fp8_block", BLOCK, archs="fp8"),
    Problem("fp8_block_swiglu", BLOCK._replace(activation="swiglu"), (16, 128), "fp8"),
    Problem("fp8_block_gathered", BLOCK._replace(activation="geglu", gathered=True, row_map=False), (64, 128), "fp8"),
    Problem("fp8_rows", BLOCK._replace(layout="one", scale_rows=128, scale_cols=1), (128,), "fp8"),
    Problem("fp8_tensor", BASE._replace(kind="fp8_tensor", row_dtype=E4M3, weight_dtype=E4M3), (16, 128), "fp8"),
    Problem("mxfp4", BASE._replace(kind="mxfp4", weight_dtype=U8)),
    Problem("mxfp4_swiglu", BASE._replace(kind="mxfp4", weight_dtype=U8, activation="swiglu", bias=True), (16, 128)),
    Problem("nvfp4", BASE._replace(kind="nvfp4", weight_dtype=U8), (16, 128)),
)


def cases() -> Iterator[GateCase]:
    """Each problem at each of its heights on Hopper, at one elsewhere, with the tiles that each architecture gets."""
    for problem in PROBLEMS:
        for name in ARCHS[problem.archs]:
            for height in problem.heights if name == "sm90" else problem.heights[-1:]:
                yield _case(problem, height, name)


def _case(problem: Problem, height: int, arch_name: str) -> GateCase:
    arch = Arch(arch_name, 132, SMEM_BYTES.get(arch_name, 65_536), "3.6.0")
    launch = choose(problem.spec, arch, height * 1024, 1024)
    return case_of(
        f"{problem.name}.m{height}.{arch_name}",
        grouped_gemm_kernel,
        _arguments(problem.spec, launch),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        archs=(arch_name,),
        max_spill_bytes=0 if arch.has_wgmma else None,
    )


def _arguments(spec: GemmSpec, launch: Launch) -> dict[str, Any]:
    cfg = launch.kernel
    int32, fp32 = torch.empty(0, dtype=torch.int32), torch.empty(0)
    values, matrices = torch.empty(0, dtype=spec.row_dtype), torch.empty(0, dtype=spec.weight_dtype)
    blocks, fp4 = spec.kind == "fp8_block", spec.kind in FP4_BLOCK
    box = (1, cfg.block_k, cfg.block_n) if cfg.transposed else (1, cfg.block_n, cfg.block_k // cfg.packed)
    strides = (16, 1, 16) if spec.transposed else (16, 16, 1)
    scale = fp32 if blocks else torch.empty(0, dtype=U8) if fp4 else None
    scaled = spec.kind == "fp8_tensor"
    parameters = [fp32] * 3 if spec.activation == "swiglu" and spec.bias else [None] * 3
    return {
        "x_desc": tensor_map(spec.row_dtype, (cfg.block_m, cfg.block_k)) if cfg.row_map else None,
        "w_desc": tensor_map(spec.weight_dtype, box) if cfg.weight_map else None,
        "o_desc": tensor_map(spec.out_dtype, (cfg.block_m, cfg.block_n)) if cfg.out_map else None,
        "rows": RowSide(values, 16, int32 if spec.gathered else None, fp32 if blocks else None, 7, 1),
        "weights": WeightSide(matrices, *strides, int32 if spec.indexed else None, 1, scale, 7, 7, 1),
        "groups": Groups(int32 if spec.layout == "ragged" else None, int32 if spec.layout == "padded" else None),
        "finish": Finish(
            torch.empty(0, dtype=spec.out_dtype) if spec.bias else None,
            16,
            fp32 if spec.row_weights else None,
            *parameters,
            fp32 if scaled else None,
            fp32 if scaled or spec.kind == "nvfp4" else None,
            1,
        ),
        "out": (torch.empty(0, dtype=spec.out_dtype), 16),
        "num_rows": 7,
        "num_groups": 7,
        "num_cols": 16,
        "depth": 16,
        "activation": Constant(launch.activation),
        "cfg": Constant(cfg),
    }
