"""Ulysses: a sequence split by tokens becomes one split by heads, and back (DeepSpeed-Ulysses, arXiv 2309.14509).

Names of sizes: W ranks, B batch, S tokens of one rank, H heads in all, HL = H / W heads of one rank, D head_dim, HC
heads of a band: `[rank * HL + head_offset, + HC)` of each rank. Blocks are `[W, B, S, heads, D]`: block r goes to, or
came from, rank r. Functions here check nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

Staging = tuple[torch.Tensor, torch.Tensor]


def room(shape: Sequence[int], like: torch.Tensor, staging: Staging | None) -> Staging:
    """Blocks to send from and to receive in: in `staging` (two flat tensors, large enough) if given, else new."""
    size = math.prod(shape)
    send, received = [like.new_empty(size) for _ in range(2)] if staging is None else staging
    return send[:size].view(tuple(shape)), received[:size].view(tuple(shape))


def swap(send: torch.Tensor, received: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Send block r of `[W, ...]` to rank r; returns `received`. Both contiguous."""
    if send.numel():
        dist.all_to_all_single(received, send, group=group)
    return received


def exchange(blocks: torch.Tensor, group: dist.ProcessGroup | None, staging: Staging | None = None) -> torch.Tensor:
    """`swap` of blocks of any strides, copied to `room` first."""
    send, received = room(blocks.shape, blocks, staging)
    send.copy_(blocks)
    return swap(send, received, group)


def blocks_by_heads(x: torch.Tensor, world_size: int) -> torch.Tensor:
    """`[B, S, H, D]` -> a view `[W, B, S, HL, D]`."""
    by_rank: torch.Tensor = x.unflatten(2, (world_size, x.shape[2] // world_size))
    return by_rank.permute(2, 0, 1, 3, 4)


def blocks_by_tokens(x: torch.Tensor, world_size: int) -> torch.Tensor:
    """`[B, W * S, heads, D]` -> a view `[W, B, S, heads, D]`."""
    by_rank: torch.Tensor = x.unflatten(1, (world_size, x.shape[1] // world_size))
    return by_rank.transpose(0, 1)


def tokens_of_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """`[W, B, S, heads, D]` -> `[B, W * S, heads, D]`, a view where B is 1."""
    return blocks.transpose(0, 1).flatten(1, 2)


def heads_of_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """`[W, B, S, HL, D]` -> new `[B, S, H, D]`."""
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)


def band_of(x: torch.Tensor, world_size: int, head_offset: int, head_count: int) -> torch.Tensor:
    """The band of every rank's heads: `[B, S, H, D]` -> a view `[B, S, W, HC, D]`."""
    by_rank: torch.Tensor = x.unflatten(2, (world_size, x.shape[2] // world_size))
    return by_rank[:, :, :, head_offset : head_offset + head_count]


def pack_band(qkv: Sequence[torch.Tensor], band: tuple[int, int], world_size: int, out: torch.Tensor) -> None:
    """Write the bands of q, k and v, each `[B, S, H, D]`, to out `[B, S, W, HC, 3 * D]` (any strides)."""
    head_dim = qkv[0].shape[3]
    for i, x in enumerate(qkv):
        out[..., i * head_dim : (i + 1) * head_dim].copy_(band_of(x, world_size, *band))
