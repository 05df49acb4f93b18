"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from flashinfer.core.arch import Arch
from flashinfer.ops.rope.spec import RopeSpec
from flashinfer.ops.rope.triton.kernel import AllStrides, AngleView, Data, Factors, Strides, Table, rope_kernel
from flashinfer.ops.rope.triton.launch import NUM_WARPS, configure
from flashinfer.testing.gate import ALL_ARCHS, FP8_ARCHS, OTHER_ARCHS, SPELLED, GateCase

TABLE_STRIDE = (2, 1)  # the argument `angle`
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Problem:
    """One call. heads: q and k. dims: rotated, rest of q, rest of k, v."""

    name: str
    heads: tuple[int, int]
    dims: tuple[int, int, int, int]
    interleave: bool = False
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None
    tabulated: bool = True
    ragged: bool = False
    paged: bool = False
    normed: bool = False

    @property
    def spec(self) -> RopeSpec:
        kinds = (self.interleave, self.dtype, self.out_dtype or self.dtype, self.tabulated, self.ragged)
        return RopeSpec(*self.heads, *self.dims, *kinds, self.paged, self.normed)


PROBLEMS = (
    Problem("frequencies", (32, 8), (128, 0, 0, 0), tabulated=False),
    Problem("frequencies_interleaved_fp32", (9, 3), (64, 0, 0, 0), True, torch.float32, tabulated=False),
    Problem("ragged", (32, 8), (128, 0, 0, 0), tabulated=False, ragged=True),
    Problem("cached", (32, 8), (128, 0, 0, 0)),
    Problem("cached_interleaved", (32, 8), (128, 0, 0, 0), True),
    Problem("partial_odd", (5, 1), (48, 24, 24, 0), True, torch.float16),
    Problem("normed", (32, 8), (128, 0, 0, 0), normed=True),
    Problem("normed_partial", (16, 2), (64, 64, 64, 0), normed=True),
    Problem("quantize_e4m3", (32, 8), (64, 64, 64, 0), out_dtype=FP8[0]),
    Problem("quantize_mla_e5m2", (128, 1), (64, 512, 512, 0), True, out_dtype=FP8[1]),
    Problem("quantize_append", (32, 8), (64, 64, 64, 128), out_dtype=FP8[0], paged=True),
    Problem("quantize_append_mla", (128, 1), (64, 512, 512, 0), True, out_dtype=FP8[0], paged=True),
)


def _types(problem: Problem) -> dict[str, Any]:
    spec = problem.spec
    source, target = SPELLED[spec.dtype], SPELLED[spec.out_dtype]
    strides = Strides(*["i64"] * 5)
    present = (True, True, bool(spec.q_rest), bool(spec.k_rest), bool(spec.v_dim))
    pointers = [x if here else "constexpr" for here in present for x in (f"*{source}", f"*{target}")]
    weight = "*bf16" if spec.normed else "constexpr"
    return {
        "data": Data(*pointers),
        "strides": AllStrides(*(strides if here else "constexpr" for here in present)),
        "angle": AngleView(
            "*fp32" if spec.tabulated else "*i64", "i32", "*i64", "*i64" if spec.ragged else "constexpr", "i32", "i32"
        ),
        "table": Table("*i32", "*i32", "*i32", "*i32", "i32") if spec.paged else "constexpr",
        "factors": Factors("fp32", "fp32", weight, weight, "fp32"),
        "num_tokens": "i32",
        "cfg": "constexpr",
    }


def _absent(types: dict[str, Any]) -> dict[Any, Any]:
    """None for every argument that is not there."""
    found: dict[Any, Any] = {name: None for name, kind in types.items() if kind == "constexpr"}
    for i, kind in enumerate(types.values()):
        if isinstance(kind, tuple):
            found.update({(i, j): None for j, inner in enumerate(kind) if inner == "constexpr"})
    return found


def _aligned(types: tuple[Any, ...], prefix: tuple[int, ...] = ()) -> dict[tuple[int, ...], Any]:
    """Every pointer and every stride is a multiple of 16."""
    found: dict[tuple[int, ...], Any] = {}
    for i, kind in enumerate(types):
        if isinstance(kind, tuple):
            found.update(_aligned(kind, (*prefix, i)))
        elif kind.startswith("*") or kind == "i64":
            found[(*prefix, i)] = [["tt.divisibility", 16]]
    return found


def cases() -> Iterator[GateCase]:
    """Every kind of call; those to fp8 with the instruction where there is one. Small tiles for one architecture."""
    for problem in PROBLEMS:
        fp8 = problem.out_dtype is not None
        yield _case(problem, "sm90" if fp8 else "sm80", FP8_ARCHS if fp8 else ALL_ARCHS, ".native" if fp8 else "")
        yield _case(problem, "sm90", ("sm90",), ".few", few=True)
        if fp8:
            yield _case(problem, "sm80", OTHER_ARCHS, "")


def _case(problem: Problem, example: str, archs: tuple[str, ...], suffix: str, few: bool = False) -> GateCase:
    types = _types(problem)
    cfg, _ = configure(problem.spec, Arch(example, 132, 0), few)
    return GateCase(
        name=f"rope_{problem.name}{suffix}",
        kernel=rope_kernel,
        signature=types,
        constexprs={**_absent(types), "cfg": cfg},
        attrs={**_aligned(tuple(types.values())), TABLE_STRIDE: [["tt.divisibility", 16]]},
        options={"num_warps": NUM_WARPS},
        archs=archs,
    )
