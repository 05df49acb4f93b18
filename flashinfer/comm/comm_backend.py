"""How ranks find each other for set-up: `CommBackend`, and the one over torch.distributed."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist

from flashinfer.core import check


@runtime_checkable
class CommBackend(Protocol):
    """What FlashInfer asks of a communicator; names as in MPI, objects of any kind that pickles."""

    def Get_rank(self) -> int: ...

    def Get_size(self) -> int: ...

    def allgather(self, data: Any) -> tuple[Any, ...]: ...

    def bcast(self, data: Any, root: int) -> Any: ...

    def barrier(self) -> None: ...

    def Split(self, color: int, key: int) -> CommBackend: ...


class TorchDistBackend:
    """`CommBackend` over a process group of torch.distributed; None: the whole world.

    Raises RuntimeError before `init_process_group`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            expected = "torch.distributed initialised"
            raise RuntimeError(check.problem("group", "no process group", expected, "Call init_process_group first."))
        self._group = group

    def Get_rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self._group)

    def Get_size(self) -> int:
        """The number of ranks."""
        return dist.get_world_size(self._group)

    def allgather(self, data: Any) -> tuple[Any, ...]:
        """What each rank gave, in the order of ranks."""
        found: list[Any] = [None] * self.Get_size()
        dist.all_gather_object(found, data, group=self._group)
        return tuple(found)

    def bcast(self, data: Any, root: int) -> Any:
        """What rank `root` of the group gave; the others' is not looked at."""
        found = [data]
        source = root if self._group is None else dist.get_global_rank(self._group, root)
        dist.broadcast_object_list(found, src=source, group=self._group)
        return found[0]

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        dist.barrier(group=self._group)

    def Split(self, color: int, key: int) -> TorchDistBackend:
        """The ranks of this rank's color, in the order of their keys, then of their ranks; all ranks call it."""
        everyone = self.allgather((color, key, dist.get_rank()))
        groups: dict[int, list[tuple[int, int]]] = {}
        for other, other_key, rank in everyone:
            groups.setdefault(other, []).append((other_key, rank))
        found = {}
        for other in sorted(groups):  # torch wants every rank in the making of every group
            ranks = [rank for _, rank in sorted(groups[other])]
            options: dict[str, Any] = {} if ranks == sorted(ranks) else {"sort_ranks": False}
            found[other] = dist.new_group(ranks, **options)
        return TorchDistBackend(found[color])


def group_of(group: dist.ProcessGroup | None, comm_backend: Any) -> dist.ProcessGroup | None:
    """The process group of a call that may name a communicator instead; None: the whole world.

    A communicator of another kind must be of all ranks of the world, in their order; ValueError else.
    """
    if group is not None or comm_backend is None:
        return group
    if isinstance(comm_backend, TorchDistBackend):
        return comm_backend._group
    mine, world = (comm_backend.Get_rank(), comm_backend.Get_size()), (dist.get_rank(), dist.get_world_size())
    if mine != world:
        got = f"rank {mine[0]} of {mine[1]} where torch.distributed says {world[0]} of {world[1]}"
        fix = "Pass group=, or TorchDistBackend(group)."
        raise ValueError(check.problem("comm_backend", got, "a communicator of all ranks", fix))
    return None
