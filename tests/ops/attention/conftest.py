"""Backends and dtypes the attention tests run over; seeds and poisoning come from `tests/conftest.py`."""

from __future__ import annotations

import pytest

from .common import ALL_DTYPES, BACKENDS, ON_GPU, Dtypes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: what runs here. `dtypes`: on a GPU one after another, on a CPU any of them."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)
    if "dtypes" in metafunc.fixturenames:
        each = [pytest.param(Dtypes((d,)), id=str(d).removeprefix("torch.")) for d in ALL_DTYPES]
        metafunc.parametrize("dtypes", each if ON_GPU else [pytest.param(Dtypes(ALL_DTYPES), id="any")])
