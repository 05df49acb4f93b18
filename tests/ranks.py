"""Several ranks for a test: processes of one gloo or NCCL group on this machine."""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_run, args=(rank, function, world_size, folder, device, seed, args))
            for rank in range(world_size)
        ]
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
