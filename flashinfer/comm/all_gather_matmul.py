"""All-gather and the product that follows it, with FlashInfer's names: one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from flashinfer.comm.collectives import all_gather, workspace_of_group
from flashinfer.core import check

BACKENDS = ("auto", "cake")


def _check(inp: torch.Tensor, w: torch.Tensor, backend: str) -> None:
    check.choice("backend", backend, BACKENDS)
    check.tensor("inp", inp, dtypes=check.FLOAT_DTYPES, shape=(None, None))
    check.tensor("w", w, dtypes=(inp.dtype,), shape=(inp.shape[1], None), like=("inp", inp))


def all_gather_matmul(
    inp: torch.Tensor, w: torch.Tensor, group: dist.ProcessGroup, *, backend: str = "auto", verbose: bool = False
) -> torch.Tensor:
    """`[world_size * m, n]`: the rows of `inp` `[m, k]` of all ranks, times `w` `[k, n]`.

    An all-gather, then torch's product: nothing overlaps. inp: contiguous; w: any strides. backend ("auto", "cake") and
    verbose change nothing. The first call of a group makes its workspace, on all ranks. Errors as for `all_gather`.
    """
    _check(inp, w, backend)
    return torch.matmul(all_gather(inp, workspace_of_group(group, inp.device)), w)


def prepare_all_gather_matmul(
    inp: torch.Tensor,
    w: torch.Tensor,
    group: dist.ProcessGroup,
    *,
    backend: str = "auto",
    max_rows: int | None = None,
    verbose: bool = False,
) -> Callable[..., torch.Tensor]:
    """A function `(inp, *, out=None)` that gives `all_gather_matmul` with `w`; all ranks make it together.

    It takes inputs of the dtype and width of `inp` and at most max_rows rows (by default inp's). It may be captured in
    a CUDA graph. Raises ValueError for more rows.
    """
    _check(inp, w, backend)
    workspace, limit = workspace_of_group(group, inp.device), inp.shape[0] if max_rows is None else max_rows
    all_gather(inp, workspace)  # makes the mailboxes

    def launch(inp: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        _check(inp, w, backend)
        if inp.shape[0] > limit:
            fix = "Prepare it with a larger max_rows."
            raise ValueError(check.problem("inp", f"{inp.shape[0]} rows", f"at most {limit}", fix))
        return torch.matmul(all_gather(inp, workspace), w, out=out)

    return launch
