"""Variants inside kernels: tuples of (compiled function, captured values), folded at compile time."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.core.launch import alignment
from flashinfer.ops.attention.device.arguments import LOG2_E
from flashinfer.ops.attention.variant import Variant


class Hook(NamedTuple):
    """One function of a variant and the values it captured; Triton keys the function by its source.

    unit: (inner, outer) of a logits hook that has them (see `variant.Part`), else (). bounds: of the same part.
    """

    fn: tl.constexpr
    captured: tuple[Any, ...]
    unit: tuple[float, ...]
    bounds: tl.constexpr


class Hooks(NamedTuple):
    """All hooks of a composition, each a tuple of `Hook`."""

    query: tuple[Hook, ...]
    key: tuple[Hook, ...]
    logits: tuple[Hook, ...]
    mask: tuple[Hook, ...]
    bounds: tuple[Hook, ...]


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    if hasattr(function, "fn"):
        return function
    # Triton's interpreter wants the module visible from every function, also from one of plain arithmetic.
    function.__globals__.setdefault("tl", tl)
    return triton.jit(function)


def _nothing_known(captured, q_lo, q_hi, qo_len, kv_len):
    """The bounds of a part without: the mask may be False anywhere."""
    return 0, kv_len, 0, 0


def _hooks(variant: Variant, hook: str) -> tuple[Hook, ...]:
    return tuple(
        Hook(
            _compiled(getattr(part, hook)),
            part.captured,
            part.unit if hook == "logits" and part.unit else (),
            _compiled(part.bounds or _nothing_known),
        )
        for part in variant.having(hook)
    )


def hooks_of(variant: Variant) -> Hooks:
    """The kernel argument of a variant."""
    return Hooks(*(_hooks(variant, name) for name in Hooks._fields))


class Traits(NamedTuple):
    """What a configuration depends on of a variant.

    logits, key, masks: whether such hooks exist. masks_have_bounds: whether the bounds say where every mask is True
    throughout; only then can a tile skip its mask. limit: of the size of logits, in natural units;
    inf where none is known.
    """

    logits: bool
    key: bool
    masks: bool
    masks_have_bounds: bool
    limit: float


def traits_of(variant: Variant) -> Traits:
    unbounded = any(part.mask is not None and part.bounds is None for part in variant.parts)
    logits, key, masks = (bool(variant.having(hook)) for hook in ("logits", "key", "mask"))
    last = variant.having("logits")[-1:]
    limit = last[0].limit if last and last[0].limit is not None else math.inf
    return Traits(logits, key, masks, not unbounded, limit)


def launch_key(variant: Variant) -> tuple[Any, ...]:
    """What a kernel compiled with this variant depends on: functions, numbers, kinds and alignment of tensors."""
    return tuple(
        (
            part.name,
            part.unit is None,
            part.logits,
            part.mask,
            part.bounds,
            part.key,
            part.query,
            *map(_kind, part.captured),
        )
        for part in variant.parts
    )


def _kind(value: Any) -> Any:
    return (value.dtype, alignment(value)) if isinstance(value, torch.Tensor) else (type(value), value)


@triton.jit
def fold_rotation(hooks, x, partner, pos, dims, HEAD_DIM: tl.constexpr):
    for i in tl.static_range(len(hooks)):
        x = hooks[i].fn(hooks[i].captured, x, partner, pos, dims, HEAD_DIM)
    return x


@triton.jit
def fold_logits(hooks, x, scale, at):
    """Products times `scale` through all hooks, but for the last one's outer factor, left to `exponent_factor`.

    The factors around and between hooks are multiplied up first, into one for each element.
    """
    factor = scale
    for i in tl.static_range(len(hooks)):
        if len(hooks[i].unit) > 0:
            x = hooks[i].fn(hooks[i].captured, x * (factor * hooks[i].unit[0]), at)
            factor = hooks[i].unit[1]
        else:
            x = hooks[i].fn(hooks[i].captured, x * factor, at)
            factor = 1.0
    if len(hooks) == 0:
        x = x * scale
    return x


@triton.jit
def exponent_factor(hooks, scale, NATURAL: tl.constexpr):
    """What turns the loop's logits into base-2 exponents: plain products leave their scale to this one factor."""
    if NATURAL:
        factor = LOG2_E + 0.0
        if len(hooks) > 0:
            if len(hooks[len(hooks) - 1].unit) > 0:
                factor = LOG2_E * hooks[len(hooks) - 1].unit[1]
    else:
        factor = scale * LOG2_E
    return factor


@triton.jit
def fold_mask(hooks, keep, at):
    for i in tl.static_range(len(hooks)):
        keep = keep & hooks[i].fn(hooks[i].captured, at)
    return keep


@triton.jit
def fold_bounds(hooks, q_lo, q_hi, qo_len, kv_len, FULL: tl.constexpr):
    """`clamped_bounds` of the variant; FULL: whether every mask has bounds."""
    lo = kv_len * 0
    hi = kv_len
    full_lo = kv_len * 0
    full_hi = kv_len if FULL else kv_len * 0
    for i in tl.static_range(len(hooks)):
        a, b, c, d = hooks[i].fn(hooks[i].captured, q_lo, q_hi, qo_len, kv_len)
        lo = tl.maximum(lo, a)
        hi = tl.minimum(hi, b)
        full_lo = tl.maximum(full_lo, c)
        full_hi = tl.minimum(full_hi, d)
    lo = tl.minimum(lo, kv_len)
    return lo, tl.maximum(hi, lo), full_lo, tl.maximum(full_hi, full_lo)
