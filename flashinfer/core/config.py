"""The only reader of environment variables: typed, documented, a bad value is an error."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Config:
    """Settings read once from the environment; none of them changes a result.

    triton_interpret: `TRITON_INTERPRET`, Triton's own switch: kernels run on CPU tensors through its interpreter.
    """

    triton_interpret: bool


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0").strip().lower()
    if value in ("", "0", "false", "off", "no"):
        return False
    if value in ("1", "true", "on", "yes"):
        return True
    raise ValueError(f"environment variable {name}: got {value!r}, expected 0 or 1. Unset it or set it to 0 or 1.")


@cache
def config() -> Config:
    """The process-wide settings, read at first use."""
    return Config(triton_interpret=_flag("TRITON_INTERPRET"))
