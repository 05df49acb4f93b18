"""Tensors as rows of their last dimension: what the host tells a kernel that works row by row."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache

from flashinfer.core.launch import integer_classes


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Rows of several tensors that differ in shape in the last dimension only, numbered alike.

    Row r of a tensor begins `r // num_inner * outer + r % num_inner * inner` elements after its first, (outer, inner)
    being its pair in `strides`. flat: in every tensor that is `r * inner`. key: what a compiled form may depend on of
    the strides. Compared by identity: `row_layout` gives one object for the same arguments, so it hashes at no cost.
    """

    num_rows: int
    num_inner: int
    strides: tuple[tuple[int, int], ...]
    flat: bool
    key: Hashable


@lru_cache(maxsize=4096)
def row_layout(shape: tuple[int, ...], *strides: tuple[int, ...]) -> RowLayout:
    """The layout of tensors `[..., width]` with the leading dimensions of `shape`; strides: of each tensor.

    More than two leading dimensions must lie one behind the other. Strides of a dimension of size 1 count as they are,
    so that one token takes the same kernel as many.
    """
    lead = shape[:-1]
    num_rows = math.prod(lead)
    flat = all(s[i] == s[i + 1] * lead[i + 1] for s in strides for i in range(len(lead) - 1))
    assert flat or len(lead) == 2, f"rows of shape {shape}, strides {strides}"
    num_inner = 1 if flat else lead[1]
    pairs = tuple((0 if flat else s[0], s[-2] if lead else 0) for s in strides)
    return RowLayout(num_rows, num_inner, pairs, flat, (flat, tuple(map(integer_classes, pairs))))
