"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator

from flashinfer.ops.merge.triton.kernel import StateView, merge_config, merge_kernel
from flashinfer.testing.gate import GateCase


def cases() -> Iterator[GateCase]:
    """merge_pair in place with a mask, and merge_many, in the dtypes they take."""
    for dtype in ("bf16", "fp16", "fp32"):
        view = StateView(f"*{dtype}", "*fp32", *["i32"] * 6)
        for name, first, keep in (("pair", view, "*u8"), ("many", "constexpr", "constexpr")):
            signature = {"first": first, "rest": view, "out": view, "keep": keep}
            absent = {argument: None for argument, kind in signature.items() if kind == "constexpr"}
            numbers = dict.fromkeys(("num_rows", "num_states", "num_heads"), "i32")
            cfg = merge_config(128, many=name == "many")
            yield GateCase(
                name=f"merge_{name}.{dtype}",
                kernel=merge_kernel,
                signature={**signature, **numbers, "cfg": "constexpr"},
                constexprs={"cfg": cfg, **absent},
                options={"num_warps": cfg.num_warps},
            )
