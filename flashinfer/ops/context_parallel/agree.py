"""What the ranks of a group tell each other before they exchange tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from flashinfer.core import check, peers
from flashinfer.core.peers import PeerError, Peers

# What a rank says of its part: what must be the same on all ranks, and what is its own.
Facts = tuple[dict[str, Any], dict[str, Any]]
_ranks: dict[str, Ranks] = {}


class Ranks:
    """The ranks of one group that agree before each exchange on the CPU, and once for each kind of exchange on a GPU.

    On a GPU the words would cost more than the exchange. So there a rank that later comes with other shapes than the
    rest finds the others gone on: it raises after `timeout` seconds, and they wait as long as the group's own timeout.
    """

    def __init__(self, peers_of_group: Peers) -> None:
        self.peers = peers_of_group
        self._agreed: dict[str | None, list[dict[str, Any]]] = {}

    def agree(self, what: str, describe: Callable[[], Facts], always: bool = False) -> list[dict[str, Any]]:
        """What each rank has of its own; raises on every rank if one's checks fail or what must be the same is not.

        describe: makes the checks of this rank and returns its facts, of JSON values. A rank whose checks fail raises
        its own error, the others a PeerError with its words. always: words on a GPU, too: the own facts may differ
        from call to call on other ranks while they stay the same here.
        """
        refusal: Exception | None = None
        same, own = dict[str, Any](), dict[str, Any]()
        try:
            same, own = describe()
        except (TypeError, ValueError, RuntimeError) as error:
            refusal = error
        key = None if always or self.peers.device.type == "cpu" else json.dumps([what, same, own])
        if refusal is None and key in self._agreed:
            return self._agreed[key]
        try:
            told = self.peers.gather(what, {"refusal": str(refusal or ""), "same": same, "own": own})
        except PeerError:
            if refusal is not None:
                raise refusal from None
            raise
        if refusal is not None:
            raise refusal
        self._compare(what, json.loads(json.dumps(same)), told)
        owned = [words["own"] for words in told]
        if key is not None:
            self._agreed[key] = owned
        return owned

    def _compare(self, what: str, same: dict[str, Any], told: list[dict[str, Any]]) -> None:
        for rank, words in enumerate(told):
            if words["refusal"]:
                raise PeerError(f"{what}: rank {rank} refused its arguments: {words['refusal']}")
        for rank, words in enumerate(told):
            for name, value in same.items():
                other = words["same"].get(name)
                if other != value:
                    got = f"{value} on rank {self.peers.rank} and {other} on rank {rank}"
                    expected = "one value on all ranks"
                    raise PeerError(check.problem(f"{what}, {name}", got, expected, f"Pass the same {name}."))


def ranks_of(group: dist.ProcessGroup | None, device: torch.device) -> Ranks:
    """The ranks of `group` (None: all there are), one object a group; its members ask for it in the same order."""
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    found = None if group is None else _ranks.get(group.group_name)
    if found is None or found.peers.group is not group or found.peers.device.type != device.type:
        found = Ranks(Peers(group, device, peers.TIMEOUT))
        _ranks[found.peers.group.group_name] = found
    return found
