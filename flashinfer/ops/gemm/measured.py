"""Tiles that `autotune` measured: what those of grouped products are filed under, and how they are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

import torch

from flashinfer.core import tuning
from flashinfer.core.arch import Arch
from flashinfer.ops.gemm.spec import GemmSpec

OP = "grouped_gemm"
# Of a spec, what is named in a key where it is so, and where it is not.
SAID, DENIED = ("gathered", "indexed", "transposed", "gated"), ("row_map", "weight_map", "out_map")

Tile = TypeVar("Tile", bound=tuple[int, ...])


class Size(NamedTuple):
    """Of products that share a tile: rows a group, about, and groups, both rounded up to powers of two."""

    rows: int
    groups: int


def size_of(num_rows: int, num_groups: int) -> Size:
    """Of about `num_rows` rows of all groups together."""
    rows = -(-num_rows // num_groups)
    return Size(1 << (rows - 1).bit_length(), 1 << (num_groups - 1).bit_length())


def tuning_key(backend: str, spec: GemmSpec, size: Size) -> str:
    """What the speed of a tile depends on, less bias, row weights and activations of single numbers."""
    dtypes = (spec.row_dtype, spec.weight_dtype, spec.out_dtype)
    scales = [f"scales{spec.scale_rows}x{spec.scale_cols}"] if spec.scale_cols else []
    kind = "_".join([spec.kind, *(str(x).removeprefix("torch.") for x in dtypes), *scales])
    said = [name for name in SAID if getattr(spec, name)]
    denied = [f"no_{name}" for name in DENIED if not getattr(spec, name)]
    form = "_".join([spec.layout, *said, *denied])
    return f"{OP}/{backend}/{kind}/{spec.n}x{spec.k}/{form}/r{size.rows}_g{size.groups}"


def measuring(device: torch.device) -> bool:
    """Whether a product on this device is to be measured before it is run."""
    return tuning.measuring(OP, device)


def measure(
    arch: Arch,
    device: torch.device,
    key: str,
    candidates: Sequence[Tile],
    imposed: Callable[[Tile], AbstractContextManager[None]],
    run: Callable[[], object],
) -> None:
    """Keep the fastest tile for `key`. imposed: within, `run` gets a tile; it may write the same result many times."""

    def run_with(tile: Tile) -> None:
        with imposed(tile):
            run()

    tuning.measure(key, arch, device, candidates, run_with)
