"""Binary search in prefix sums."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def upper_bound(sorted_values, count, x, mask, steps):
    """How many of the first `count` entries of a rising array are <= `x`, int32 for each of `x`.

    steps: at least the number of bits of `count`; not a constexpr, or a growing batch would compile. mask: of `x`.
    """
    low = tl.zeros(x.shape, tl.int32)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(sorted_values + middle, mask=mask & open_, other=0) <= x
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    return low
