"""The records of sampling: what kind of work it is (host values), and the tensors and numbers that go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

Parameter = float | torch.Tensor
Seed = int | torch.Tensor


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
