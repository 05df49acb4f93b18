"""A kernel that does nothing: what a launch alone takes on the GPU. Imported only where there is one."""

from __future__ import annotations

import triton


@triton.jit
def _empty_kernel():
    pass


def launch() -> None:
    """One program of the kernel."""
    _empty_kernel[(1,)]()
