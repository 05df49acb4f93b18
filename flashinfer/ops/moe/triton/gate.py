"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from flashinfer.core.arch import SMEM_BYTES, Arch
from flashinfer.device.finish import PAIRED, Finish
from flashinfer.ops.moe.spec import MoESpec
from flashinfer.ops.moe.triton.combine import Parts, combine_kernel
from flashinfer.ops.moe.triton.configs import (
    WARPS_SORT,
    combine_config,
    default_tiles,
    few_config,
    rows_config,
    sort_config,
)
from flashinfer.ops.moe.triton.few import Input, Matrices, Output, Pairs, few_kernel
from flashinfer.ops.moe.triton.prepare import Gathered, cast_kernel, rows_kernel
from flashinfer.ops.moe.triton.sort import Sorted, count_kernel, place_kernel
from flashinfer.testing.gate import ALL_ARCHS, AMD_ARCHS, Constant, GateCase, case_of

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
FP32_PTR, BF16_PTR, I32_PTR, U8_PTR = (
    torch.empty(0, dtype=dtype) for dtype in (torch.float32, BF16, torch.int32, torch.uint8)
)
NUM_SMS = 132
# Run-time integers: of no known divisor, and multiples of 16.
ODD, EVEN = 1_000_003, 1 << 20
MODELS = {
    "mixtral": (8, 2, 4096, 14336),
    "qwen": (128, 8, 2048, 768),
    "deepseek": (256, 8, 7168, 2048),
    "gpt_oss": (32, 4, 2880, 2880),
}
# model, kind, dtype of rows, of weights
KINDS = (
    ("mixtral", "plain", BF16, BF16),
    ("qwen", "plain", BF16, BF16),
    ("gpt_oss", "plain", BF16, BF16),
    ("mixtral", "fp8_tensor", E4M3, E4M3),
    ("deepseek", "fp8_block", BF16, E4M3),
    ("gpt_oss", "mxfp4", BF16, torch.uint8),
)
# Few enough for programs to look for their pairs, and the most; beside Hopper one of them.
TOKENS = {"sm90": (1, 16, 64)}
OTHER_TOKENS = (16,)
ELSEWHERE_LEFT_OUT = (("qwen", "plain"), ("gpt_oss", "plain"))


