"""Validators with one error style: which argument, what came, what was expected, how to mend it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
INDEX_DTYPES = (torch.int32,)
POSITION_DTYPES = (torch.int32, torch.int64)


def problem(name: str, got: object, expected: str, fix: str) -> str:
    """The one sentence shape every error of this package has."""
    return f"{name}: got {got}, expected {expected}. {fix}"


def tensor(
    name: str,
    x: Any,
    *,
    dtypes: Collection[torch.dtype] | None = None,
    shape: Sequence[int | None] | None = None,
    like: tuple[str, torch.Tensor] | None = None,
    inner_contiguous: bool = False,
) -> torch.Tensor:
    """Check that `x` is a tensor of the wanted dtype, shape (None = any size) and device; return it.

    `like` names another tensor whose device `x` must share. `inner_contiguous` asks for innermost stride 1.
    Raises TypeError for a non-tensor, ValueError for everything else.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(problem(name, type(x).__name__, "a torch.Tensor", "Wrap it with torch.as_tensor(...)."))
    if dtypes is not None and x.dtype not in dtypes:
        names = " or ".join(str(d) for d in dtypes)
        raise ValueError(problem(name, f"dtype {x.dtype}", names, f"Convert with {name}.to(...)."))
    if shape is not None:
        _shape(name, x, shape)
    if like is not None and x.device != like[1].device:
        raise ValueError(
            problem(
                name,
                f"a tensor on {x.device} while {like[0]} is on {like[1].device}",
                "both on one device",
                f"Move it with {name}.to({like[0]}.device).",
            )
        )
    if inner_contiguous and x.dim() > 0 and x.numel() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            problem(
                name,
                f"strides {tuple(x.stride())}",
                "innermost stride must be 1",
                f"Transpose back or call {name}.contiguous().",
            )
        )
    return x


def contiguous(**tensors: torch.Tensor | None) -> None:
    """Check that tensors, those that are given, have no gaps and their last dimension innermost."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            got = f"strides {tuple(x.stride())} of shape {list(x.shape)}"
            raise ValueError(problem(name, got, "a contiguous tensor", f"Call {name}.contiguous()."))


def _shape(name: str, x: torch.Tensor, shape: Sequence[int | None]) -> None:
    if x.dim() == len(shape) and all(s is None or s == n for s, n in zip(shape, x.shape, strict=True)):
        return
    want = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
    if x.dim() != len(shape):
        raise ValueError(
            problem(
                name, f"{x.dim()} dimensions {list(x.shape)}", f"{len(shape)} dimensions {want}", "Reshape or index it."
            )
        )
    raise ValueError(problem(name, f"shape {list(x.shape)}", f"shape {want}", "Pass a tensor of that shape."))


def scalar(name: str, x: Any, like: tuple[str, torch.Tensor]) -> torch.Tensor:
    """Check that `x` is an fp32 tensor of one element on the device of `like`; return it. Always a ValueError."""
    if not isinstance(x, torch.Tensor) or x.numel() != 1:
        got = f"shape {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        fix = f"Pass torch.tensor([...], device={like[0]}.device)."
        raise ValueError(problem(name, got, "a tensor of one element", fix))
    return tensor(name, x, dtypes=(torch.float32,), like=like)


def choice(name: str, value: Any, allowed: Collection[Any], error: type[Exception] = ValueError) -> Any:
    """Check that `value` is one of `allowed`; return it."""
    if value not in allowed:
        options = ", ".join(repr(a) for a in allowed)
        raise error(problem(name, repr(value), f"one of {options}", f"Pass one of these as {name}."))
    return value


def positive(name: str, value: int) -> int:
    """Check that `value` is an int of at least 1; return it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(problem(name, repr(value), "an int of at least 1", f"Pass a positive {name}."))
    return value


def multiple(name: str, value: int, of: str, base: int) -> None:
    """Check that `value` (named `name`) is a multiple of `base` (named `of`)."""
    if base <= 0 or value % base != 0:
        raise ValueError(
            problem(name, f"{value} with {of} {base}", f"a multiple of {of}", f"Check {name} against {of}.")
        )


def head_dim(name: str, value: int) -> int:
    """Check a head dimension: a multiple of 8, from 8 to 512; return it."""
    if isinstance(value, bool) or not isinstance(value, int) or not 8 <= value <= 512 or value % 8:
        raise ValueError(problem(name, repr(value), "a multiple of 8 from 8 to 512", "Pad the heads to such a size."))
    return value


def dtype(name: str, value: torch.dtype | str) -> torch.dtype:
    """Turn a torch dtype or its name ("float16", "torch.bfloat16") into the torch dtype."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        raise ValueError(
            problem(name, repr(value), 'a torch dtype or its name, like "float16"', "Spell a torch dtype.")
        )
    return found


def index_range(name: str, x: torch.Tensor, low: int, high: int) -> None:
    """Check that every entry of a CPU tensor is in `[low, high)`.

    Tensors on other devices are not read: that would wait for the device.
    """
    if x.is_cpu and x.numel() > 0:
        smallest, largest = (int(bound) for bound in torch.aminmax(x))
        if smallest < low or largest >= high:
            raise ValueError(
                problem(
                    name, f"values from {smallest} to {largest}", f"values in [{low}, {high})", f"Correct the {name}."
                )
            )


def indptr(name: str, x: torch.Tensor, total: int | None = None) -> None:
    """Check that a CPU tensor holds prefix sums: it starts at 0, never falls and, if given, ends at `total`.

    Tensors on other devices are only checked for their length: reading them would wait for the device.
    """
    if x.dim() != 1 or x.numel() == 0:
        raise ValueError(problem(name, f"shape {list(x.shape)}", "[batch_size + 1]", "Pass prefix sums."))
    if not x.is_cpu:
        return
    if int(x[0]) != 0 or bool((x.diff() < 0).any()):
        raise ValueError(
            problem(name, "values that do not rise from 0", "prefix sums of lengths", f"Build {name} with cumsum.")
        )
    if total is not None and int(x[-1]) != total:
        raise ValueError(problem(name, f"last value {int(x[-1])}", f"{total}", f"Make {name} cover all rows."))


def unknown_keywords(function: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise TypeError for keywords that `function` does not have."""
    for name in given:
        if name not in known:
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}, expected of {', '.join(known)}."
            )
