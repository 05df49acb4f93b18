"""The records of sampling: what kind of work it is (host values), and the tensors and numbers that go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

Parameter = float | torch.Tensor


class Halves(NamedTuple):
    """The low and high 32 bits of a seed or offset, as signed numbers."""

    low: int
    high: int


Seed = int | Halves | torch.Tensor


def halves_of(value: int) -> Halves:
    """The halves of the low 64 bits of `value`."""
    low, high = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
    return Halves(low - (low >> 31 << 32), high - (high >> 31 << 32))


@dataclass(frozen=True)
class RowSpec:
    """Work on rows of `vocab_size` numbers of `dtype`, one for each token; k: how many are selected, 0 if none are."""

    vocab_size: int
    dtype: torch.dtype
    k: int = 0


class Filters(NamedTuple):
    """Which tokens stay. Each is None (off), a number, or a tensor `[batch_size]` with one value for each row.

    top_k: int32 or int64, at least 1. top_p, min_p: 0 to 1. joint: top_p measures the whole row, not what top_k keeps.
    min_p stands alone.
    """

    top_k: Parameter | None = None
    top_p: Parameter | None = None
    min_p: Parameter | None = None
    joint: bool = False

    @property
    def kind(self) -> str:
        """Which of them are on: "k", "p", "kp" (top_p of what top_k keeps), "joint", "min_p" or ""."""
        if self.min_p is not None:
            return "min_p"
        if self.top_p is None:
            return "" if self.top_k is None else "k"
        if self.top_k is None:
            return "p"
        return "joint" if self.joint else "kp"


class Samples(NamedTuple):
    """tokens, int32 or int64 `[num_samples]`, and bool like them or None: whether their rows had weight."""

    tokens: torch.Tensor
    valid: torch.Tensor | None


class Draws(NamedTuple):
    """Where random numbers come from, and for which rows.

    seed, offset: ints, or int64 tensors of length 1 or num_samples: Philox key and the upper half of its counter.
    indices: int32 or int64 `[num_samples]`, the row each sample is drawn from; None: one sample a row.
    """

    seed: Seed
    offset: Seed
    num_samples: int
    indices: torch.Tensor | None = None


class Tree(NamedTuple):
    """Draft trees, `[batch_size, num_nodes]` each, node 0 the root (the last token that is certain).

    tokens: the nodes' tokens. first_child, next_sibling: node numbers, -1 for none; children have higher numbers than
    their parent and tokens that differ from their siblings'.
    """

    tokens: torch.Tensor
    first_child: torch.Tensor
    next_sibling: torch.Tensor


class Selection(NamedTuple):
    """The k largest numbers of a part of each row: `[starts, starts + lengths)`, all of it without them.

    tie_break: which of equal numbers stay: 0 any, 1 those of low index, 2 those of high index.
    starts, lengths: int32 `[rows]` or None. sorted: largest first, equal ones by tie_break (low index for 0).
    index_dtype: int32 or int64.
    """

    k: int
    tie_break: int = 0
    sorted: bool = False
    starts: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    index_dtype: torch.dtype = torch.int32


class PageTable(NamedTuple):
    """Where tokens lie: `pages` int32 `[batch_size, entries]`, page_size in tokens.

    rows: the request of each row of scores, `[rows]`; None: its number. starts: first entry of each row; None: 0.
    """

    pages: torch.Tensor
    rows: torch.Tensor | None
    starts: torch.Tensor | None
    page_size: int
