"""What the offline compile gate compiles of this folder: every tile that a configuration can name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from flashinfer.ops.gemm.gluon_sm90.configs import REGISTERS, TILES8, TILES16, Tile, configured
from flashinfer.ops.gemm.gluon_sm90.epilogue import Output
from flashinfer.ops.gemm.gluon_sm90.kernel import GemmConfig, Shape, grouped_kernel
from flashinfer.ops.gemm.gluon_sm90.launch import box_layout, boxes
from flashinfer.ops.gemm.gluon_sm90.scaled import Scales
from flashinfer.ops.gemm.gluon_sm90.schedule import Groups
from flashinfer.testing.gate import Constant, GateCase, Typed, case_of

HOPPER = ("sm90",)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv"}


def cases() -> Iterator[GateCase]:
    """Each tile for each kind of operands."""
    for name, tile in TILES16.items():
        yield _case(f"bf16.{name}", tile, torch.bfloat16, configured(tile, 16, 32))
    for name, tile in TILES8.items():
        yield _case(f"fp8.{name}", tile, torch.float8_e4m3fn, configured(tile, 8, 32))


def _case(name: str, tile: Tile, dtype: torch.dtype, config: GemmConfig, indices: bool = False) -> GateCase:
    int32, out_dtype = torch.empty(0, dtype=torch.int32), dtype if dtype.itemsize == 2 else torch.bfloat16
    fp32 = torch.empty(0)
    maps = [
        Typed(f"tensordesc<{NAMES[d]}{list(box)},{box_layout(len(box), box[-1], d.itemsize * 8)!r}>")
        for d, box in zip((dtype, dtype, out_dtype), boxes(config), strict=True)
    ]
    start, consumer, producer = REGISTERS[tile.consumers, tile.programs]
    arguments: dict[str, Any] = {
        "x_desc": maps[0],
        "w_desc": maps[1],
        "o_desc": maps[2],
        "output": Output(torch.empty(0, dtype=out_dtype), 16),
        "groups": Groups(int32 if config.max_groups else None, int32 if indices else None),
        "num_rows": 7,
        "num_groups": 7,
        "shape": Shape(16, 16),
        "scales": Scales(fp32, 16, 1, fp32, 16, 16, 1) if config.scaled else None,
        "cfg": Constant(config),
        "CONSUMER_REGISTERS": Constant(consumer),
        "PRODUCER_REGISTERS": Constant(producer),
    }
    return case_of(name, grouped_kernel, arguments, options={"num_warps": 4, "maxnreg": start}, archs=HOPPER)
