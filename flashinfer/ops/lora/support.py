"""Which implementation runs adapters' products: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

from flashinfer.core.arch import Arch
from flashinfer.core.select import triton_missing


def torch_supports(spec: None, arch: Arch) -> str | None:
    """Python follows addresses in the host's memory only."""
    return None if arch.is_cpu else "torch cannot follow addresses on a GPU"


def triton_supports(spec: None, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter."""
    return triton_missing(arch)
