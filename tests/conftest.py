"""What every test gets: Triton's interpreter where there is no GPU, fresh seeds, NaN in every `torch.empty`."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported, so before any other import
    torch.set_num_threads(1)  # the tests run side by side


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--seed N` repeats a failure: the seed of each test is printed with it."""
    parser.addoption("--seed", type=int, default=None, help="seed of every test's random inputs")


def pytest_report_header() -> str:
    where = torch.cuda.get_device_name() if HAS_GPU else "CPU, Triton through its interpreter"
    return f"flashinfer: torch {torch.__version__}, {where}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    for item in items if not HAS_GPU else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which everything was skipped has shown nothing, so it does not pass."""
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    listing_only = session.config.option.collectonly or hasattr(session.config, "workerinput")
    executed = any(reporter.stats.get(k) for k in ("passed", "failed", "error", "xfailed")) if reporter else True
    if exitstatus == pytest.ExitCode.OK and not executed and not listing_only:
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests' tensors live: the GPU if there is one."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def rng(request: pytest.FixtureRequest) -> random.Random:
    """The test's own random numbers; torch's generators are seeded alike. Fresh in every run, or `--seed`."""
    from flashinfer.testing import set_seed

    seed = set_seed(request.config.getoption("--seed"))
    print(f"repeat with: --seed {seed}")
    return random.Random(seed)


@pytest.fixture
def large_memory() -> Iterator[None]:
    """For tests that fill much of a GPU's memory: one at a time, whatever process it runs in."""
    with (Path(tempfile.gettempdir()) / "flashinfer-large-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def compiler_knows_torch(request: pytest.FixtureRequest) -> None:
    """torch.compile notes torch's functions when it is first used: they must not be the poisoned ones then."""
    if any("compile" in item.nodeid for item in request.session.items):
        torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))


@pytest.fixture(autouse=True)
def poisoned_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and its kin give NaN (the largest value for integers): what a kernel forgets to write is seen.

    Not in tests marked `compiles`: the compiler cannot look into it. Those find the compiler as new.
    """
    if request.node.get_closest_marker("compiles"):
        torch.compiler.reset()
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


def poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = allocate(*args, **kwargs)
        if x.dtype.is_floating_point and x.element_size() == 1:
            x.view(torch.uint8).fill_(0xFF)  # NaN in every 8-bit format that has one
        elif x.dtype.is_floating_point:
            x.fill_(float("nan"))
        elif x.dtype not in (torch.bool, torch.complex64, torch.complex128):
            x.fill_(torch.iinfo(x.dtype).max)
        return x

    return poisoned
