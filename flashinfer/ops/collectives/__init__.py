"""Collectives of a group of ranks, as torch ops that write their results to tensors they are given.

What a group holds between calls is a `Workspace`; the ops know it by its number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashinfer.core import check, library
from flashinfer.core.select import Choice, Impl
from flashinfer.ops.collectives.plan import FP8_COLS, ROW_BYTES, SHARE_BYTES, uses_two_shots
from flashinfer.ops.collectives.spec import DTYPES, CollectiveSpec, Mix, Reduce
from flashinfer.ops.collectives.support import torch_supports, triton_supports
from flashinfer.ops.collectives.workspace import Workspace, workspace_of

IMPLS = (
    Impl("triton", "flashinfer.ops.collectives.triton", triton_supports),
    Impl("torch", "flashinfer.ops.collectives.reference", torch_supports),
)
CHOICE = Choice(IMPLS)


def _check_device(input: torch.Tensor, workspace: Workspace) -> None:
    device = workspace.peers.device
    if input.device != device:
        got, expected = f"a tensor on {input.device}", f"one on the workspace's {device}"
        raise ValueError(check.problem("input", got, expected, f"Move it with .to({str(device)!r})."))


def reduce(
    tensors: Reduce,
    workspace: Workspace,
    eps: float = 0.0,
    weight_bias: float = 0.0,
    two_shot: bool | None = None,
    mix: Mix | None = None,
    backend: str = "auto",
) -> None:
    """All-reduce, and what `tensors` asks for beside it. two_shot: None leaves the algorithm to the number of bytes."""
    input, world_size = tensors.input, workspace.peers.world_size
    _check_device(input, workspace)
    hidden_size = input.shape[-1] if input.dim() else 1
    num_elements = input.numel() if mix is None else mix.num_rows * hidden_size
    if num_elements == 0:
        return
    normed = tensors.weight is not None
    rows = normed or mix is not None
    spec = CollectiveSpec(
        "all_reduce",
        input.dtype,
        hidden_size if rows else ROW_BYTES // input.element_size(),
        world_size,
        uses_two_shots(num_elements * input.element_size(), world_size) if two_shot is None else two_shot,
        tensors.residual is not None,
        weight_bias if normed else None,
        None if tensors.quantised is None else tensors.quantised.dtype,
        unreachable=workspace.unreachable,
    )
    CHOICE.call(spec, input.device, backend)(tensors, mix, workspace, eps)


def reduce_in_fp8(
    out: torch.Tensor, input: torch.Tensor, group_size: int, workspace: Workspace, backend: str = "auto"
) -> None:
    """All-reduce of what is sent as e4m3 with an fp32 scale for each `group_size` elements, twice: parts, then sums."""
    _check_device(input, workspace)
    if input.numel() == 0:
        return
    peers, unreachable = workspace.peers, workspace.unreachable
    spec = CollectiveSpec(
        "all_reduce_fp8", input.dtype, FP8_COLS, peers.world_size, True, group_size=group_size, unreachable=unreachable
    )
    CHOICE.call(spec, input.device, backend)(out, input, workspace)


def share(kind: str, out: torch.Tensor, input: torch.Tensor, workspace: Workspace, backend: str = "auto") -> None:
    """All-gather or reduce-scatter over the first dimension.

    "auto" leaves large parts to NCCL, but gathers only: its sums have an order of their own.
    """
    _check_device(input, workspace)
    if input.numel() == 0:
        return
    cols, world_size = ROW_BYTES // input.element_size(), workspace.peers.world_size
    part = min(out.numel(), input.numel()) * input.element_size()
    if backend == "auto" and kind == "all_gather" and part > SHARE_BYTES and workspace.peers.has_nccl:
        backend = "torch"
    spec = CollectiveSpec(kind, input.dtype, cols, world_size, unreachable=workspace.unreachable)
    CHOICE.call(spec, input.device, backend)(out, input, workspace)


def reserve(workspace: Workspace, dtype: torch.dtype, hidden_size: int) -> None:
    """Make the mailboxes for sums of `dtype`, and for those with a norm of rows of `hidden_size`; all ranks call it."""
    if workspace.unreachable is None and workspace.peers.world_size > 1 and dtype in DTYPES:
        for cols in (ROW_BYTES // dtype.itemsize, hidden_size):
            workspace.room(dtype, cols)


# Fields of Reduce that are written, and those of Reduce and of Mix that are read, in the order the op below has them.
OUTPUTS = ("total", "residual_out", "normed", "quantised", "scales")
INPUTS = ("residual", "weight", "scale")
PARTS = ("table", "factors", "added")


@library.register(
    "all_reduce(Tensor input, Tensor(a!)[] outs, Tensor?[] given, int[] which, float[] numbers, int workspace, "
    "bool? two_shot) -> ()"
)
def _all_reduce(
    input: torch.Tensor,
    outs: Sequence[torch.Tensor],
    given: Sequence[torch.Tensor | None],
    which: Sequence[int],
    numbers: Sequence[float],
    workspace: int,
    two_shot: bool | None,
) -> None:
    """outs: the OUTPUTS that `bits` say. given: INPUTS and PARTS. which: (bits, rows, parts of a row)."""
    bits, num_rows, num_parts = which
    eps, weight_bias, scale = numbers
    writes = dict(zip((name for i, name in enumerate(OUTPUTS) if bits >> i & 1), outs, strict=True))
    reads = dict(zip((*INPUTS, *PARTS), given, strict=True))
    table, factors, added = (reads.pop(name) for name in PARTS)
    mix = Mix(num_rows, num_parts, table, factors, added, scale) if num_parts else None
    if mix is not None and mix.table is not None:
        check.index_range("expanded_idx_to_permuted_idx", mix.table, -(2**31), input.shape[0])
    reduce(Reduce(input, **writes, **reads), workspace_of(workspace), eps, weight_bias, two_shot, mix)


def all_reduce(
    tensors: Reduce,
    workspace: int,
    eps: float = 0.0,
    weight_bias: float = 0.0,
    two_shot: bool | None = None,
    mix: Mix | None = None,
) -> None:
    """`reduce` as a torch op; workspace: its number."""
    outs = [getattr(tensors, name) for name in OUTPUTS]
    bits = sum(1 << i for i, x in enumerate(outs) if x is not None)
    parts = [None if mix is None else getattr(mix, name) for name in PARTS]
    which = (bits, 0, 0) if mix is None else (bits, mix.num_rows, mix.num_parts)
    _all_reduce(
        tensors.input,
        [x for x in outs if x is not None],
        [*(getattr(tensors, name) for name in INPUTS), *parts],
        which,
        (eps, weight_bias, 1.0 if mix is None else mix.scale),
        workspace,
        two_shot,
    )


@library.register("all_reduce_fp8(Tensor(a!) out, Tensor input, int group_size, int workspace) -> ()")
def all_reduce_fp8(out: torch.Tensor, input: torch.Tensor, group_size: int, workspace: int) -> None:
    """`out = sum over ranks of input`, sent in fp8 (`reduce_in_fp8`)."""
    reduce_in_fp8(out, input, group_size, workspace_of(workspace))


@library.register("all_gather(Tensor(a!) out, Tensor input, int workspace) -> ()")
def all_gather(out: torch.Tensor, input: torch.Tensor, workspace: int) -> None:
    """`out[rank] = input of that rank`, out `[world_size * n, ...]` for input `[n, ...]`."""
    share("all_gather", out, input, workspace_of(workspace))


@library.register("reduce_scatter(Tensor(a!) out, Tensor input, int workspace) -> ()")
def reduce_scatter(out: torch.Tensor, input: torch.Tensor, workspace: int) -> None:
    """`out = sum over ranks of their input[this rank]`, input `[world_size * n, ...]` for out `[n, ...]`."""
    share("reduce_scatter", out, input, workspace_of(workspace))


__all__ = [
    "CHOICE",
    "IMPLS",
    "CollectiveSpec",
    "Mix",
    "Reduce",
    "Workspace",
    "all_gather",
    "all_reduce",
    "all_reduce_fp8",
    "reduce",
    "reduce_in_fp8",
    "reduce_scatter",
    "reserve",
    "share",
]
