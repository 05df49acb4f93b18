"""fp8 by search among all its values: what every conversion is held against."""

from __future__ import annotations

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def nearest(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in an fp8 dtype from its two neighbours among all values: nearest even, saturating, NaN kept."""
    wide = x.cpu().double()
    values = torch.arange(128, dtype=torch.uint8).view(dtype).double()
    values = values[values.isfinite()]
    size = wide.abs().nan_to_num(nan=0.0).clamp(max=values[-1])
    below = torch.searchsorted(values, size, right=True) - 1
    above = (below + 1).clamp(max=len(values) - 1)
    to_below, to_above = size - values[below], values[above] - size
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    code = torch.where(up, above, below).masked_fill(wide.isnan(), 0x7F) | (wide.signbit().long() << 7)
    return code.to(torch.uint8).view(dtype).to(x.device)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, save that NaNs may have any sign and payload."""
    got, expected = got.float(), expected.float()
    both_nan = got.isnan() & expected.isnan()
    bits = got.view(torch.int32) == expected.view(torch.int32)
    return bool((bits | both_nan).all())


def assert_rounded(got: torch.Tensor, exact: torch.Tensor, noise: float) -> None:
    """`got` is what rounding something within `noise` (relative and absolute) of fp64 `exact` to its dtype may give."""
    low = nearest(exact - noise * (1 + exact.abs()), got.dtype).float()
    high = nearest(exact + noise * (1 + exact.abs()), got.dtype).float()
    value = got.float()
    inside = (value >= low) & (value <= high) | (value.isnan() & exact.isnan())
    assert bool(inside.all()), f"{int((~inside).sum())} of {inside.numel()} values off"
