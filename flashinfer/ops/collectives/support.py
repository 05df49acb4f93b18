"""Which implementation runs which collective: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

from flashinfer.core.arch import Arch
from flashinfer.core.select import triton_missing
from flashinfer.ops.collectives.plan import FP8_COLS
from flashinfer.ops.collectives.spec import DTYPES, CollectiveSpec

MAX_COLS, MAX_RANKS = 16384, 16


def torch_supports(spec: CollectiveSpec, arch: Arch) -> str | None:
    """torch.distributed runs everything, on any backend and any number of hosts."""
    return None


def triton_supports(spec: CollectiveSpec, arch: Arch) -> str | None:
    """Kernels write to the other ranks' memory, and a program holds a row in registers."""
    missing = triton_missing(arch) or spec.unreachable
    if missing is not None:
        return missing
    if spec.world_size < 2:
        return "one rank has nobody to send to"
    if spec.world_size > MAX_RANKS:
        return f"each of more than {MAX_RANKS} ranks would send to all others"
    if spec.dtype not in DTYPES:
        return f"sums of {spec.dtype} are not written"
    if spec.group_size and FP8_COLS % spec.group_size:
        return f"rows of {FP8_COLS} elements hold no whole number of groups of {spec.group_size}"
    if spec.group_size & (spec.group_size - 1):
        return f"groups of {spec.group_size} elements, no power of two, do not fill a tile"
    if spec.cols > MAX_COLS:
        return f"a row of more than {MAX_COLS} elements does not fit in the registers of one program"
    return None
