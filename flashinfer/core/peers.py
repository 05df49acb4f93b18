"""The ranks of a process group that work on each other's memory: what they must agree on, and the memory itself."""

from __future__ import annotations

import itertools
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flashinfer.core import check
from flashinfer.core.arch import identity_of

# Torch 2.13 calls them so; 2.11 knows the older names alone.
gather_into: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
scatter_sums: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
# Seconds that a rank is waited for before it counts as missing.
TIMEOUT = 30.0
# A barrier between asking whether a rank has come and asking again.
_POLL = 0.0005
_numbers: dict[str, itertools.count[int]] = {}


class PeerError(RuntimeError):
    """A rank did not come, or came with something else than this one; the message says which rank and what."""


class Peers:
    """The ranks of one process group, seen from one of them.

    group: None is the whole world. device: of this rank's tensors. timeout: seconds that others are waited for.
    Every rank makes its Peers of a group in the same order. Words go through the group's store (a TCP server of
    torch.distributed's), which works whatever the group's backend; a word costs about 0.1 ms, so they are for set-up,
    and for every call on the CPU.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, timeout: float = TIMEOUT) -> None:
        if not dist.is_initialized():
            expected = "torch.distributed initialised"
            raise RuntimeError(check.problem("group", "no process group", expected, "Call init_process_group first."))
        self.group: dist.ProcessGroup = dist.group.WORLD if group is None else group  # type: ignore[assignment]
        self.device, self.timeout = device, timeout
        self.rank: int = dist.get_rank(self.group)
        self.world_size: int = dist.get_world_size(self.group)
        # Whether tensors on GPUs go through NCCL; gloo knows few operations on them.
        self.has_nccl = device.type == "cuda" and "nccl" in str(dist.get_backend(self.group))
        name = self.group.group_name
        # A key is used once: this object's number in its group, and the number of the word in this object.
        number = next(_numbers.setdefault(name, itertools.count()))
        self._prefix = f"flashinfer/{name}/{number}"
        self._words = itertools.count()
        self._store = dist.distributed_c10d._get_process_group_store(self.group)
        self._held: list[Any] = []

    def gather(self, what: str, value: Any) -> list[Any]:
        """The JSON value that each rank gave; raises PeerError for a rank that gave none in time.

        what: names the occasion; a rank that comes to another one than this rank is an error, too.
        """
        word = next(self._words)
        try:
            self._store.set(self._key(word, self.rank), json.dumps([what, value]))
            words = [self._word(word, rank, what) for rank in range(self.world_size)]
            if word >= 2:  # everyone has read the word before last: all came to the last one
                self._store.delete_key(self._key(word - 2, self.rank))
        except dist.DistError as error:
            gone = "the process group's store is gone, and so the rank that held it"
            raise PeerError(f"{what}: {gone}: {error}") from error
        for rank, (other, _) in enumerate(words):
            if other != what:
                raise PeerError(f"{what}: rank {rank} came with {other} instead. All ranks must make the same calls.")
        return [value for _, value in words]

    def exchange(self, what: str, **values: Any) -> None:
        """See that all ranks came with the same values; raises PeerError naming the rank and the argument."""
        spelled = {name: _spelled(value) for name, value in values.items()}
        for rank, others in enumerate(self.gather(what, spelled)):
            for name, value in spelled.items():
                if others.get(name) != value:
                    got = f"{value} on rank {self.rank} and {others.get(name)} on rank {rank}"
                    raise PeerError(check.problem(f"{what}, {name}", got, "one value on all ranks", "Pass the same."))

    def unreachable(self) -> str | None:
        """Why kernels cannot work on all ranks' memory, the same on every rank; None if they can."""
        mine = {"host": _host(), "kind": self.device.type, "uuid": "", "peers": ""}
        if self.device.type == "cuda":
            mine["uuid"], mine["peers"] = identity_of(self.device)
        ranks = self.gather("reach", mine)
        for rank, other in enumerate(ranks):
            if other["host"] != ranks[0]["host"]:
                return f"rank {rank} is on another host than rank 0"
            if other["kind"] != ranks[0]["kind"]:
                return f"rank {rank} is on a {other['kind']} device, rank 0 on a {ranks[0]['kind']} device"
            if other["uuid"] and other["uuid"] in [r["uuid"] for r in ranks[:rank]]:
                return f"rank {rank} shares its GPU with a lower rank"
            if other["peers"]:
                return f"rank {rank}: {other['peers']}"
        return None

    def allocate(self, num_bytes: int) -> tuple[torch.Tensor, ...]:
        """uint8 `[num_bytes]` of every rank as this one sees it, its own at its rank; zeros. All ranks call it.

        Memory goes when the last view of it is gone on every rank; `close` lets go of what this object holds.
        """
        self.exchange("allocate", num_bytes=num_bytes)
        buffers = self._mapped(num_bytes) if self.device.type == "cpu" else self._symmetric(num_bytes)
        self._held.append(buffers)
        self.gather("allocated", None)
        return buffers

    def _symmetric(self, num_bytes: int) -> tuple[torch.Tensor, ...]:
        import torch.distributed._symmetric_memory as symmetric

        own = symmetric.empty(num_bytes, dtype=torch.uint8, device=self.device)
        handle = symmetric.rendezvous(own, self.group.group_name)
        own.zero_()
        torch.cuda.synchronize(self.device)
        # The handle unmaps the others' memory when it goes.
        self._held.append(handle)
        others = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(self.world_size)]
        return tuple(own if rank == self.rank else other for rank, other in enumerate(others))

    def _mapped(self, num_bytes: int) -> tuple[torch.Tensor, ...]:
        """Files that each process of the host maps; they have no names any more once all have."""
        folder = Path("/dev/shm")
        handle, path = tempfile.mkstemp(prefix="flashinfer-", dir=folder if folder.is_dir() else None)
        try:
            os.truncate(handle, num_bytes)
            paths = self.gather("files", path)
            buffers = [torch.from_file(p, shared=True, size=num_bytes, dtype=torch.uint8) for p in paths]
            self.gather("mapped", None)
        finally:
            os.close(handle)
            os.unlink(path)
        return tuple(buffers)

    def close(self) -> None:
        """Let go of the memory; every rank calls it, none of them uses the memory afterwards."""
        self._held.clear()

    def _key(self, word: int, rank: int) -> str:
        return f"{self._prefix}/{word}/{rank}"

    def _word(self, word: int, rank: int, what: str) -> Sequence[Any]:
        key, end = self._key(word, rank), time.monotonic() + self.timeout
        while not self._store.check([key]):
            if time.monotonic() > end:
                got = f"nothing from rank {rank} within {self.timeout:g} s"
                raise PeerError(f"{what}: {got}. It died, hangs, or did not make this call.")
            time.sleep(_POLL)
        word_of: Sequence[Any] = json.loads(self._store.get(key))
        return word_of


def _spelled(value: Any) -> str:
    """A value in words, so that any kind can be compared and shown."""
    return str(list(value)) if isinstance(value, torch.Size | tuple) else str(value)


def _host() -> str:
    """Which machine this is; containers of one name are told apart by their boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
