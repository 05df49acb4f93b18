"""Tensor parallelism: each rank computes a share of the heads and of the hidden features with its slice of the weights.

Of the matrices before attention and activation each rank has a slice of rows (its outputs), of those after it the
matching columns (its inputs). What those give is a sum over ranks: two all-reduces a layer (Shoeybi et al. 2019,
arXiv 1909.08053). Everything else is computed alike on all ranks.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import multiprocessing

import flashinfer
from flashinfer import comm

if TYPE_CHECKING:
    from model import LlamaConfig

ROWS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
# Tokens that the memory of the sums is made for, at least.
MIN_TOKENS = 2048
COLUMNS = ("o_proj.weight", "down_proj.weight", "experts.down_proj")


class Ranks:
    """The ranks of the default process group that run one model together, seen from one of them; alone by default."""

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self.size, self.rank = size, rank
        self._workspace: comm.AllReduceFusionWorkspace | None = None

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """In place: residual += the sum of x over the ranks, then x = the norm of residual."""
        if self.size == 1:
            flashinfer.fused_add_rmsnorm(x, residual, weight, eps)
            return
        norm = {"residual_in": residual, "rms_gamma": weight, "rms_eps": eps, "residual_out": residual, "norm_out": x}
        comm.allreduce_fusion(x, self._workspace_for(x), comm.AllReduceFusionPattern.kARResidualRMSNorm, **norm)

    def _workspace_for(self, x: torch.Tensor) -> comm.AllReduceFusionWorkspace:
        """The memory of the sums; all ranks come with equal shapes, so they make a larger one at the same time."""
        num_tokens, hidden_size = x.shape
        held = self._workspace
        if held is None or not held.is_buffer_size_sufficient(self.size, num_tokens, hidden_size, x.dtype):
            self.close()
            sizes = {"max_token_num": max(num_tokens, MIN_TOKENS), "hidden_dim": hidden_size, "dtype": x.dtype}
            held = comm.create_allreduce_fusion_workspace("auto", self.size, self.rank, **sizes)
            self._workspace = held
        return held

    def close(self) -> None:
        """Free what the ranks hold together."""
        if self._workspace is not None:
            self._workspace.destroy()
            self._workspace = None

    def agreed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens that rank 0 chose: whatever rounding does, all ranks go on with the same ones."""
        if self.size > 1:
            dist.broadcast(tokens, 0)
        return tokens

    def shard(
        self, config: LlamaConfig, weights: dict[str, torch.Tensor]
    ) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
        """What this rank computes of a model, and its slices of the weights."""
        if self.size == 1:
            return config, weights
        names = ("num_qo_heads", "num_kv_heads", "intermediate_size")
        for name in names:
            if getattr(config, name) % self.size:
                value = getattr(config, name)
                raise ValueError(f"{name} {value} is not a multiple of --tensor-parallel {self.size}.")
        own = replace(config, **{name: getattr(config, name) // self.size for name in names})
        return own, {name: self._slice(name, weight) for name, weight in weights.items()}

    def _slice(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if name.endswith(ROWS):
            return weight.chunk(self.size, dim=0)[self.rank]
        if name.endswith(COLUMNS):
            return weight.chunk(self.size, dim=-1)[self.rank].contiguous()
        if name.endswith("experts.gate_up_proj"):  # two matrices, one above the other
            return torch.cat([part.chunk(self.size, dim=1)[self.rank] for part in weight.chunk(2, dim=1)], dim=1)
        return weight


def run_on_ranks(function: Callable[..., int], size: int, device: str, *args: Any) -> int:
    """The exit status of `function(ranks, device of the rank, *args)`, run by `size` processes on this machine.

    device: "cpu" (gloo) or "cuda" (NCCL, one GPU to a rank). When a process fails, the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (function, size, device, folder, args)
        try:
            multiprocessing.spawn(_on_rank, given, nprocs=size)
        except multiprocessing.ProcessExitedException as error:
            return int(error.exit_code)
    return 0


def _on_rank(
    rank: int, function: Callable[..., int], size: int, device: str, folder: str, args: tuple[Any, ...]
) -> None:
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
    ranks = Ranks(size, rank)
    status = function(ranks, device, *args)
    dist.barrier()
    ranks.close()
    dist.destroy_process_group()
    sys.exit(status)
