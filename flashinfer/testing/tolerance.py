"""Tolerances that are computed, not chosen (DESIGN §3, rule 4), poisoned tensors and seeds."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

import torch


def assert_close_to_oracle(
    actual: torch.Tensor, oracle: torch.Tensor, twin: torch.Tensor, name: str = "", noise: torch.Tensor | None = None
) -> None:
    """Check `err(actual, oracle) <= 2 * err(twin, oracle) + eps terms`, element by element.

    actual: any float dtype, `[rows, ...]`; a row is one token, everything past dimension 0 belongs to it.
    oracle: the same computation in float64. twin: the plain torch computation in `actual.dtype`.
    noise: what rounding inside may add, shaped as oracle, where the op can say it (`attention_noise`).

    With eps = the spacing of `actual.dtype` at 1, the bound of element i in row r is

        2 * max_r |twin - oracle|  +  eps * |oracle_i|  +  eps * max_r |oracle|  +  noise_i  +  least subnormal

    The twin's error is taken over its row, since the error of a single element is zero by luck now and then; rows are
    kept apart, since a row of few keys is larger, and so less exact, than a row of many. The first eps term is the
    rounding of the result (half an eps, doubled), the second that of a sum of terms as large as the row's largest.
    An element that is exactly 0 in oracle and twin must be so, but for its noise; infinities and NaNs must be where the
    oracle has them and nowhere else. Raises AssertionError.
    """
    _assert_close(actual, oracle, twin, name or "actual", noise, unit=0.0)


def assert_lse_close_to_oracle(
    actual: torch.Tensor, oracle: torch.Tensor, twin: torch.Tensor, name: str = "", noise: torch.Tensor | None = None
) -> None:
    """`assert_close_to_oracle` for a base-2 log-sum-exp, float32 `[rows, num_qo_heads]`.

    A row counts as large as at least 1: an lse is a logarithm, so an eps in the sum is an eps (absolute) in the lse,
    however near to 0 the lse is. -inf must stand exactly where the oracle has it.
    """
    name = name or "lse"
    assert actual.dtype == torch.float32, f"{name}: dtype {actual.dtype}, expected torch.float32"
    _assert_close(actual, oracle, twin, name, noise, unit=1.0)


def _assert_close(
    actual: torch.Tensor,
    oracle: torch.Tensor,
    twin: torch.Tensor,
    name: str,
    noise: torch.Tensor | None,
    unit: float,
) -> None:
    assert oracle.dtype == torch.float64, f"{name}: the oracle is {oracle.dtype}, expected torch.float64"
    assert twin.dtype == actual.dtype, f"{name}: dtype {actual.dtype}, expected {twin.dtype} as the twin has"
    assert actual.shape == oracle.shape == twin.shape, (
        f"{name}: shape {list(actual.shape)}, expected {list(oracle.shape)} (twin {list(twin.shape)})"
    )
    if actual.numel() == 0:
        return
    got = actual.detach().to(torch.float64)
    _assert_same_nonfinite(got, oracle, name)
    info = torch.finfo(actual.dtype)
    size = _finite(oracle).abs()
    twin_error = (_finite(twin.detach().to(torch.float64)) - _finite(oracle)).abs()
    row_size = _row_max(size).clamp_min(unit)
    bound = 2 * _row_max(twin_error) + info.eps * (size + row_size) + info.eps * info.tiny
    if unit == 0.0:
        bound = bound.masked_fill((oracle == 0) & (twin == 0), 0.0)
    if noise is not None:
        bound = bound + _finite(noise)
    error = (_finite(got) - _finite(oracle)).abs()
    if bool((error <= bound).all()):
        return
    over = (error / bound.clamp_min(info.eps * info.tiny)).flatten()
    worst = int(over.argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape)]
    raise AssertionError(
        f"{name}: {int((error > bound).sum())} of {error.numel()} elements off; worst at {where}: "
        f"got {got.flatten()[worst].item():.8g}, oracle {oracle.flatten()[worst].item():.8g}, "
        f"twin {twin.flatten()[worst].item():.8g}, error {error.flatten()[worst].item():.3g} = "
        f"{over[worst].item():.2f} x bound {bound.flatten()[worst].item():.3g}; "
        f"rows off: {_rows_off(error > bound)}"
    )


def _assert_same_nonfinite(got: torch.Tensor, oracle: torch.Tensor, name: str) -> None:
    for label, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = test(got) != test(oracle)
        if bool(differ.any()):
            at = [int(i) for i in differ.nonzero()[0]]
            raise AssertionError(
                f"{name}: {label} in the wrong places, {int(differ.sum())} of {differ.numel()}; first at {at}: "
                f"got {got[tuple(at)].item()}, oracle {oracle[tuple(at)].item()}; rows off: {_rows_off(differ)}"
            )


def _finite(x: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _row_max(x: torch.Tensor) -> torch.Tensor:
    """Maximum over all but dimension 0, kept as size-1 dimensions."""
    return x.reshape(x.shape[0], -1).amax(dim=1).reshape([-1] + [1] * (x.dim() - 1))


def _rows_off(off: torch.Tensor) -> str:
    rows = off.reshape(off.shape[0], -1).any(dim=1).nonzero().flatten().tolist()
    return f"{rows[:8]}{' ...' if len(rows) > 8 else ''} of {off.shape[0]}"


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A tensor full of NaN (of the largest value for integer dtypes): what is not written stays visible."""
    if dtype.is_floating_point:
        return torch.full(tuple(shape), float("nan"), dtype=torch.float32, device=device).to(dtype)
    return torch.full(tuple(shape), torch.iinfo(dtype).max, dtype=dtype, device=device)


def set_seed(seed: int | None = None) -> int:
    """Seed torch (every device) and `random`; None draws a fresh seed from the system. Returns the seed used."""
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed
