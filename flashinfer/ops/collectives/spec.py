"""The records of a collective: what kind it is (host values), and the tensors it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_reduce_fp8")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CollectiveSpec:
    """One kind of collective over rows of `cols` elements.

    kind: one of KINDS. two_shot: of an all-reduce, whether each row is added up by one rank only. weight_bias: added to
    the weight of the norm, None without one. quantised: fp8 dtype of its result, or None. group_size: elements a scale
    of what "all_reduce_fp8" sends. unreachable: why kernels cannot work on all ranks' memory, None if they can.
    """

    kind: str
    dtype: torch.dtype
    cols: int
    world_size: int
    two_shot: bool = False
    adds: bool = False
    weight_bias: float | None = None
    quantised: torch.dtype | None = None
    group_size: int = 0
    unreachable: str | None = None


class Reduce(NamedTuple):
    """The tensors of an all-reduce, contiguous, on one device; None where not asked for.

    input, total (the sum), residual (added to it), residual_out (the result), normed (RMSNorm of that with `weight`
    `[hidden_size]`): `[rows, hidden_size]` of one dtype. quantised: fp8, the norm divided by `scale`, fp32 of one
    element, None for 1; or, where `scales` fp32 `[rows]` is given, by what makes the largest of a row the largest code,
    which is written there (the largest counts as 2^-9 at least). total and normed may be input, residual_out may be
    residual.
    """

    input: torch.Tensor
    total: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    residual_out: torch.Tensor | None = None
    normed: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    quantised: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    scales: torch.Tensor | None = None


class Mix(NamedTuple):
    """How the rows that a rank reduces are made of the rows of `Reduce.input`, contiguous: sums in fp32, then rounded.

    Row i is `added[i] + scale * sum over j of factors[i, j] * input[table[i, j]]`, table int32 `[rows, num_parts]`,
    where an entry below 0 adds nothing, factors of any float dtype and of table's shape. Without table it is `added[i]
    + scale * sum over j of factors[j, i] * input[j * rows + i]`, factors `[num_parts, rows]`. None: ones, or nothing.
    """

    num_rows: int
    num_parts: int
    table: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    added: torch.Tensor | None = None
    scale: float = 1.0


# Bits of the fields of a Word, the lowest first.
WIDTHS = (4, 3, 8, 15, 31)


class Word(NamedTuple):
    """What a rank is about to do, as one number that the ranks compare: 63 bits, never 0.

    An odd number above 2^32, so that kernels are compiled for it once.
    """

    kind: int
    dtype: int
    fused: int
    cols: int
    num_elements: int

    @property
    def packed(self) -> int:
        number, shift = 1, 1
        for value, width in zip(self, WIDTHS, strict=True):
            number |= (value & ((1 << width) - 1)) << shift
            shift += width
        return number | 1 << 62

    @classmethod
    def unpacked(cls, number: int) -> Word:
        fields, number = [], number >> 1
        for width in WIDTHS:
            fields.append(number & ((1 << width) - 1))
            number >>= width
        return cls(*fields)

    def differences(self, other: Word) -> str:
        """In words, what differs, this rank's first."""
        shown = {
            "the call": lambda w: KINDS[w.kind] if w.kind < len(KINDS) else str(w.kind),
            "dtype": lambda w: str(DTYPES[w.dtype]) if w.dtype < len(DTYPES) else str(w.dtype),
            "two_shot, scale_group, or what follows the sum": lambda w: str(w.fused),
            "hidden_size": lambda w: str(w.cols),
            "number of elements": lambda w: str(w.num_elements),
        }
        pairs = zip(shown.items(), self, other, strict=True)
        return "; ".join(f"{name}: {show(self)} here, {show(other)} there" for (name, show), a, b in pairs if a != b)


def word_of(spec: CollectiveSpec, num_elements: int) -> Word:
    """What a rank says of a call over `num_elements`. How its rows are made is its own affair."""
    fused = 4 * (spec.quantised is not None) + 2 * (spec.weight_bias is not None) + spec.adds
    fused += 8 * spec.two_shot + 16 * spec.group_size.bit_length()
    return Word(KINDS.index(spec.kind), DTYPES.index(spec.dtype), fused, spec.cols, num_elements)
