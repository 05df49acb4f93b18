"""Launches that begin before the one they follow has ended (programmatic dependent launch).

A kernel launched so must wait before it touches what the launch before it writes or reads. One that lets the next begin
after its own wait gives it this: whatever was there before the two of them may be read without waiting. Not so after a
kernel that lets the next begin before its own wait, as the Hopper products do: what follows those waits first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_launch_before(EARLY: tl.constexpr):
    """Where this kernel may have begun before the launch before it ended: wait until it has."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_launch_begin(EARLY: tl.constexpr):
    """The next launch may begin once all programs of this one have come here or ended."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def ask_for(pointers, EARLY: tl.constexpr):
    """Begin to bring the cache lines at `pointers` into the L2 cache; all must be readable. Nothing waits for them."""
    if EARLY:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
