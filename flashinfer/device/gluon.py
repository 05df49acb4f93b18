"""Gluon under one set of names: what Triton renamed between 3.6 and the newest, in one place."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.language.extra import cuda

jit = gluon.jit
aggregate: Any = getattr(gluon, "aggregate", None) or tl.core._aggregate
# Runs in Python, at compile time: constexpr_functions of aggregates, layouts.
constexpr_function = gluon.constexpr_function
mbarrier = hopper.mbarrier
# Copies by threads, and the arrival at an mbarrier of those that came before.
copy_load: Any = getattr(ampere.async_copy, "async_load", None) or ampere.async_copy.async_copy_global_to_shared
copy_arrive = ampere.async_copy.mbarrier_arrive
fence_async_shared = hopper.fence_async_shared
warpgroup_mma = hopper.warpgroup_mma
warpgroup_mma_wait = hopper.warpgroup_mma_wait
tma_load: Any = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
tma_store: Any = getattr(hopper.tma, "async_store", None) or hopper.tma.async_copy_shared_to_global
tma_store_wait = hopper.tma.store_wait
# (memory, dtype, shape, layout): the same shared memory under another shape and layout.
_descriptor: Any = gl.shared_memory_descriptor
reinterpret: Any = getattr(_descriptor, "reinterpret", None) or _descriptor._reinterpret
# Synchronises the warps of one partition.
partition_barrier: Any = getattr(gl, "barrier", None) or gl.thread_barrier
# Programmatic dependent launch: wait for the grids before, let the next one begin. Nothing where it is not asked for.
wait_for_grids = cuda.gdc_wait
release_grids = cuda.gdc_launch_dependents
__all__ = [
    "aggregate",
    "constexpr_function",
    "copy_arrive",
    "copy_load",
    "fence_async_shared",
    "gl",
    "jit",
    "mbarrier",
    "partition_barrier",
    "reinterpret",
    "release_grids",
    "tma_load",
    "tma_store",
    "tma_store_wait",
    "wait_for_grids",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
