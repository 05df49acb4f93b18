"""All-reduce of what is sent in fp8, with FlashInfer's name and signature."""

from __future__ import annotations

import torch
import torch.distributed as dist

from flashinfer.comm.collectives import all_reduce_fp8, workspace_of_group
from flashinfer.core import check

SCALE_GROUP_DEFAULT = 256


def quantized_all_reduce(
    inp: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    scale_group: int = SCALE_GROUP_DEFAULT,
    block_size: int | None = None,
    num_warps: int | None = None,
    max_num_blocks: int | None = None,
    p2p_phase3: bool | None = None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """`flashinfer.comm.all_reduce_fp8` over a group: its bound of the error holds, and all ranks get the same bits.

    inp: any shape, fp32, fp16 or bf16, contiguous. scale_group: numbers that share a scale; a power of two up to 4096
    where kernels do it. output: like inp, new by default. The rest is accepted and ignored. The first call of a group
    makes its workspace, on all ranks. Returns output. Errors as for `flashinfer.comm.all_reduce`.
    """
    check.tensor("inp", inp)
    return all_reduce_fp8(inp, workspace_of_group(group, inp.device), scale_group, output)
