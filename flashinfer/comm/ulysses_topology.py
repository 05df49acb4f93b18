"""Which transport Ulysses takes: what each rank sees of the others' GPUs, and one decision from all of it."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from flashinfer.core import check
from flashinfer.core.arch import address_of
from flashinfer.ops.context_parallel import Facts, ranks_of

__all__ = [
    "UlyssesBackendDecision",
    "UlyssesBackendError",
    "UlyssesRankTopology",
    "decide_ulysses_backend",
    "probe_ulysses_rank_topology",
    "resolve_ulysses_backend",
]

BACKENDS = ("auto", "nvlink", "nccl")
# World sizes for which this package has kernels that write to the other ranks' memory.
_KERNELS_FOR: tuple[int, ...] = ()


class UlyssesBackendError(RuntimeError):
    """The backend asked for by name cannot run; the message says why."""


@dataclass(frozen=True)
class UlyssesBackendDecision:
    """backend: "nvlink" or "nccl" (the process group's own all-to-all, whatever its backend). reason: why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class UlyssesRankTopology:
    """What one rank sees. peer_p2p, peer_nvlink: by UUID, whether that GPU can be reached, and over NVLink.

    pair_errors: by UUID, what could not be found out. probe_error: why nothing could. What is absent counts as no.
    """

    rank: int
    hostname: str = ""
    device_index: int = -1
    device_uuid: str = ""
    pci_bus_id: str = ""
    peer_p2p: dict[str, bool] = field(default_factory=dict)
    peer_nvlink: dict[str, bool] = field(default_factory=dict)
    pair_errors: dict[str, str] = field(default_factory=dict)
    probe_error: str | None = None


def probe_ulysses_rank_topology(device: torch.device | str | int | None, rank: int) -> UlyssesRankTopology:
    """What this rank sees of its own GPU and of the others that this process can see; never raises.

    device: None is the current GPU. torch does not tell NVLink from PCIe, so peer_nvlink stays empty.
    """
    try:
        where = torch.device("cuda" if device is None else device)
        if where.type != "cuda":
            return UlyssesRankTopology(rank, socket.gethostname(), probe_error=f"{where} is not a GPU")
        own = torch.cuda.current_device() if where.index is None else where.index
        uuids = {other: address_of(other)[0] for other in range(torch.cuda.device_count())}
        reached = {uuid: torch.cuda.can_device_access_peer(own, other) for other, uuid in uuids.items() if other != own}
        unknown = dict.fromkeys(reached, "whether NVLink joins them is not known")
        identity = address_of(own)
        return UlyssesRankTopology(rank, socket.gethostname(), own, *identity, reached, pair_errors=unknown)
    except Exception as error:
        return UlyssesRankTopology(rank, probe_error=f"{type(error).__name__}: {error}")


def decide_ulysses_backend(
    requested: str, topologies: list[UlyssesRankTopology], supported_world_sizes: Sequence[int] = (2, 4, 6, 8)
) -> UlyssesBackendDecision:
    """The backend for ranks that see this; the same on each rank, as it depends on nothing else.

    requested: "nccl", "nvlink", or "auto": NVLink if one host holds all ranks, every pair is seen to be joined by it
    and the number of ranks is supported; else nccl. Raises ValueError for another name, UlyssesBackendError if NVLink
    is requested and cannot be used.
    """
    check.choice("requested", requested, BACKENDS)
    if requested == "nccl":
        return UlyssesBackendDecision("nccl", "requested")
    reason = _refusal(topologies, supported_world_sizes)
    if reason is None:
        return UlyssesBackendDecision("nvlink", f"{len(topologies)} ranks of one host, each pair joined by NVLink")
    if requested == "nvlink":
        raise UlyssesBackendError(check.problem("backend", "'nvlink'", f"'nccl', since {reason}", 'Pass "auto".'))
    return UlyssesBackendDecision("nccl", reason)


def _refusal(topologies: Sequence[UlyssesRankTopology], world_sizes: Collection[int]) -> str | None:
    """Why these ranks cannot write to each other's memory over NVLink."""
    if len(topologies) not in world_sizes:
        return f"there are kernels for {list(world_sizes) or 'no number of'} ranks, not for {len(topologies)}"
    for seen in topologies:
        if seen.probe_error is not None:
            return f"rank {seen.rank} could not look: {seen.probe_error}"
        if seen.hostname != topologies[0].hostname:
            return f"rank {seen.rank} is on host {seen.hostname}, rank {topologies[0].rank} on {topologies[0].hostname}"
    if len({seen.device_uuid for seen in topologies}) != len(topologies):
        return "several ranks share a GPU"
    for seen in topologies:
        for other in topologies:
            uuid = other.device_uuid
            if other is not seen and not (seen.peer_p2p.get(uuid) and seen.peer_nvlink.get(uuid)):
                why = seen.pair_errors.get(uuid, "no peer access over NVLink")
                return f"rank {seen.rank} and rank {other.rank}: {why}"
    return None


def resolve_ulysses_backend(
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | int | None = None,
) -> UlyssesBackendDecision:
    """One decision for all ranks of `group`, which all call it with the same backend; see `decide_ulysses_backend`.

    device: None is the current GPU where the group's backend is NCCL, else the CPU. This package's Ulysses has the
    process group's all-to-all alone so far, so "auto" is "nccl", and "nvlink" raises UlyssesBackendError on all ranks.
    """
    where = device_of(group, device)
    ranks = ranks_of(group, where)

    def describe() -> Facts:
        check.choice("backend", backend, BACKENDS)
        seen = probe_ulysses_rank_topology(where, ranks.peers.rank)
        return {"backend": backend}, dataclasses.asdict(seen)

    topologies = [UlyssesRankTopology(**own) for own in ranks.agree("resolve_ulysses_backend", describe)]
    return decide_ulysses_backend(backend, topologies, _KERNELS_FOR)


def device_of(group: dist.ProcessGroup | None, device: torch.device | str | int | None) -> torch.device:
    """The device asked for, or the one that tensors of this group's backend lie on."""
    if device is not None:
        return torch.device(device)
    on_gpu = dist.is_initialized() and "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
