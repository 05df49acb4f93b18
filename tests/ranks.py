"""Several ranks for a test: processes of one gloo or NCCL group on this machine."""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

# Seconds that a test's group of ranks may take; a hang is a failure, not a stuck test run.
LIMIT = 120.0


class RankError(AssertionError):
    """A rank raised or died; the message holds its traceback or its exit code."""


def _run(
    rank: int, function: Callable[..., Any], world_size: int, folder: str, device: str, seed: int, args: Any
) -> None:
    torch.set_num_threads(1)
    from flashinfer.testing import set_seed

    set_seed(seed)
    timeout = datetime.timedelta(seconds=LIMIT)
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    store = dist.FileStore(f"{folder}/store", world_size)
    result: Any
    try:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        result = (True, function(rank, world_size, where, *args))
    except BaseException as error:
        result = (False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    Path(folder, f"{rank}").write_bytes(pickle.dumps(result))
    # A rank that failed must not wait for those that hang.
    os._exit(0 if result[0] else 1)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, `torch.empty` and its kin give NaN, as in tests of one process."""
    from tests.conftest import poisoning

    with ExitStack() as patches:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patches.enter_context(mock.patch.object(owner, name, poisoning(getattr(owner, name))))
        yield


def two_gpus() -> int:
    """2, where there are as many GPUs; the test is skipped elsewhere."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return 2


def skip_interpreter(backend: str) -> None:
    """Kernels of ranks on a CPU are tested where there is no GPU: elsewhere on GPUs."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("kernels run on the GPUs of this machine")


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, device: str = "cpu", seed: int = 0, limit: float = LIMIT
) -> list[Any]:
    """What `function(rank, world_size, device, *args)` returned on each rank, of a module's top level; args pickle.

    seed: of each rank's generators, the same. Returns an Exception's text as `RankError` in place of a rank that
    raised only through `outcomes`; here the first failing rank is raised.
    """
    results = outcomes(function, world_size, *args, device=device, seed=seed, limit=limit)
    for rank, result in enumerate(results):
        if isinstance(result, RankError):
            raise RankError(f"rank {rank}: {result}")
    return results


def outcomes(
    function: Callable[..., Any], world_size: int, *args: Any, device: str = "cpu", seed: int = 0, limit: float = LIMIT
) -> list[Any]:
    """What each rank returned, or the RankError that it ended with: for tests of what goes wrong."""
    context = multiprocessing.get_context("spawn")
    # A CPU's ranks see no GPU, so that all machines run them alike.
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if device == "cpu" else {}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_run, args=(rank, function, world_size, folder, device, seed, args))
            for rank in range(world_size)
        ]
        with mock.patch.dict(os.environ, hidden):
            for process in ranks:
                process.start()
        end = datetime.datetime.now() + datetime.timedelta(seconds=limit)
        for process in ranks:
            process.join(max(0.0, (end - datetime.datetime.now()).total_seconds()))
        results = []
        for rank, process in enumerate(ranks):
            hung = process.is_alive()
            if hung:
                process.kill()
                process.join()
            path = Path(folder, f"{rank}")
            if path.exists():
                ok, value = pickle.loads(path.read_bytes())
                results.append(value if ok else RankError(value))
            else:
                results.append(RankError(f"hung for {limit} s" if hung else f"died with exit code {process.exitcode}"))
        return results
