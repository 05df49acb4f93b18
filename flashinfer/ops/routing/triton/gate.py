"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flashinfer.ops.routing.spec import RoutingSpec
from flashinfer.ops.routing.triton.kernel import SCORES, Outputs, choose_kernel, lookup_kernel
from flashinfer.ops.routing.triton.launch import config_of, num_warps
from flashinfer.testing.gate import Constant, GateCase, case_of

FP32, BF16, FP16, I32, I64, I16 = (
    torch.empty(0, dtype=dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int16)
)
CHOSEN = (
    ("mixtral", RoutingSpec(8, 2, "softmax", renormalise=True), BF16, None),
    ("qwen", RoutingSpec(128, 8, "softmax", renormalise=True), FP32, None),
    ("gpt_oss", RoutingSpec(32, 4, "softmax", renormalise=True), BF16, None),
    ("llama4", RoutingSpec(16, 1, "sigmoid"), FP16, None),
    ("groups256", RoutingSpec(256, 8, "sigmoid", True, 2.5, 8, 4, biased=True), FP32, I16),
    ("groups160", RoutingSpec(160, 6, "sigmoid", True, 2.5, 8, 3, biased=True), BF16, I16),
    ("bias384", RoutingSpec(384, 8, "sigmoid", True, 2.5, biased=True), FP32, None),
    ("most", RoutingSpec(4096, 64, "identity"), FP32, None),
)
TABLE = RoutingSpec(256, 6, "sqrt_softplus", renormalise=True, looked_up=True, num_shared=1, shared_scale=2.5)


def cases() -> Iterator[GateCase]:
    """The routing of known models, and the most experts."""
    stride = 1 << 16
    for name, spec, logits, replay in CHOSEN:
        cfg = config_of(spec)
        arguments = {
            "out": Outputs(FP32, I32, replay, spec.top_k, spec.top_k, spec.top_k),
            "logits": logits,
            "bias": FP32 if spec.biased else None,
            "stride": stride,
            "score_of": Constant(SCORES[spec.score]),
            "cfg": Constant(cfg),
        }
        yield case_of(f"route_{name}", choose_kernel, arguments, options={"num_warps": num_warps(cfg)})
    columns = TABLE.top_k + TABLE.num_shared
    arguments = {"out": Outputs(FP32, I32, None, columns, columns, 0), "logits": FP32, "tokens": I64, "table": I32}
    arguments |= {
        "stride": stride,
        "stride_table": TABLE.top_k,
        "score_of": Constant(SCORES[TABLE.score]),
        "cfg": Constant(config_of(TABLE)),
    }
    yield case_of("route_table", lookup_kernel, arguments, options={"num_warps": 1})
