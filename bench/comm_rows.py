"""Problems of several ranks for `bench.comm`: what is called, what it is compared with, what is checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import flashinfer
from flashinfer import comm

KIB, MIB = 1 << 10, 1 << 20
Run = Callable[[], Any]


@dataclass(frozen=True)
class Ranks:
    """This rank, and where its tensors live. quick: the smallest problem of each kind only, for tests."""

    rank: int
    size: int
    device: torch.device
    quick: bool = False

    def rand(self, *shape: int) -> torch.Tensor:
        """Random numbers in bf16, this rank's own."""
        return torch.randn(shape, device=self.device).to(torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """num_bytes: of a rank's input. ours, peer: calls to time. check: raises AssertionError if ours is wrong."""

    name: str
    num_bytes: int
    ours: Run
    peer: Run
    peer_name: str
    check: Run


Problems = Callable[[Ranks], Iterator[Problem]]


def _near(got: torch.Tensor, expected: torch.Tensor, rtol: float = 2.0**-7, atol: float = 2.0**-5) -> None:
    torch.testing.assert_close(got.float(), expected.float(), rtol=rtol, atol=atol)


def _summed(x: torch.Tensor) -> torch.Tensor:
    """By torch, in fp32."""
    total = x.float()
    dist.all_reduce(total)
    return total


def _sizes(ranks: Ranks, *num_bytes: int) -> tuple[int, ...]:
    return num_bytes[:1] if ranks.quick else num_bytes


def all_reduce(ranks: Ranks) -> Iterator[Problem]:
    """Sums of 2 KiB to 64 MiB."""
    workspace = comm.CommWorkspace(device=ranks.device)
    small = [n * KIB for n in (2, 8, 32, 64, 128, 256, 512)]
    for num_bytes in _sizes(ranks, *small, *(n * MIB for n in (1, 2, 4, 8, 16, 32, 64))):
        x = ranks.rand(num_bytes // 2)
        out, theirs = torch.empty_like(x), torch.zeros_like(x)

        def check(x: torch.Tensor = x, out: torch.Tensor = out) -> None:
            _near(comm.all_reduce(x, workspace, out), _summed(x))

        ours = _bound(comm.all_reduce, x, workspace, out)
        yield Problem("all_reduce", num_bytes, ours, _bound(dist.all_reduce, theirs), "torch", check)
    workspace.destroy()


def all_reduce_fp8(ranks: Ranks) -> Iterator[Problem]:
    """Sums sent as fp8, against the sums that are not."""
    workspace = comm.CommWorkspace(device=ranks.device)
    for num_bytes in _sizes(ranks, MIB, 4 * MIB, 16 * MIB, 64 * MIB):
        x = ranks.rand(num_bytes // 2)
        out, theirs = torch.empty_like(x), torch.zeros_like(x)

        def check(x: torch.Tensor = x, out: torch.Tensor = out) -> None:
            parts = _summed(x.abs())
            over = (comm.all_reduce_fp8(x, workspace, 256, out).float() - _summed(x)).abs() - parts * 2.0**-3
            assert over.max() <= 2.0**-7, "further off than fp8 allows"

        ours = _bound(comm.all_reduce_fp8, x, workspace, 256, out)
        yield Problem("all_reduce_fp8", num_bytes, ours, _bound(dist.all_reduce, theirs), "torch", check)
    workspace.destroy()


def fused_norm(ranks: Ranks) -> Iterator[Problem]:
    """Sum, residual and RMSNorm of 1 to 256 tokens of 8192, against torch's sum and this package's norm."""
    hidden = 256 if ranks.quick else 8192
    workspace = comm.create_allreduce_fusion_workspace("auto", ranks.size, ranks.rank, 256, hidden, torch.bfloat16)
    pattern = comm.AllReduceFusionPattern.kARResidualRMSNorm
    for num_tokens in _sizes(ranks, 1, 2, 4, 8, 16, 32, 64, 128, 256):
        x, residual, weight = ranks.rand(num_tokens, hidden), ranks.rand(num_tokens, hidden), ranks.rand(hidden)
        for shared in (residual, weight):
            dist.broadcast(shared, 0)
        outs = {"residual_out": torch.empty_like(x), "norm_out": torch.empty_like(x)}
        theirs, held = torch.zeros_like(x), residual.clone()

        def ours(x: torch.Tensor = x, given: Any = (residual, weight), outs: Any = outs) -> None:
            comm.allreduce_fusion(x, workspace, pattern, residual_in=given[0], rms_gamma=given[1], **outs)

        def peer(x: torch.Tensor = theirs, residual: torch.Tensor = held, weight: torch.Tensor = weight) -> None:
            dist.all_reduce(x)
            flashinfer.fused_add_rmsnorm(x, residual, weight)

        def check(run: Run = ours, x: torch.Tensor = x, given: Any = (residual, weight), outs: Any = outs) -> None:
            run()
            exact = _summed(x) + given[0].float()
            _near(outs["residual_out"], exact)
            factor = torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)
            _near(outs["norm_out"], exact * factor * given[1].float())

        name = f"all_reduce + add + RMSNorm, {num_tokens} x {hidden}"
        yield Problem(name, x.numel() * 2, ours, peer, "torch + fused_add_rmsnorm", check)
    workspace.destroy()


def exchanges(ranks: Ranks) -> Iterator[Problem]:
    """All-gather and reduce-scatter; bytes of a rank's part."""
    workspace = comm.CommWorkspace(device=ranks.device)
    for num_bytes in _sizes(ranks, 8 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB):
        part, whole = ranks.rand(num_bytes // 2), ranks.rand(ranks.size * num_bytes // 2)
        gathered, mine = torch.empty_like(whole), torch.empty_like(part)
        theirs = torch.empty_like(whole), torch.empty_like(part)

        def check_gather(part: torch.Tensor = part, out: torch.Tensor = gathered) -> None:
            expected = torch.zeros_like(out).view(ranks.size, -1)
            expected[ranks.rank] = part
            _near(comm.all_gather(part, workspace, out), _summed(expected).flatten())

        def check_scatter(whole: torch.Tensor = whole, out: torch.Tensor = mine) -> None:
            _near(comm.reduce_scatter(whole, workspace, out), _summed(whole).view(ranks.size, -1)[ranks.rank])

        ours = _bound(comm.all_gather, part, workspace, gathered)
        peer = _bound(dist.all_gather_into_tensor, theirs[0], part)
        yield Problem("all_gather", num_bytes, ours, peer, "torch", check_gather)
        ours = _bound(comm.reduce_scatter, whole, workspace, mine)
        peer = _bound(dist.reduce_scatter_tensor, theirs[1], whole)
        yield Problem("reduce_scatter", num_bytes, ours, peer, "torch", check_scatter)
    workspace.destroy()


def _bound(function: Callable[..., Any], *arguments: Any) -> Run:
    return lambda: function(*arguments)


# In the order they run; `python -m bench.comm --rows NAME` takes those whose name holds NAME.
PROBLEMS: dict[str, Problems] = {
    "all_reduce": all_reduce,
    "fused_norm": fused_norm,
    "exchanges": exchanges,
    "all_reduce_fp8": all_reduce_fp8,
}
