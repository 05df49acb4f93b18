"""What the offline compile gate compiles of this folder: every tile, and every way that operands come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from flashinfer.device.finish import Finish
from flashinfer.ops.gemm.gluon_sm90.configs import COPY_REGISTERS, REGISTERS, RULES, TILES, bits_of, configured
from flashinfer.ops.gemm.gluon_sm90.epilogue import Target
from flashinfer.ops.gemm.gluon_sm90.kernel import Shape, grouped_kernel
from flashinfer.ops.gemm.gluon_sm90.launch import box_layout, boxes, shares_rows
from flashinfer.ops.gemm.gluon_sm90.packed import BlockScales
from flashinfer.ops.gemm.gluon_sm90.producer import Scattered
from flashinfer.ops.gemm.gluon_sm90.scales import Scales
from flashinfer.ops.gemm.gluon_sm90.schedule import Groups
from flashinfer.ops.gemm.spec import FP4_BLOCK, GemmSpec
from flashinfer.testing.gate import Constant, GateCase, case_of, tensor_map

HOPPER = ("sm90",)
BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
BASE = GemmSpec("plain", BF16, BF16, BF16, n=4096, k=4096)
HALF = BASE._replace(row_dtype=FP16, weight_dtype=FP16, out_dtype=FP16)
BLOCK = BASE._replace(kind="fp8_block", row_dtype=E4M3, weight_dtype=E4M3, scale_rows=1, scale_cols=128)
TENSOR = BLOCK._replace(kind="fp8_tensor", scale_rows=0, scale_cols=0)
MXFP4 = BASE._replace(kind="mxfp4", weight_dtype=torch.uint8)


class Problem(NamedTuple):
    """One compiled path. tiles: None for all of these operands. groups: their class. max_spill_bytes: of the case."""

    name: str
    spec: GemmSpec
    tiles: tuple[str, ...] | None = None
    groups: int = 32
    max_spill_bytes: int | None = 0


# The tiles that rules choose for 16-bit operands.
CHOSEN = tuple(sorted({tile for (_, bits), tiles in RULES.items() if bits == 16 for tile in tiles}))
GATED = BLOCK._replace(activation="swiglu")
MANY = BLOCK._replace(indexed=True, scale_rows=128)
TAILED = tuple(name for (name, _), tile in TILES.items() if tile.tail)
PACKED, PACKED_PAIR = ("256x128", "128x128", "64x128"), ("64x128x2",)
PACKED_UP = MXFP4._replace(activation="swiglu", bias=True, gathered=True)
GATHERED_PAIRS = BASE._replace(gathered=True, activation="swiglu")
PROBLEMS = (
    Problem("bf16", BASE),
    Problem("bf16_swiglu", BASE._replace(activation="swiglu"), CHOSEN),
    Problem("bf16_gathered", BASE._replace(gathered=True), CHOSEN),
    Problem("bf16_moe_up", GATHERED_PAIRS, CHOSEN, 256),
    # These spill before their loops, under Triton 3.6 alone.
    Problem("bf16_moe_up_bias", GATHERED_PAIRS._replace(bias=True), TAILED, 32, 8),
    Problem("bf16_gathered_groups256", BASE._replace(gathered=True), TAILED, 256, 8),
    Problem("bf16_groups256", BASE._replace(indexed=True), ("128x256", "64x128x2", "swap16"), 256),
    Problem("bf16_groups512", BASE, ("128x256", *TAILED), 512),
    Problem("bf16_kn", BASE._replace(transposed=True), CHOSEN),
    Problem("fp16_moe", HALF._replace(activation="swiglu", bias=True, indexed=True), ("128x256", "swap16")),
    Problem(
        "fp16_bias", HALF._replace(activation="gelu", bias=True, row_weights=True), ("128x256", "64x128x2", *TAILED)
    ),
    Problem("bf16_padded", BASE._replace(layout="padded"), ("128x256", *TAILED)),
    Problem("bf16_equal", BASE._replace(layout="equal"), ("64x128x2", *TAILED)),
    Problem("bf16_one", BASE._replace(layout="one"), ("128x256",), 0),
    Problem("fp8_block", BLOCK),
    Problem("fp8_block_swiglu", GATED),
    Problem("fp8_block_groups256", MANY, ("128x256", "64x128"), 256),
    Problem("fp8_block_one", BLOCK._replace(layout="one"), ("128x256", "128x64", "64x64"), 0),
    Problem("fp8_tensor", TENSOR, ("128x256", "64x128")),
    Problem("fp8_tensor_swiglu", TENSOR._replace(activation="swiglu"), ("128x256",)),
    Problem("mxfp4", MXFP4, PACKED),
    Problem("mxfp4_swiglu", MXFP4._replace(activation="swiglu", bias=True, indexed=True), PACKED),
    Problem("mxfp4_groups512", MXFP4._replace(indexed=True), ("256x128",), 512),
    Problem("mxfp4_one", MXFP4._replace(layout="one"), ("128x128",), 0),
    Problem("nvfp4", MXFP4._replace(kind="nvfp4"), PACKED),
    Problem("nvfp4_swiglu", MXFP4._replace(kind="nvfp4", activation="swiglu"), ("256x128",)),
    # What of these spills does so once a tile, not in its loop.
    Problem("mxfp4", MXFP4, PACKED_PAIR, max_spill_bytes=None),
    Problem("mxfp4_swiglu", MXFP4._replace(activation="swiglu", bias=True), PACKED_PAIR, max_spill_bytes=None),
    Problem("mxfp4_moe_up", PACKED_UP, PACKED + PACKED_PAIR, 256, None),
    Problem("mxfp4_row_weights", PACKED_UP._replace(activation="", row_weights=True), PACKED, max_spill_bytes=None),
    Problem("nvfp4", MXFP4._replace(kind="nvfp4"), PACKED_PAIR, max_spill_bytes=None),
)


def cases() -> Iterator[GateCase]:
    """Each problem with each of its tiles; spills nowhere in a loop."""
    for problem in PROBLEMS:
        bits = bits_of(problem.spec)
        for name in problem.tiles or [tile for tile, width in TILES if width == bits]:
            yield _case(problem, name)
    for name in ("128x256", *TAILED):
        yield _case(Problem("bf16_dealt", BASE), name, counts=False)


def _case(problem: Problem, name: str, counts: bool = True) -> GateCase:
    """counts: whether tiles are taken by a counter, where they can be."""
    spec = problem.spec
    tile = TILES[name, bits_of(spec)]
    finish = _finish(spec)
    config = configured(spec, tile, problem.groups, finish is not None)
    int32 = torch.empty(0, dtype=torch.int32)
    dtypes = (spec.row_dtype, spec.weight_dtype, spec.out_dtype)
    maps = [
        tensor_map(dtype, box, box_layout(len(box), box[-1], dtype.itemsize * 8))
        for dtype, box in zip(dtypes, boxes(config), strict=True)
    ]
    registers = COPY_REGISTERS if spec.gathered else REGISTERS
    start, consumer, producer = registers[tile.consumers, tile.per_sm]
    scattered = Scattered(torch.empty(0, dtype=spec.row_dtype), 16, int32)
    arguments: dict[str, Any] = {
        "x_source": scattered if spec.gathered else maps[0],
        "w_desc": maps[1],
        "o_desc": maps[2],
        "target": Target(torch.empty(0, dtype=spec.out_dtype), 16),
        "finish": finish,
        "groups": Groups(
            int32 if spec.layout == "ragged" else None,
            int32 if spec.layout == "padded" else None,
            int32 if spec.indexed else None,
            1,
            int32 if counts and problem.groups and shares_rows(config) else None,
        ),
        "num_rows": 7,
        "num_groups": 7,
        "shape": Shape(16, 16),
        "scales": _scales(spec),
        "cfg": Constant(config),
        "CONSUMER_REGISTERS": Constant(consumer),
        "PRODUCER_REGISTERS": Constant(producer),
    }
    options = {"num_warps": 4, "maxnreg": start, "launch_pdl": True}
    limits: dict[str, Any] = {"max_spill_bytes": problem.max_spill_bytes}
    return case_of(f"{problem.name}.{name}", grouped_kernel, arguments, options=options, archs=HOPPER, **limits)


def _scales(spec: GemmSpec) -> Scales | BlockScales | None:
    fp32 = torch.empty(0)
    if spec.kind in FP4_BLOCK:
        return BlockScales(torch.empty(0, dtype=torch.uint8), 7, 7, 1)
    return Scales(fp32, 16, 1, fp32, 16, 16, 1) if spec.kind == "fp8_block" else None


def _finish(spec: GemmSpec) -> Finish | None:
    """Every parameter of the activation where there is a bias."""
    fp32 = torch.empty(0)
    per_tensor, per_matrix = spec.kind == "fp8_tensor", spec.kind in ("fp8_tensor", "nvfp4")
    if not (spec.activation or spec.bias or spec.row_weights or per_matrix):
        return None
    parameters = [fp32] * 3 if spec.activation == "swiglu" and spec.bias else [None] * 3
    return Finish(
        torch.empty(0, dtype=spec.out_dtype) if spec.bias else None,
        16,
        fp32 if spec.row_weights else None,
        *parameters,
        fp32 if per_tensor else None,
        fp32 if per_matrix else None,
        1,
    )
