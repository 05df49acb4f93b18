"""Ring attention: queries stay, blocks of keys and values go round (Liu et al., arXiv 2310.01889)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from flashinfer.core import check
from flashinfer.ops import merge
from flashinfer.ops.attention import options, single
from flashinfer.ops.context_parallel.agree import Facts, ranks_of

# (number of a piece of the sequence, tokens in it), in the order of a rank's rows.
Chunks = Sequence[tuple[int, int]]
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class RingPlan:
    """Who holds which tokens of the KV: chunks `[rank]`, tuples of (number, tokens); own_queries: those of this rank's.

    Made by `plan_ring`, the same for all layers of a step.
    """

    group: dist.ProcessGroup
    rank: int
    chunks: tuple[tuple[tuple[int, int], ...], ...]
    own_queries: tuple[tuple[int, int], ...]
    causal: bool

    @property
    def kv_lens(self) -> list[int]:
        """Tokens of KV on each rank."""
        return [sum(length for _, length in chunks) for chunks in self.chunks]

    def steps(self) -> list[int]:
        """The ranks whose KV this rank attends to, in the order in which it comes: its own first."""
        size = len(self.chunks)
        return [(self.rank - step) % size for step in range(size)]


def zigzag(lengths: Sequence[int], rank: int, world_size: int) -> Chunks:
    """Chunks of `rank` when a causal sequence cut in 2 * world_size pieces is dealt so that all ranks work alike.

    lengths: tokens of each piece. A rank holds pieces `rank` and `2 * world_size - 1 - rank`: one early, one late.
    """
    if len(lengths) != 2 * world_size:
        got = f"{len(lengths)} lengths"
        raise ValueError(check.problem("lengths", got, f"2 * world_size = {2 * world_size}", "Cut in so many pieces."))
    return [(piece, lengths[piece]) for piece in (rank, 2 * world_size - 1 - rank)]


def plan_ring(
    qkv: QKV, group: dist.ProcessGroup | None = None, causal: bool = False, chunks: Chunks | None = None
) -> RingPlan:
    """See that all ranks can attend together, and learn how many tokens each holds; arguments as `ring_attention`."""
    device = qkv[0].device if isinstance(qkv[0], torch.Tensor) else torch.device("cpu")
    ranks = ranks_of(group, device)
    rank = ranks.peers.rank

    def describe() -> Facts:
        q, k, v = (check.tensor(name, x, shape=(None,) * 3) for name, x in zip("qkv", qkv, strict=True))
        check.tensor("k", k, dtypes=(q.dtype,), shape=(None, None, q.shape[2]), like=("q", q))
        check.tensor("v", v, dtypes=(q.dtype,), shape=(k.shape[0], k.shape[1], None), like=("q", q))
        held = [(rank, len(k))] if chunks is None else [(int(number), int(length)) for number, length in chunks]
        if sum(length for _, length in held) != len(k) or any(length < 0 for _, length in held):
            raise ValueError(check.problem("chunks", held, f"lengths that add up to {len(k)} rows of k", "Count them."))
        if causal and len(q) != len(k):
            got = f"{len(q)} rows of q and {len(k)} of k"
            raise ValueError(check.problem("causal", got, "as many", "Give each token's q, k and v to one rank."))
        same = {"q.shape[1:]": list(q.shape[1:]), "k.shape[1:]": list(k.shape[1:]), "v.shape[1:]": list(v.shape[1:])}
        return {**same, "q.dtype": str(q.dtype), "causal": causal}, {"chunks": held}

    # Others' lengths may change while this rank's stay.
    told = ranks.agree("ring_attention", describe, always=True)
    held = tuple(tuple((number, length) for number, length in own["chunks"]) for own in told)
    numbers = [number for own in held for number, _ in own]
    if len(set(numbers)) != len(numbers):
        raise ValueError(check.problem("chunks", numbers, "each number once over all ranks", "Number the pieces."))
    own_queries = held[rank] if causal else ((0, len(qkv[0])),)
    return RingPlan(ranks.peers.group, rank, held, own_queries, causal)


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: RingPlan,
    sm_scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows of attention over the KV of all ranks; see `flashinfer.comm.ring_attention`."""
    size, own = len(plan.chunks), _Block(k, v)
    state = _State(q, v)
    blocks = [own.pack(), k.new_empty(0)]
    # While a block is attended to, it is sent on and the next one comes in: the wait is for what is longer.
    for step, holder in enumerate(plan.steps()):
        length = plan.kv_lens[holder]
        pending: list[Any] = []
        if step + 1 < size:
            blocks[1] = k.new_empty(own.size(plan.kv_lens[plan.steps()[step + 1]]))
            pending = _pass_on(blocks[0], blocks[1], plan)
        _attend(state, own.unpack(blocks[0], length), holder, plan, (sm_scale, backend))
        for work in pending:
            work.wait()
        blocks.reverse()
    return state.o, state.lse


