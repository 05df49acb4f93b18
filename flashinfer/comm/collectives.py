"""All-reduce, all-gather and reduce-scatter over the ranks of a process group: this package's own functions.

Every rank calls the same functions with tensors of the same shapes, in the same order. On GPUs that reach each other's
memory a call is one kernel, and may be captured in a CUDA graph after one call for its dtype; elsewhere it is torch's
own collectives. Sums are fp32, added in the order of ranks, rounded once, and the same bits on all ranks (of more than
1.5 MiB sent to the other ranks: two shots, the same bits as well). A rank that is missing, or makes another call, is an
error on the next call that looks (`PeerError`), not a hang.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from flashinfer.core import check
from flashinfer.core.peers import TIMEOUT, Peers
from flashinfer.core.replay import replayed
from flashinfer.ops import collectives as ops

# Most bytes that the mailboxes of a kind of rows take at once, unless asked otherwise.
MAX_BYTES = 16 << 20
_shared: dict[tuple[str, torch.device], CommWorkspace] = {}


class CommWorkspace(ops.Workspace):
    """What the ranks of a group hold between calls: memory that all of them write to.

    group: None is the whole world. device: of the tensors, by default the current GPU, the CPU where there is none.
    max_bytes: of the largest tensor that goes in one launch; larger ones go in several. timeout: seconds that a rank is
    waited for. Memory is taken, on all ranks at once, by the first call for a dtype and a length of rows: about 6 times
    `max_bytes`. All ranks make it together, and `destroy` it together. Raises RuntimeError without a process group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        max_bytes: int = MAX_BYTES,
        timeout: float = TIMEOUT,
    ) -> None:
        check.positive("max_bytes", max_bytes)
        super().__init__(Peers(group, here(device), timeout), max_bytes)

    @property
    def rank(self) -> int:
        return self.peers.rank

    @property
    def world_size(self) -> int:
        return self.peers.world_size

    def destroy(self) -> None:
        """Wait for this rank's work, then for all ranks, and free the memory. The second time it does nothing."""
        self.close()


def here(device: torch.device | str | None = None) -> torch.device:
    """A device with its number; None: the current GPU, or the CPU."""
    found = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else torch.device(device)
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


def workspace_of_group(group: dist.ProcessGroup | None, device: torch.device) -> CommWorkspace:
    """One workspace for all calls that name a group only; the first of them makes it, on all ranks."""
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    key = ("" if group is None else group.group_name, here(device))
    found = _shared.get(key)
    if found is None or found.closed or found.peers.group is not group:
        found = _shared[key] = CommWorkspace(group, device)
    return found


def ready(workspace: ops.Workspace) -> None:
    """Raise what went wrong with earlier calls; in compiled code that is left to the next call outside."""
    if not torch.compiler.is_compiling():
        workspace.check()


def _checked(x: torch.Tensor, out: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Check x, and out of x's dtype and device and of `shape`; both contiguous."""
    check.tensor("x", x, dtypes=check.FLOAT_DTYPES)
    check.tensor("out", out, dtypes=(x.dtype,), shape=shape, like=("x", x))
    check.contiguous(x=x, out=out)


@replayed
def _all_reduce(out: torch.Tensor, x: torch.Tensor, workspace: int) -> None:
    _checked(x, out, tuple(x.shape))
    ops.all_reduce(ops.Reduce(x, out), workspace)


@replayed
def _all_reduce_fp8(out: torch.Tensor, x: torch.Tensor, group_size: int, workspace: int) -> None:
    _checked(x, out, tuple(x.shape))
    ops.all_reduce_fp8(out, x, group_size, workspace)


@replayed
def _all_gather(out: torch.Tensor, x: torch.Tensor, world_size: int, workspace: int) -> None:
    _leading("x", x)
    _checked(x, out, (world_size * x.shape[0], *x.shape[1:]))
    ops.all_gather(out, x, workspace)


@replayed
def _reduce_scatter(out: torch.Tensor, x: torch.Tensor, world_size: int, workspace: int) -> None:
    _leading("x", x)
    check.multiple("x.shape[0]", x.shape[0], "the number of ranks", world_size)
    _checked(x, out, (x.shape[0] // world_size, *x.shape[1:]))
    ops.reduce_scatter(out, x, workspace)


def _leading(name: str, x: torch.Tensor) -> None:
    if check.tensor(name, x).dim() == 0:
        raise ValueError(check.problem(name, "no dimension", "at least one", f"Pass {name}.view(1)."))


def all_reduce(x: torch.Tensor, workspace: ops.Workspace, out: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of `x` over the ranks.

    x: any shape, fp32, fp16 or bf16, contiguous, on the workspace's device. out: like x, may be x itself; new by
    default. Returns out. Raises ValueError for a wrong shape, dtype, stride or device, PeerError for what other ranks
    did wrong (this call, where the CPU works; an earlier one on a GPU), RuntimeError for a destroyed workspace.
    """
    ready(workspace)
    out = torch.empty_like(check.tensor("x", x)) if out is None else out
    _all_reduce(out, x, workspace.number)
    return out


def all_gather(x: torch.Tensor, workspace: ops.Workspace, out: torch.Tensor | None = None) -> torch.Tensor:
    """`x` of all ranks, one behind the other: `[world_size * n, ...]` for x `[n, ...]`; see `all_reduce`.

    A number -0.0 of another rank may arrive as 0.0.
    """
    ready(workspace)
    world_size = workspace.peers.world_size
    if out is None:
        _leading("x", x)
        out = x.new_empty((world_size * x.shape[0], *x.shape[1:]))
    _all_gather(out, x, world_size, workspace.number)
    return out


def reduce_scatter(x: torch.Tensor, workspace: ops.Workspace, out: torch.Tensor | None = None) -> torch.Tensor:
    """This rank's part of the sum of `x` over the ranks: `[n, ...]` for x `[world_size * n, ...]`; see `all_reduce`."""
    ready(workspace)
    world_size = workspace.peers.world_size
    if out is None:
        _leading("x", x)
        out = x.new_empty((x.shape[0] // world_size, *x.shape[1:]))
    _reduce_scatter(out, x, world_size, workspace.number)
    return out


def all_reduce_fp8(
    x: torch.Tensor, workspace: ops.Workspace, group_size: int = 256, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`all_reduce` that sends e4m3 numbers with an fp32 scale for each `group_size` of them: half the bytes of bf16.

    Parts are rounded, added up in fp32, and the sum is rounded again; all ranks get the same bits. With the sum S of
    parts x_r an element is off by at most `2^-4 * (sum of |x_r| + |S| + 2^-4 * sum of |x_r|)` and the rounding of the
    result; below 2^-6 / 448 of the largest of its group an addend is off by `2^-10 / 448` of that largest one instead
    of 2^-4 of itself. A group that holds an infinity comes out as NaN.
    group_size: a power of two up to 4096 where kernels do it, any with torch. x, out, errors: as for `all_reduce`.
    """
    ready(workspace)
    check.positive("group_size", group_size)
    out = torch.empty_like(check.tensor("x", x)) if out is None else out
    _all_reduce_fp8(out, x, group_size, workspace.number)
    return out
