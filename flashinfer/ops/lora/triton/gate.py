"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flashinfer.ops.lora.triton.kernel import Index, Order, expand_kernel, shrink_kernel
from flashinfer.ops.lora.triton.launch import DTYPES, NO_ORDER, NUM_WARPS, tile
from flashinfer.testing.gate import Constant, GateCase, case_of


def cases() -> Iterator[GateCase]:
    """Ranks from small to large, in both 16-bit dtypes; rows of tokens and of pairs."""
    int64, fp32 = torch.empty(0, dtype=torch.int64), torch.empty(0)
    index = Index(int64, 16, int64, int64, int64)
    options = {"num_warps": NUM_WARPS}
    for dtype, rank in ((torch.bfloat16, 16), (torch.float16, 64), (torch.bfloat16, 128)):
        numbers = torch.empty(0, dtype=dtype)
        block_r, block = tile(rank, 4096)
        constants = {"DTYPE": Constant(DTYPES[dtype]), "BLOCK_R": Constant(block_r)}
        shrink = {"y": (numbers, 16), "x": (numbers, 16), "index": index, "rank": 16, "depth": 16}
        shrink |= {"BY_PAIR": Constant(rank == 64), **constants, "BLOCK_K": Constant(block)}
        yield case_of(f"shrink.rank{rank}", shrink_kernel, shrink, options=options)
        order = Order(int64, int64, fp32) if rank != 64 else NO_ORDER
        expand = {"y": (fp32, 16), "x": (numbers, 16), "index": index, "order": order, "begin": int64}
        expand |= {"rank": 16, "width": 16, **constants, "BLOCK_N": Constant(block)}
        yield case_of(f"expand.rank{rank}", expand_kernel, expand, options=options)
