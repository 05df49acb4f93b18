"""What a kernel tells the compile gate (`tools/compile_gate.py`); needs no Triton.

Each folder of kernels `flashinfer/ops/<op>/triton/`, or `gluon_smXX/`, has a module `gate.py` with `cases() ->
Iterable[GateCase]`: every kernel of the folder in the configurations that are used, so that CI compiles them for every
architecture without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from flashinfer.core.arch import Arch

NVIDIA_ARCHS = ("sm80", "sm89", "sm90", "sm100", "sm120")
AMD_ARCHS = ("gfx942", "gfx950")
ALL_ARCHS = NVIDIA_ARCHS + AMD_ARCHS
# What converts to fp8 by itself, and what does not (`Arch.converts_to_fp8`).
FP8_ARCHS = tuple(arch for arch in ALL_ARCHS if Arch(arch, 0, 0).converts_to_fp8)
OTHER_ARCHS = tuple(arch for arch in ALL_ARCHS if arch not in FP8_ARCHS)
# How Triton spells the dtypes of kernels; fp8 is bytes to most of them.
SPELLED = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.float8_e4m3fn: "u8",
    torch.float8_e5m2: "u8",
}

Path = tuple[int, ...]
Signature = Mapping[str, str | tuple[Any, ...]]


@dataclass(frozen=True)
class GateCase:
    """One kernel in one configuration.

    kernel: the jitted function. signature: its arguments in order, as Triton spells types: "*bf16", "i32", "fp32",
    "constexpr", tuples of these for tuple arguments, "tensordesc<bf16[64, 128]>". constexprs: values of the constexpr
    arguments by name; those inside tuple arguments by path, (2, 0, 0) = argument 2, element 0 of element 0.
    attrs: `{path: [["tt.divisibility", 16]]}`; None = every pointer is 16-byte aligned and no integer is known to be a
    multiple of anything. options: num_warps, num_stages, ... max_spill_bytes: stores plus loads of spilled registers;
    None: any number of them, but none in a loop that multiplies matrices (NVIDIA only).
    """

    name: str
    kernel: Any
    signature: Signature
    constexprs: Mapping[str | Path, Any] = field(default_factory=dict)
    attrs: Mapping[Path, list[list[Any]]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    archs: tuple[str, ...] = ALL_ARCHS
    max_spill_bytes: int | None = 0

    def resolved_attrs(self) -> dict[Path, list[list[Any]]]:
        """`attrs`, or the default written out."""
        if self.attrs is not None:
            return dict(self.attrs)
        types = tuple(self.signature.values())
        return {path: [["tt.divisibility", 16]] for path in _pointers(types, ())}


def _pointers(types: tuple[Any, ...], prefix: Path) -> Iterator[Path]:
    for i, kind in enumerate(types):
        if isinstance(kind, tuple):
            yield from _pointers(kind, (*prefix, i))
        elif kind.startswith("*"):
            yield (*prefix, i)


POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Constant(NamedTuple):
    """A constexpr argument of `case_of`."""

    value: Any


class Typed(NamedTuple):
    """An argument of `case_of` whose type is written out."""

    kind: str


def tensor_map(dtype: torch.dtype, box: Sequence[int], layout: object = None) -> Typed:
    """A tensor map, for `case_of`; layout: of the box in shared memory, which Gluon wants to know."""
    end = "" if layout is None else f",{layout!r}"
    return Typed(f"tensordesc<{POINTERS[dtype][1:]}{list(box)}{end}>")


def case_of(name: str, kernel: Any, arguments: Mapping[str, Any], **fields: Any) -> GateCase:
    """The case of a launch with these arguments: empty tensors stand for pointers, numbers for numbers of their kind.

    Tuples nest; ints other than 1 are run-time arguments, multiples of 16 known as such. fields: of `GateCase`.
    """
    constexprs: dict[Any, Any] = {}
    attrs: dict[Path, list[list[Any]]] = {}

    def kind(value: Any, path: Path) -> Any:
        """The Triton type of an argument as a launch would see it; notes constants and alignment on the way."""
        if isinstance(value, Typed):
            return value.kind
        if isinstance(value, tuple) and not isinstance(value, Constant):
            kinds = [kind(v, (*path, i)) for i, v in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if isinstance(value, torch.Tensor):
            attrs[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, int) and value != 1:
            if value and value % 16 == 0:
                attrs[path] = [["tt.divisibility", 16]]
            return "i32"
        constexprs[path] = value.value if isinstance(value, Constant) else value
        return "constexpr"

    signature = {key: kind(value, (i,)) for i, (key, value) in enumerate(arguments.items())}
    return GateCase(name, kernel, signature, constexprs, attrs, **fields)