class _Block:
    """Keys and values of one rank as one flat message: all keys, then all values."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v
        self.widths = [x.shape[1] * x.shape[2] for x in (k, v)]

    def size(self, length: int) -> int:
        """Elements of the message of `length` tokens; never none, so that every rank sends and receives."""
        return max(1, length * sum(self.widths))

    def pack(self) -> torch.Tensor:
        message = self.k.new_empty(self.size(len(self.k)))
        for part, x in zip(self.unpack(message, len(self.k)), (self.k, self.v), strict=True):
            part.copy_(x)
        return message

    def unpack(self, message: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        bounds = [length * width for width in (0, self.widths[0], sum(self.widths))]
        keys, values = message[: bounds[1]], message[bounds[1] : bounds[2]]
        return keys.view(length, *self.k.shape[1:]), values.view(length, *self.v.shape[1:])


class _State:
    """The state of attention so far; nothing yet."""

    def __init__(self, q: torch.Tensor, v: torch.Tensor) -> None:
        self.q = q
        # fp32: a sum over many ranks should not be rounded at each.
        self.sum = torch.zeros((*q.shape[:2], v.shape[2]), dtype=torch.float32, device=q.device)
        self.lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)

    @property
    def o(self) -> torch.Tensor:
        return self.sum.to(self.q.dtype)

    def add(self, rows: slice, o: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge in what `rows` see elsewhere."""
        merge.merge_pair(self.sum[rows], self.lse[rows], None, None, o.to(torch.float32), lse, None)


def _pass_on(mine: torch.Tensor, coming: torch.Tensor, plan: RingPlan) -> list[Any]:
    """Start sending `mine` to the next rank and receiving `coming` from the one before."""
    after, before = (dist.get_global_rank(plan.group, (plan.rank + step) % len(plan.chunks)) for step in (1, -1))
    ends = [(dist.isend, mine, after), (dist.irecv, coming, before)]
    return list(dist.batch_isend_irecv([dist.P2POp(kind, x, peer, plan.group) for kind, x, peer in ends]))


def _attend(
    state: _State,
    block: tuple[torch.Tensor, torch.Tensor],
    holder: int,
    plan: RingPlan,
    settings: tuple[float | None, str],
) -> None:
    """Merge in what this rank's queries see of the block that `holder` holds."""
    sm_scale, backend = settings
    first_row = 0
    for number, num_rows in plan.own_queries:
        rows = slice(first_row, first_row + num_rows)
        first_row += num_rows
        first_key = 0
        for other, num_keys in plan.chunks[holder]:
            keys = slice(first_key, first_key + num_keys)
            first_key += num_keys
            if not num_rows or not num_keys or (plan.causal and other > number):
                continue
            # A piece of earlier tokens is seen whole, the piece itself up to each row's own token.
            causal = plan.causal and other == number
            chosen = options.Options.of(state.q.shape[2], causal, -1, None, "NONE", sm_scale, (None, None))
            # Pages of one token, as the attention of single requests takes them.
            pages = [x[keys].unsqueeze(1) for x in block]
            qkv = (state.q[rows], pages[0], pages[1])
            # In q's dtype: the fastest kernels write no fp32. So each part is rounded once more than the whole.
            part = single.run(qkv, chosen, (None,) * 3, (None, None), backend, None, True)
            state.add(rows, part[0], part[1])
