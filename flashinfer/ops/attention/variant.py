"""What a variant is: hooks over tiles of logical positions and natural-unit logits, a torch twin, and bounds.

A hook is a plain Python function that Triton compiles as a part of the attention kernel:

    query(captured, x, partner, pos, dims, HEAD_DIM)   x [rows, dims] fp32, partner: x at (dims + HEAD_DIM/2) % HEAD_DIM
    key(captured, x, partner, pos, dims, HEAD_DIM)
    logits(captured, x, at) -> x                       x = q . k * sm_scale, natural units, fp32
    mask(captured, at) -> bool tile                    True = keep
    bounds(captured, q_lo, q_hi, qo_len, kv_len) -> (lo, hi, full_lo, full_hi)

`captured` is the tuple of tensors (pointers inside a kernel) and scalars given with the hooks. `at` is an `At`; its
index fields broadcast to the logits tile. `bounds` speaks of the queries q_lo .. q_hi-1 of a request: outside of the
tokens [lo, hi) the mask is False for all of them, inside of [full_lo, full_hi) it is True for all of them; values past
0 or kv_len are clamped by the caller. It is plain integer arithmetic (no tl, no torch): kernels, the planner and its
numpy twin all call it.

The torch twins have the same signatures on torch tensors; they are the meaning of the variant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class At(NamedTuple):
    """Where a tile of logits lies; integer tensors that broadcast against it.

    request: index in the batch. qo_idx: row in the request. kv_idx: token in the request. qo_head: query head.
    qo_len, kv_len: lengths of the request, in tokens. The query `qo_idx` stands at position kv_len - qo_len + qo_idx.
    """

    request: Any
    qo_idx: Any
    kv_idx: Any
    qo_head: Any
    qo_len: Any
    kv_len: Any


@dataclass(frozen=True)
class Twin:
    """The torch functions that say what the hooks mean; each optional, same signatures as the hooks.

    rotate(captured, x [tokens, heads, head_dim], pos [tokens]) stands for the query and the key hook.
    """

    rotate: Callable[..., Any] | None = None
    logits: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Part:
    """One named variant; see the module's docstring for the hooks. `captured`: tensors and Python numbers.

    unit: (inner, outer), both > 0: the logits hook is given x * inner and returns logits / outer. Kernels merge these
    factors with those that they multiply with anyway. The twin knows nothing of it.
    limit: what the logits hook returns (times outer) lies in [-limit, limit], or is NaN. Kernels may then do without a
    running maximum; a hook that breaks its promise overflows there, and so do values (V) past 2^26 beside large logits.
    """

    name: str
    twin: Twin
    captured: tuple[Any, ...] = ()
    query: Callable[..., Any] | None = None
    key: Callable[..., Any] | None = None
    logits: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    bounds: Callable[..., Any] | None = None
    unit: tuple[float, float] | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Variant:
    """A composition of parts: masks AND, logits transforms in order, bounds intersect. `a & b` composes."""

    parts: tuple[Part, ...] = ()

    def __and__(self, other: Variant) -> Variant:
        return Variant(self.parts + other.parts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    def having(self, hook: str) -> tuple[Part, ...]:
        """The parts that define `hook` ("query", "key", "logits", "mask" or "bounds")."""
        return tuple(part for part in self.parts if getattr(part, hook) is not None)


def variant(
    name: str,
    *,
    captured: tuple[Any, ...] = (),
    twin: Twin | None = None,
    unit: tuple[float, float] | None = None,
    limit: float | None = None,
    **hooks: Callable[..., Any],
) -> Variant:
    """A variant of one part: `variant("mine", captured=(t, 2.0), logits=hook, twin=Twin(logits=torch_function))`."""
    return Variant((Part(name, twin or Twin(), captured, unit=unit, limit=limit, **hooks),))


def clamped_bounds(variant: Variant, q_lo: Any, q_hi: Any, qo_len: Any, kv_len: Any, maximum: Any, minimum: Any) -> Any:
    """The intersection of all parts' bounds, inside [0, kv_len]; works on ints and on numpy arrays alike.

    maximum, minimum: the pairwise functions for the type at hand (`max`/`min`, or numpy's).
    Returns (lo, hi, full_lo, full_hi) with lo <= hi; the full range is empty when a mask gives no bounds.
    """
    lo, hi, full_lo, full_hi = 0 * kv_len, kv_len, 0 * kv_len, kv_len
    for part in variant.parts:
        if part.bounds is not None:
            a, b, c, d = part.bounds(part.captured, q_lo, q_hi, qo_len, kv_len)
            lo, hi, full_lo, full_hi = maximum(lo, a), minimum(hi, b), maximum(full_lo, c), minimum(full_hi, d)
        elif part.mask is not None:
            full_hi = 0 * kv_len
    lo = minimum(lo, kv_len)
    return lo, maximum(hi, lo), full_lo, maximum(full_hi, full_lo)
