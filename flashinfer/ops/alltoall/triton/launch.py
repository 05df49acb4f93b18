"""Launches of the all-to-all kernels."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from math import prod

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.launch import Prebound, alignment, integer_classes, token
from flashinfer.ops.alltoall.room import Room
from flashinfer.ops.alltoall.spec import ALIGNMENT, Call, Combine, CombineSpec, Dispatch, DispatchSpec
from flashinfer.ops.alltoall.triton.configs import combine_config, dispatch_config, programs
from flashinfer.ops.alltoall.triton.kernel import Payload, Ranks, combine_kernel, dispatch_kernel

WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_dispatch, _combine = Prebound(dispatch_kernel), Prebound(combine_kernel)


def bind(spec: DispatchSpec | CombineSpec, arch: Arch) -> Callable[..., None]:
    """The call `(room, call, tensors)` for one kind: one launch, no host sync."""
    return bind_dispatch(spec, arch) if isinstance(spec, DispatchSpec) else bind_combine(spec, arch)


@lru_cache(maxsize=4096)
def word_of(*numbers: object) -> int:
    """A number that like calls have in common; odd, so that no number of them adds up to another's."""
    return zlib.crc32(repr(numbers).encode()) >> 8 | 1


def ranks_of(room: Room) -> Ranks:
    """The room as a kernel sees it."""
    return Ranks(room.peers_memory, room.states, room.report.address, room.limit)


def bind_dispatch(spec: DispatchSpec, arch: Arch) -> Callable[[Room, Call, Dispatch], None]:
    cfg, num_warps = dispatch_config(spec)

    def run(room: Room, call: Call, tensors: Dispatch) -> None:
        payloads = []
        for row, x in zip(spec.rows, tensors.payloads, strict=True):
            rows = x if x.dim() == 2 else x.view(x.shape[0], prod(x.shape[1:]))
            words = rows.view(WORDS[row.size])
            payloads.append(Payload(words, words.stride(0)))
        ranks = ranks_of(room)
        integers = integer_classes((ranks.report, ranks.limit, *(p.stride for p in payloads)))
        aligned = alignment(tensors.experts, *(p.data for p in payloads))
        key = (token(spec, num_warps, len(ranks.peers)), integers, aligned)
        arguments = (
            ranks,
            tensors.experts,
            tuple(payloads),
            tensors.slots,
            word_of(call, spec.num_experts, spec.top_k, spec.ids, *(row.num_bytes for row in spec.rows)),
            call.tokens_per_rank,
            tensors.experts.shape[0],
            room.half_begin(call.half) // ALIGNMENT,
            call.half,
            room.peers.rank,
            call.active,
            tensors.invalid_id,
            cfg,
        )
        grid = (programs(call.tokens_per_rank, arch), 1, 1)
        _dispatch(grid, key, arguments, room.peers.device, num_warps=num_warps)

    return run


def bind_combine(spec: CombineSpec, arch: Arch) -> Callable[[Room, Call, Combine], None]:
    cfg, num_warps = combine_config(spec)

    def run(room: Room, call: Call, tensors: Combine) -> None:
        out, payload, slots = tensors
        ranks = ranks_of(room)
        strides = (out.stride(0), payload.stride(0), payload.stride(1))
        integers = integer_classes((ranks.report, ranks.limit, *strides))
        key = (token(spec, num_warps, len(ranks.peers)), integers, alignment(out, payload))
        arguments = (
            ranks,
            out,
            payload,
            slots,
            strides,
            word_of(call, spec.hidden_size, spec.dtype),
            call.tokens_per_rank,
            out.shape[0],
            (room.half_begin(call.half) + call.offset) // ALIGNMENT,
            call.half,
            room.peers.rank,
            call.active,
            cfg,
        )
        grid = (programs(call.tokens_per_rank, arch), 1, 1)
        _combine(grid, key, arguments, room.peers.device, num_warps=num_warps)

    return run
