"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flashinfer.ops.alltoall.spec import CombineSpec, DispatchSpec, Row
from flashinfer.ops.alltoall.triton.configs import combine_config, dispatch_config
from flashinfer.ops.alltoall.triton.kernel import Payload, Ranks, combine_kernel, dispatch_kernel
from flashinfer.ops.alltoall.triton.launch import WORDS
from flashinfer.testing.gate import Constant, GateCase, Typed, case_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IDS = Row(8, 4)
# name, ranks, top_k, rows (ids, weights, hidden), payload of ids
DISPATCHES = (
    ("bf16_7168", 2, 8, (Row(3584, 4), IDS, IDS), 1),
    ("bf16_7168_of8", 8, 8, (Row(3584, 4), IDS, IDS), 1),
    ("fp8_7168", 2, 8, (Row(1792, 4), Row(56, 4), IDS, IDS), 2),
    ("fp32_16384", 2, 8, (Row(16384, 4), IDS, IDS), 1),
    ("odd", 3, 5, (Row(577, 1), Row(31, 2), Row(5, 4)), -1),
    ("most_ranks", 16, 8, (Row(3584, 4), IDS, IDS), 1),
    ("most_experts", 2, 64, (Row(64, 4),), 0),
)
# name, ranks, hidden_size, payload, result
COMBINES = (
    ("bf16_7168", 2, 7168, BF16, BF16),
    ("bf16_7168_of8", 8, 7168, BF16, BF16),
    ("fp32_16384", 2, 16384, FP32, FP32),
    ("fp16_577", 3, 577, FP16, FP32),
    ("most_ranks", 16, 7168, BF16, BF16),
)
# Integers that no compiled form depends on.
ANY = Typed("i32")
MEMORY = torch.empty(0, dtype=torch.uint8)


def ranks(world_size: int) -> Ranks:
    states = torch.empty(0, dtype=torch.int32)
    return Ranks((MEMORY,) * world_size, states, Typed("i64"), 1 << 20)


def cases() -> Iterator[GateCase]:
    for name, world_size, top_k, rows, ids in DISPATCHES:
        spec = DispatchSpec(world_size, 8 * world_size, top_k, rows, ids)
        cfg, num_warps = dispatch_config(spec)
        yield case_of(
            f"dispatch.{name}",
            dispatch_kernel,
            {
                "ranks": ranks(world_size),
                "experts": torch.empty(0, dtype=torch.int32),
                "payloads": tuple(Payload(torch.empty(0, dtype=WORDS[row.size]), row.words) for row in rows),
                "slots": torch.empty(0, dtype=torch.int32),
                "word": ANY,
                "tokens_per_rank": ANY,
                "num_tokens": ANY,
                "half_begin": ANY,
                "half": ANY,
                "rank": ANY,
                "active": ANY,
                "invalid_id": ANY,
                "cfg": Constant(cfg),
            },
            options={"num_warps": num_warps},
        )
    for name, world_size, hidden_size, dtype, out_dtype in COMBINES:
        cfg, num_warps = combine_config(CombineSpec(world_size, hidden_size, dtype, out_dtype))
        yield case_of(
            f"combine.{name}",
            combine_kernel,
            {
                "ranks": ranks(world_size),
                "out": torch.empty(0, dtype=out_dtype),
                "payload": torch.empty(0, dtype=dtype),
                "slots": torch.empty(0, dtype=torch.int32),
                "strides": (hidden_size, hidden_size * 16, hidden_size),
                "word": ANY,
                "tokens_per_rank": ANY,
                "num_tokens": ANY,
                "begins": ANY,
                "half": ANY,
                "rank": ANY,
                "active": ANY,
                "cfg": Constant(cfg),
            },
            options={"num_warps": num_warps},
        )
