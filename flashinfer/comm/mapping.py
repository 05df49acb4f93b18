"""Which rank does what: the place of a rank in pipeline, context, tensor and expert parallelism."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from flashinfer.core import check

__all__ = ["Mapping"]

_SIZES = ("world_size", "gpus_per_node", "cp_size", "tp_size", "pp_size")
# Sizes that -1 leaves to the others.
_DERIVED = ("moe_cluster_size", "moe_tp_size", "moe_ep_size", "attn_tp_size", "attn_cp_size")


@dataclass(frozen=True)
class Mapping:
    """The place of one rank among `world_size = pp_size * cp_size * tp_size` ranks.

    rank = (pp_rank * cp_size + cp_rank) * tp_size + tp_rank: tensor parallel ranks are neighbours, pipeline stages are
    farthest apart. The ranks of a tensor parallel group share out experts as `moe_tp_size * moe_ep_size *
    moe_cluster_size = tp_size`, in the order moe_tp, moe_ep, moe_cluster, the last innermost. Attention takes the ranks
    of a stage as `attn_tp_size * attn_cp_size = tp_size * cp_size`. Sizes of -1 follow from the others; with none of
    them given, experts are split by moe_tp and attention by attn_tp alone. auto_parallel: the product of the sizes may
    differ from world_size. cp_config, enable_attention_dp: kept for the caller. Groups are lists of ranks in rising
    order. Raises ValueError for sizes that do not fit.
    """

    world_size: int = 1
    rank: int = 0
    gpus_per_node: int = 8
    cp_size: int = field(default=1, kw_only=True)
    cp_config: dict[str, Any] | None = field(default=None, kw_only=True, hash=False)
    tp_size: int = field(default=1, kw_only=True)
    pp_size: int = field(default=1, kw_only=True)
    moe_cluster_size: int = field(default=-1, kw_only=True)
    moe_tp_size: int = field(default=-1, kw_only=True)
    moe_ep_size: int = field(default=-1, kw_only=True)
    attn_tp_size: int = field(default=-1, kw_only=True)
    attn_cp_size: int = field(default=-1, kw_only=True)
    auto_parallel: bool = field(default=False, kw_only=True)
    enable_attention_dp: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in _SIZES:
            check.positive(name, getattr(self, name))
        for name in _DERIVED:
            if getattr(self, name) != -1:
                check.positive(name, getattr(self, name))
        if not 0 <= self.rank < self.world_size:
            expected = f"0 to world_size - 1 = {self.world_size - 1}"
            raise ValueError(check.problem("rank", self.rank, expected, "Pass this process's rank."))
        product = self.pp_size * self.cp_size * self.tp_size
        if not self.auto_parallel and product != self.world_size:
            got = f"{self.world_size} with pp_size {self.pp_size}, cp_size {self.cp_size}, tp_size {self.tp_size}"
            raise ValueError(check.problem("world_size", got, f"their product {product}", "Make the sizes fit."))
        cluster = 1 if self.moe_cluster_size == -1 else self.moe_cluster_size
        object.__setattr__(self, "moe_cluster_size", cluster)
        self._derive("tp_size", self.tp_size, ("moe_tp_size", "moe_ep_size"), cluster)
        self._derive("tp_size * cp_size", self.tp_size * self.cp_size, ("attn_tp_size", "attn_cp_size"), 1)

    def _derive(self, of: str, total: int, names: tuple[str, str], factor: int) -> None:
        """See that the sizes called `names`, times `factor`, make `total`; those left open are set."""
        first, second = (getattr(self, name) for name in names)
        if second == -1:
            second = 1 if first == -1 else total // (factor * first)
        if first == -1:
            first = total // (factor * second)
        if first * second * factor != total:
            got = f"{names[0]} {first} * {names[1]} {second}" + (f" * moe_cluster_size {factor}" if factor > 1 else "")
            raise ValueError(check.problem(of, total, got, "Make the sizes fit."))
        object.__setattr__(self, names[0], first)
        object.__setattr__(self, names[1], second)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp_size % self.cp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // self._stage % self.pp_size

    @property
    def moe_tp_rank(self) -> int:
        return self.tp_rank // (self.moe_ep_size * self.moe_cluster_size)

    @property
    def moe_ep_rank(self) -> int:
        return self.tp_rank // self.moe_cluster_size % self.moe_ep_size

    @property
    def moe_cluster_rank(self) -> int:
        return self.tp_rank % self.moe_cluster_size

    @property
    def tp_group(self) -> list[int]:
        return self._group(1, self.tp_size)

    @property
    def cp_group(self) -> list[int]:
        return self._group(self.tp_size, self.cp_size)

    @property
    def pp_group(self) -> list[int]:
        return self._group(self._stage, self.pp_size)

    @property
    def moe_tp_group(self) -> list[int]:
        return self._group(self.moe_ep_size * self.moe_cluster_size, self.moe_tp_size)

    @property
    def moe_ep_group(self) -> list[int]:
        return self._group(self.moe_cluster_size, self.moe_ep_size)

    @property
    def moe_cluster_group(self) -> list[int]:
        return self._group(1, self.moe_cluster_size)

    @property
    def _stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp_size * self.cp_size

    def _group(self, stride: int, size: int) -> list[int]:
        """The ranks that differ from this one only in the digit of `size` values whose step is `stride`."""
        first = self.rank - self.rank // stride % size * stride
        return list(range(first, first + size * stride, stride))

    @property
    def node_rank(self) -> int:
        return self.get_node_rank(self.rank)

    @property
    def local_rank(self) -> int:
        return self.get_local_rank(self.rank)

    def get_node_rank(self, rank: int) -> int:
        """The number of the host that `rank` is on."""
        return rank // self.gpus_per_node

    def get_local_rank(self, rank: int) -> int:
        """The number of the GPU of `rank` on its host."""
        return rank % self.gpus_per_node

    def is_multi_node(self) -> bool:
        return self.world_size > self.gpus_per_node

    def has_tp(self) -> bool:
        return self.tp_size > 1

    def has_cp(self) -> bool:
        return self.cp_size > 1

    def has_pp(self) -> bool:
        return self.pp_size > 1

    def has_moe_tp(self) -> bool:
        return self.moe_tp_size > 1

    def has_moe_ep(self) -> bool:
        return self.moe_ep_size > 1

    def has_moe_cluster(self) -> bool:
        return self.moe_cluster_size > 1

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def is_second_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 2

    def next_pp_rank(self) -> int:
        """The rank of the same place in the next stage; after the last comes the first."""
        return (self.rank + self._stage) % self.world_size

    def prev_pp_rank(self) -> int:
        """The rank of the same place in the stage before; before the first comes the last."""
        return (self.rank - self._stage) % self.world_size

    def pp_layers(self, num_layers: int) -> list[int]:
        """The layers of this rank's stage: neighbours; the first `num_layers % pp_size` stages have one more."""
        return self._share(num_layers, self.pp_size, self.pp_rank)

    def ep_experts(self, num_experts: int) -> list[int]:
        """The experts of this rank; raises ValueError if moe_ep_size does not divide num_experts."""
        check.multiple("num_experts", num_experts, "moe_ep_size", self.moe_ep_size)
        return self._share(num_experts, self.moe_ep_size, self.moe_ep_rank)

    @staticmethod
    def _share(total: int, parts: int, part: int) -> list[int]:
        size, longer = divmod(total, parts)
        first = part * size + min(part, longer)
        return list(range(first, first + size + (part < longer)))

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Mapping:
        """The mapping that `to_dict` gave."""
        return cls(**mapping)

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make this mapping."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