def spec_of(model: str, kind: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> MoESpec:
    experts, top_k, hidden_size, intermediate_size = MODELS[model]
    return MoESpec(
        kind=kind,
        dtype=dtype,
        weight_dtype=weight_dtype,
        out_dtype=BF16,
        id_dtype=torch.int32,
        num_experts=experts,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        activation="swiglu",
        gated=True,
        present=(False,) * 6,
        scale_rows=(128, 128) if kind == "fp8_block" else (1, 1),
    )


def arch_named(name: str) -> Arch:
    return Arch(name, NUM_SMS, SMEM_BYTES.get(name, 65_536))


def launch_options(name: str) -> dict[str, bool]:
    return {"launch_pdl": True} if arch_named(name).launches_early else {}


def few_case(model: str, spec: MoESpec, tokens: int, first: bool, name: str) -> GateCase:
    """One product for few tokens, tiles by rule."""
    arch = arch_named(name)
    tiles = default_tiles(spec, arch, tokens, first)
    cfg = few_config(spec, arch, tokens, tiles, first, arch.launches_early)
    rows, hidden = {"fp8_tensor": (U8_PTR, U8_PTR), "fp8_block": (U8_PTR, BF16_PTR)}.get(spec.kind, (BF16_PTR,) * 2)
    row_scale = FP32_PTR if spec.kind == "fp8_block" else None
    scale = {"mxfp4": U8_PTR, "fp8_block": FP32_PTR}.get(spec.kind)
    biased, factor = spec.kind == "mxfp4" and first, FP32_PTR if spec.kind == "fp8_tensor" else None
    out = hidden if first else FP32_PTR
    arguments = {
        "out": Output(out, factor if first else None, 0),
        "x": Input(rows, EVEN, row_scale, 0 if row_scale is None else ODD),
        "w": Matrices(
            BF16_PTR if spec.kind == "plain" else U8_PTR,
            EVEN,
            EVEN,
            1,
            scale,
            *((0,) * 3 if scale is None else (EVEN, EVEN, 1)),
        ),
        "pairs": Pairs(I32_PTR, None, None) if cfg.scan else Pairs(I32_PTR, I32_PTR, I32_PTR),
        "finish": Finish(
            BF16_PTR if biased else None,
            EVEN if biased else 0,
            None,
            *(FP32_PTR if biased else None,) * 3,
            None,
            factor,
            int(factor is not None),
        ),
        "num_pairs": ODD,
        "first": ODD,
        "activation": Constant(PAIRED["swiglu"] if first else None),
        "cfg": Constant(cfg),
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **launch_options(name)}
    label = f"few{1 if first else 2}_{model}_{spec.kind}_t{tokens}.{name}"
    # Integer conversions to and from e4m3 are more than gfx942 has registers for; nothing runs there.
    most: int | None = 0
    if spec.kind == "fp8_block":
        # Under Triton 3.9 alone 8 bytes, in no loop, where a program of the second product looks for its pairs.
        most = None if name in AMD_ARCHS else 8 if cfg.scan and not first else 0
    return case_of(label, few_kernel, arguments, options=options, archs=(name,), max_spill_bytes=most)


def few_cases() -> Iterator[GateCase]:
    for (model, kind, *dtypes), first, name in product(KINDS, (True, False), ALL_ARCHS):
        if (name == "sm80" and E4M3 in dtypes) or (name != "sm90" and (model, kind) in ELSEWHERE_LEFT_OUT):
            continue
        for tokens in TOKENS.get(name, OTHER_TOKENS):
            yield few_case(model, spec_of(model, kind, *dtypes), tokens, first, name)


def sort_cases() -> Iterator[GateCase]:
    """Sorting in one block and in several; few experts and the most."""
    for experts, several, name in product((8, 256, 1024), (False, True), ALL_ARCHS):
        if experts != 256 and name != "sm90":
            continue
        cfg = sort_config(
            spec_of("qwen", "plain", BF16, BF16)._replace(num_experts=experts), arch_named(name).launches_early
        )
        how = {"options": {"num_warps": WARPS_SORT, **launch_options(name)}, "archs": (name,)}
        counts = I32_PTR if several else None
        label = f"sort_{experts}{'_blocks' if several else ''}"
        numbers = {"ids": I32_PTR, "num_pairs": ODD, "per_block": ODD}
        if several:
            arguments = {"counts": I32_PTR, **numbers, "first": ODD, "cfg": Constant(cfg)}
            yield case_of(f"{label}_count.{name}", count_kernel, arguments, **how)
        out = Sorted(I32_PTR, I32_PTR, I32_PTR, I32_PTR)
        arguments = {"out": out, "counts": counts, **numbers, "num_blocks": ODD, "first": ODD, "cfg": Constant(cfg)}
        yield case_of(f"{label}.{name}", place_kernel, arguments, **how)


def combine_cases() -> Iterator[GateCase]:
    """Sums of rows, and of parts of them, one and the most."""
    spec = spec_of("deepseek", "plain", BF16, BF16)
    for splits, rows, name in ((*case, name) for case in ((1, None), (8, None), (1, I32_PTR)) for name in ALL_ARCHS):
        y, bias = (FP32_PTR, BF16_PTR) if rows is None else (BF16_PTR, None)
        early = rows is None and arch_named(name).launches_early
        arguments = {
            "out": BF16_PTR,
            "stride_out": ODD,
            "parts": Parts(y, EVEN, rows, bias, EVEN if rows is None else 0),
            "ids": I32_PTR,
            "weights": FP32_PTR,
            "first": ODD,
            "cfg": Constant(combine_config(spec, splits, rows is None, early)),
        }
        label = f"combine_s{splits}{'_rows' if rows is not None else ''}.{name}"
        yield case_of(label, combine_kernel, arguments, options=launch_options(name), archs=(name,))


def row_cases() -> Iterator[GateCase]:
    """Rows on their way to a product."""
    for name in ALL_ARCHS:
        if name == "sm80":
            continue
        how = {"options": launch_options(name), "archs": (name,)}
        arch = arch_named(name)
        cfg, copied = (Constant(rows_config(arch, quantise, arch.launches_early)) for quantise in (True, False))
        sizes = {"num_rows": ODD, "width": EVEN, "stride": EVEN, "cfg": cfg}
        arguments = {"out": U8_PTR, "scales": FP32_PTR, "x": BF16_PTR, "gathered": Gathered(I32_PTR, I32_PTR), **sizes}
        yield case_of(f"rows_gathered.{name}", rows_kernel, arguments, **how)
        changes = {"out": BF16_PTR, "scales": None, "cfg": copied}
        yield case_of(f"rows_copied.{name}", rows_kernel, arguments | changes, **how)
        arguments |= {"gathered": Gathered(None, None)}
        yield case_of(f"rows.{name}", rows_kernel, arguments, **how)
        arguments = {"out": U8_PTR, "hidden": FP32_PTR, "scale": FP32_PTR, "ids": I32_PTR, "order": I32_PTR}
        arguments |= {"count": I32_PTR, "width": EVEN, "first": ODD, "scale_stride": 1}
        arguments["cfg"] = Constant(rows_config(arch, quantise=True, early=False))
        yield case_of(f"cast.{name}", cast_kernel, arguments, archs=(name,))


def cases() -> Iterator[GateCase]:
    """Every kernel of the folder."""
    yield from few_cases()
    yield from sort_cases()
    yield from combine_cases()
    yield from row_cases()
