"""Running public functions on a chosen implementation."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from flashinfer.core.select import BackendSupportedError

IMPLEMENTATIONS = ("torch", "triton")


def force(monkeypatch: pytest.MonkeyPatch, op: str, backend: str) -> str:
    """Make "auto" of `flashinfer.ops.<op>` mean `backend`; what that refuses is skipped, with its reason.

    Triton runs through its interpreter where there is no GPU (tests/conftest.py sets it up).
    """
    if backend == "triton":
        pytest.importorskip("triton")
    ops = import_module(f"flashinfer.ops.{op}")
    implementation = ops._implementation

    def forced(spec: Any, place: Any, requested: str) -> Any:
        try:
            return implementation(spec, place, backend if requested == "auto" else requested)
        except BackendSupportedError as refusal:
            pytest.skip(str(refusal))

    monkeypatch.setattr(ops, "_implementation", forced)
    return backend
