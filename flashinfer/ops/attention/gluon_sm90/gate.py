"""What the offline compile gate compiles of this folder: every kernel for Hopper, in the configurations in use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton

from flashinfer.ops.attention import variants
from flashinfer.ops.attention.device.arguments import Factors, Output
from flashinfer.ops.attention.device.fill import BLOCK, fill_kernel
from flashinfer.ops.attention.device.hooks import hooks_of, traits_of
from flashinfer.ops.attention.device.planner import PLANNER_BLOCK, ScheduleTables
from flashinfer.ops.attention.gluon_sm90.configs import choose
from flashinfer.ops.attention.gluon_sm90.kernel import MAX_REGISTERS, Heads, Tiles, prefill_kernel
from flashinfer.ops.attention.gluon_sm90.launch import box_layout
from flashinfer.ops.attention.gluon_sm90.order import order_kernel
from flashinfer.ops.attention.gluon_sm90.producer import BOX_COLUMNS, Cache
from flashinfer.ops.attention.spec import AttentionSpec
from flashinfer.ops.attention.support import hopper_compiler_problem
from flashinfer.ops.attention.variant import Variant
from flashinfer.testing.gate import ALL_ARCHS, Constant, GateCase, Typed, case_of

HOPPER = ("sm90",)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Problem(NamedTuple):
    """One compiled path; page_size 0: ragged."""

    name: str
    variant: Variant
    page_size: int = 0
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    sinks: bool = False


def _problems() -> Iterator[Problem]:
    meta = torch.empty(0)
    causal = variants.causal()
    yield Problem("full", Variant())
    yield Problem("causal", causal)
    yield Problem("causal_page16", causal, 16)
    yield Problem("causal_page1024_fp16", causal, 1024, dtype=torch.float16)
    yield Problem("causal_page1", causal, 1)
    yield Problem("causal_d64_page5", causal, 5, head_dim=64)
    yield Problem("causal_d256_page1", causal, 1, head_dim=256)
    yield Problem("mask_d256", variants.custom_mask(meta.to(torch.uint8), meta.to(torch.int32)), head_dim=256)
    yield Problem("window_d256", causal & variants.sliding_window(1023), head_dim=256)
    yield Problem("alibi_d256", variants.alibi(meta) & causal, head_dim=256)
    yield Problem("mask_page1", variants.custom_mask(meta.to(torch.uint8), meta.to(torch.int32)), 1)
    yield Problem("full_d64", Variant(), head_dim=64)
    yield Problem("causal_d64", causal, head_dim=64)
    yield Problem("full_d256", Variant(), head_dim=256)
    yield Problem("causal_d256_page16", causal, 16, head_dim=256)
    yield Problem("cap", causal & variants.soft_cap(30.0, fast=True))
    yield Problem("cap_sinks", causal & variants.soft_cap(30.0, fast=True), 16, sinks=True)
    yield Problem("cap_fp16", causal & variants.soft_cap(30.0, fast=True), dtype=torch.float16)
    yield Problem("cap_d256", causal & variants.soft_cap(50.0, fast=True), head_dim=256)
    yield Problem("window", causal & variants.sliding_window(1023))
    yield Problem("window_d64", causal & variants.sliding_window(1023), head_dim=64)
    yield Problem("alibi", variants.alibi(meta) & causal)
    yield Problem("mask", variants.custom_mask(meta.to(torch.uint8), meta.to(torch.int32)))


def cases() -> Iterator[GateCase]:
    """The prefill kernel of every problem, and the small kernels beside it."""
    # A version that `support` refuses has to compile the kernel, no more.
    spills = None if hopper_compiler_problem(triton.__version__) is None else 1 << 20
    for problem in _problems():
        yield case_of(
            f"prefill.{problem.name}",
            prefill_kernel,
            _arguments(problem),
            options={"num_warps": 4, "maxnreg": MAX_REGISTERS},
            archs=HOPPER,
            max_spill_bytes=spills,
        )
    int32, int64 = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    order = {
        "tables": ScheduleTables(int64, int64, int64, int32),
        "work": Tiles(int32, int32),
        "bins": int32,
        **dict.fromkeys(("batch_size", "capacity", "page_size", "section_tokens"), 7),
        "BLOCK": Constant(PLANNER_BLOCK),
    }
    yield case_of("order", order_kernel, order, options={"num_warps": 8}, archs=HOPPER)
    bf16, fp32 = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)
    fill = {"out": bf16, "lse": fp32, "qo_indptr": int32}
    fill |= dict.fromkeys(("batch_size", "rows", "row_size", "heads"), 7) | {"BLOCK": Constant(BLOCK)}
    yield case_of("fill", fill_kernel, fill, options={"num_warps": 4}, archs=ALL_ARCHS)


def _arguments(problem: Problem) -> dict[str, Any]:
    paged = problem.page_size > 0
    dtypes, head_dims = (problem.dtype,) * 3, (problem.head_dim,) * 2
    spec = AttentionSpec(32, 8, *head_dims, problem.page_size or 1, paged, *dtypes)
    cfg = choose(spec, traits_of(problem.variant))
    rows = _descriptor(problem.dtype, (cfg.rows, 1, BOX_COLUMNS.value))
    tokens: Any = Cache(torch.empty(0, dtype=problem.dtype), 16, 16, 16)
    if cfg.box:
        tokens = _descriptor(problem.dtype, (1, cfg.box, 1, BOX_COLUMNS.value))
    int32 = torch.empty(0, dtype=torch.int32)
    return {
        "q_desc": rows,
        "k": tokens,
        "v": tokens,
        "o_desc": rows,
        "output": Output(torch.empty(0, dtype=problem.dtype), 16, 16, torch.empty(0), 16),
        "work": Tiles(int32, int32),
        "indices": int32 if paged else None,
        "heads": Heads(7, 7),
        "hooks": hooks_of(problem.variant),
        "factors": Factors(1.0, 1.0, None, 0, None, 0, torch.empty(0) if problem.sinks else None),
        "cfg": Constant(cfg),
    }


def _descriptor(dtype: torch.dtype, box: tuple[int, ...]) -> Typed:
    return Typed(f"tensordesc<{NAMES[dtype]}{list(box)},{box_layout(len(box))!r}>")
