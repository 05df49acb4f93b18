"""`tl` where Triton is installed, None where it is not.

Files that hold both a torch twin and kernel functions (the attention variants) take `tl` from here, so that they import
on a machine without Triton; only a kernel ever calls the functions that use it.
"""

from __future__ import annotations

from typing import Any

tl: Any
try:
    import triton.language as tl
except ImportError:
    tl = None

__all__ = ["tl"]
