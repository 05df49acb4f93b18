"""Prebound launches: a kernel's compiled form, called directly once it is known.

`kernel[grid](...)` binds and specialises every argument anew: 174 us for the attention kernel's nested tuples (host of
the H200 machine, 2026-11-21). Here the caller names everything that the compiled form depends on in a key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

import torch
import triton
from triton import knobs

from flashinfer.core import replay

# Versions whose CompiledKernel.run has the argument order used below; others take the public route of a compiled
# kernel.
DIRECT_VERSIONS = ("3.6",)


class Prebound:
    """Launches one kernel.

    `launcher(grid, key, args, device, num_warps=...)`: args in the kernel's order, constexprs included. key: everything
    the compiled form depends on besides the device - dtypes, which arguments are None, the values of integers and
    constexprs, options, and which pointers are aligned to 16 bytes (`alignment`).
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Hashable, int], Any] = {}
        self._direct = triton.__version__.rpartition(".")[0] in DIRECT_VERSIONS

    def __call__(
        self, grid: tuple[int, int, int], key: Hashable, args: tuple[Any, ...], device: torch.device, **options: Any
    ) -> None:
        if device.type != "cuda":
            self.kernel[grid](*args, **options)
            return
        index = device.index if device.index is not None else torch.cuda.current_device()
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self(grid, key, args, device, **options)
        compiled = self._compiled.get((key, index))
        if compiled is None:
            compiled = self._compiled[key, index] = self.kernel[grid](*args, **options)
        elif self._direct and not hooked():
            stream = triton.runtime.driver.active.get_current_stream(index)
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
        else:
            compiled[grid](*args)
        if replay.recording.tensors is not None:
            replay.recording.launches.append(again(compiled, grid, args, index, self._direct))


def hooked() -> bool:
    """Whether something wants to know of launches, a profiler for instance."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def again(
    compiled: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], index: int, direct: bool
) -> replay.Repeat | None:
    """The same launch for other addresses of the tensors of the call that is recorded, None if it cannot be repeated.

    Addresses go to the driver as integers, which spares asking it about each pointer.
    """
    assert replay.recording.tensors is not None
    try:
        template = replay.Template(replay.recording.tensors, arguments)
    except LookupError:
        return None
    fill = template.fill
    several = torch.cuda.device_count() > 1
    public = compiled[grid]
    launch = _direct_launch(compiled, grid, index) if direct else public

    def launch_again(addresses: list[int]) -> None:
        run = public if hooked() else launch
        if several and torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                run(*fill(addresses))
        else:
            run(*fill(addresses))

    return replay.Repeat(template.shared, launch_again)


def _direct_launch(compiled: Any, grid: tuple[int, int, int], index: int) -> Callable[..., None]:
    """A function of the kernel's arguments, for the versions that `Prebound` knows.

    The launcher's own `__call__` only allocates scratch before it calls `launch`; without scratch that is left out.
    """
    run = compiled.run
    stream_of = triton.runtime.driver.active.get_current_stream
    tail: tuple[Any, ...] = (compiled.packed_metadata, None, None, None)
    function, (x, y, z) = run, grid
    if not (run.global_scratch_size or run.profile_scratch_size):
        function, tail = run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None, *tail)
    tail = (compiled.function, *tail)

    def launch(*arguments: Any) -> None:
        function(x, y, z, stream_of(index), *tail, *arguments)

    return launch


@lru_cache(maxsize=4096)
def token(*parts: Hashable) -> object:
    """One object for equal `parts`: a part of a key that hashes and compares by identity, which is quicker."""
    return object()


def alignment(*tensors: torch.Tensor | None) -> int:
    """One bit a tensor: whether it begins on 16 bytes, which Triton specialises pointers for."""
    bits = 0
    for tensor in tensors:
        bits = bits << 1 | (tensor is not None and tensor.data_ptr() & 15 == 0)
    return bits


def pointers(*tensors: torch.Tensor | None) -> Hashable:
    """What Triton specialises pointers for: which tensors there are, of what dtype, and which are aligned."""
    return tuple(None if x is None else x.dtype for x in tensors), alignment(*tensors)


@lru_cache(maxsize=4096)
def integer_classes(integers: tuple[int, ...]) -> tuple[tuple[bool, bool, bool], ...]:
    """What Triton specialises integers for; the values themselves would make a new key for every number of tokens."""
    return tuple((n == 1, n % 16 == 0, n >= 2**31) for n in integers)
