"""vLLM's custom all-reduce with FlashInfer's names, over this package's all-reduce.

Addresses are those of `create_shared_buffer`, and keys: memory that came from elsewhere is refused. The number that
stands for an all-reduce (`fa`) is a key of this module's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashinfer.comm import collectives
from flashinfer.comm.collectives import CommWorkspace
from flashinfer.comm.cuda_ipc import shared_buffer
from flashinfer.core import check

# Bytes in front of a buffer that callers leave room for.
META_BYTES = 128
_reduces: dict[int, CommWorkspace] = {}


def meta_size() -> int:
    """Bytes that callers add to the size of the buffers they pass to `init_custom_ar`."""
    return META_BYTES


def init_custom_ar(ipc_tensors: Sequence[int], rank_data: torch.Tensor, rank: int, full_nvlink: bool) -> int:
    """An all-reduce over the ranks that made the buffer `ipc_tensors`, for tensors as large as that; all ranks call it.

    rank_data is scratch that this implementation does not need; full_nvlink is ignored. Returns `fa`. Raises ValueError
    for addresses of no shared buffer and for another rank than this one.
    """
    buffer = shared_buffer("ipc_tensors", ipc_tensors)
    if rank != buffer.peers.rank:
        raise ValueError(check.problem("rank", rank, f"{buffer.peers.rank}, this process's", "Pass its rank."))
    max_bytes = max(buffer.parts[rank].numel() - META_BYTES, META_BYTES)
    workspace = CommWorkspace(buffer.peers.group, buffer.peers.device, max_bytes)
    _reduces[workspace.number] = workspace
    return workspace.number


def _of(fa: int) -> CommWorkspace:
    found = _reduces.get(fa)
    if found is None:
        fix = "Make one with vllm_init_custom_ar."
        raise ValueError(check.problem("fa", fa, "the number of an all-reduce in use", fix))
    return found


def all_reduce(
    fa: int, inp: torch.Tensor, out: torch.Tensor, reg_buffer: int, reg_buffer_sz_bytes: int, num_ctas: int
) -> None:
    """`out` = the sum of `inp` over the ranks.

    inp, out: as for `flashinfer.comm.all_reduce`. reg_buffer_sz_bytes: what inp must fit in, unless reg_buffer is 0.
    num_ctas is ignored. Raises ValueError for a larger inp, and as `flashinfer.comm.all_reduce` does.
    """
    if reg_buffer and inp.numel() * inp.element_size() > reg_buffer_sz_bytes:
        got, expected = f"{inp.numel() * inp.element_size()} bytes", f"at most {reg_buffer_sz_bytes} bytes"
        raise ValueError(check.problem("inp", got, expected, "Register a larger buffer."))
    collectives.all_reduce(inp, _of(fa), out)


def dispose(fa: int) -> None:
    """Free an all-reduce; all ranks call it."""
    _of(fa).destroy()
    del _reduces[fa]


def register_buffer(fa: int, fake_ipc_ptrs: Sequence[int]) -> None:
    """Check that the addresses are of a shared buffer; nothing has to be registered."""
    _of(fa)
    shared_buffer("fake_ipc_ptrs", fake_ipc_ptrs)


def get_graph_buffer_ipc_meta(fa: int) -> tuple[list[int], list[int]]:
    """(handle, offsets) of the buffers that CUDA graphs use: empty, since none has to be told to other ranks."""
    _of(fa)
    return [], []


def register_graph_buffers(fa: int, handles: Sequence[Sequence[int]], offsets: Sequence[Sequence[int]]) -> None:
    """Check that there is one entry of each for a rank; nothing has to be registered."""
    world_size = _of(fa).world_size
    for name, given in (("handles", handles), ("offsets", offsets)):
        if len(given) != world_size:
            raise ValueError(check.problem(name, f"{len(given)} entries", f"{world_size}, one a rank", "Gather them."))
