"""Measuring configurations on the GPU at hand, with FlashInfer's names: `with autotune(cache="file.json"): warm_up()`.

Inside, each operation that has several configurations times them on the tensors it is called with (median of ten runs,
data not in the L2 cache) and keeps the fastest by kind, sizes and number of tokens up to the next power of two; of
grouped products by the number of rows a group, on average, and of groups.
Outside, nothing is ever measured. On the CPU, and while a CUDA graph is captured, there is nothing to measure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from functools import cache as once
from pathlib import Path

from flashinfer.core import tuning

__all__ = ["AutoTuner", "autotune", "is_in_profile_measurement"]


class AutoTuner:
    """The process's measured configurations; there is one, `AutoTuner.get()`.

    warmup, repeat, stream_delay_micro_secs: accepted; how time is taken is fixed (`core/tuning.py`).
    """

    def __init__(self, warmup: int = 3, repeat: int = 10, stream_delay_micro_secs: int = 5000) -> None:
        self.warmup, self.repeat, self.stream_delay_micro_secs = warmup, repeat, stream_delay_micro_secs

    @staticmethod
    @once
    def get() -> AutoTuner:
        """The tuner of this process."""
        return AutoTuner()

    def load_configs(self, path: str | Path) -> bool:
        """Take the configurations of a file; whether there were any. Raises ValueError for another kind of file."""
        return tuning.load(path) > 0

    def save_configs(self, path: str | Path) -> None:
        """Write all configurations to a file."""
        tuning.save(path)

    def clear_cache(self) -> None:
        """Forget all configurations."""
        tuning.forget()


@contextlib.contextmanager
def autotune(
    tune_mode: bool = True,
    cache: str | Path | None = None,
    tuning_buckets: Sequence[int] | None = None,
    round_up: bool | None = None,
    skip_ops: Collection[str] | None = None,
    cuda_graph_profile_replays: int | None = None,
) -> Iterator[None]:
    """Within, operations measure the configurations they have and keep the fastest.

    Today those are "grouped_gemm", whatever calls it, and "moe" up to 64 tokens, beyond which it is grouped products.

    tune_mode: False only uses what is known. cache: a JSON file that is read first, if it exists, and written at the
    end of a block that measures. skip_ops: names of operations that do not measure. tuning_buckets, round_up,
    cuda_graph_profile_replays: accepted; numbers of tokens are rounded up to powers of two.
    """
    if cache is not None and Path(cache).exists():
        tuning.load(cache)
    if not tune_mode:
        yield
        return
    with tuning.tuning(frozenset(skip_ops or ())):
        yield
    if cache is not None:
        tuning.save(cache)


def is_in_profile_measurement() -> bool:
    """Whether this thread is timing a configuration right now."""
    return tuning.in_measurement()
