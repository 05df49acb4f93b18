"""What a kernel tells the compile gate (`tools/compile_gate.py`); needs no Triton.

Each folder of kernels `flashinfer/ops/<op>/triton/` has a module `gate.py` with `cases() -> Iterable[GateCase]`: every
kernel of the folder in the configurations that are used, so that CI compiles them for every architecture without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

NVIDIA_ARCHS = ("sm80", "sm89", "sm90", "sm100", "sm120")
AMD_ARCHS = ("gfx942", "gfx950")
ALL_ARCHS = NVIDIA_ARCHS + AMD_ARCHS

Path = tuple[int, ...]
Signature = Mapping[str, str | tuple[Any, ...]]


@dataclass(frozen=True)
class GateCase:
    """One kernel in one configuration.

    kernel: the jitted function. signature: its arguments in order, as Triton spells types: "*bf16", "i32", "fp32",
    "constexpr", tuples of these for tuple arguments, "tensordesc<bf16[64, 128]>". constexprs: values of the constexpr
    arguments by name; those inside tuple arguments by path, (2, 0, 0) = argument 2, element 0 of element 0.
    attrs: `{path: [["tt.divisibility", 16]]}`; None = every pointer is 16-byte aligned and no integer is known to be a
    multiple of anything. options: num_warps, num_stages, ... max_spill_bytes: stores plus loads of spilled registers.
    """

    name: str
    kernel: Any
    signature: Signature
    constexprs: Mapping[str | Path, Any] = field(default_factory=dict)
    attrs: Mapping[Path, list[list[Any]]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    archs: tuple[str, ...] = ALL_ARCHS
    max_spill_bytes: int = 0

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
