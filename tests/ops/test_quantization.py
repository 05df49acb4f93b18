"""Bit packing against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashinfer.quantization import packbits, segment_packbits
from tests.ops.backends import IMPLEMENTATIONS, force

BITORDERS = ("big", "little")


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test on every implementation, through the public functions."""
    return force(monkeypatch, "quantization", request.param)


def expected(bits: torch.Tensor, bitorder: str) -> torch.Tensor:
    return torch.from_numpy(np.packbits(bits.cpu().numpy().astype(bool), bitorder=bitorder))


@pytest.mark.parametrize("bitorder", BITORDERS)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 64, 1001])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_packbits(n: int, bitorder: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randint(0, 2, (n,), device=device).to(dtype) * (1 if dtype == torch.bool else 3)
    x = x.to(dtype)
    got = packbits(x, bitorder)
    assert got.dtype == torch.uint8
    assert got.device == x.device
    assert torch.equal(got.cpu(), expected(x, bitorder))


def test_default_is_big(device: str) -> None:
    x = torch.tensor([True] + 10 * [False], device=device)
    assert packbits(x).tolist() == [128, 0]
    assert segment_packbits(x, torch.tensor([0, 11], device=device))[0].tolist() == [128, 0]
    assert packbits(x, "little").tolist() == [1, 0]


@pytest.mark.parametrize("bitorder", BITORDERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [8], [1, 0, 16, 7, 9, 0], [123, 4, 0, 77]])
def test_segment_packbits(lengths: list[int], dtype: torch.dtype, bitorder: str, device: str) -> None:
    indptr = torch.tensor(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), device=device).to(dtype)
    x = torch.rand(sum(lengths), device=device) < 0.5
    packed, byte_indptr = segment_packbits(x, indptr, bitorder)
    assert packed.dtype == torch.uint8
    assert byte_indptr.dtype == dtype
    parts = [expected(part, bitorder) for part in x.split(lengths)]
    assert torch.equal(packed.cpu(), torch.cat([torch.empty(0, dtype=torch.uint8), *parts]))
    assert byte_indptr.tolist() == np.cumsum([0] + [len(part) for part in parts]).tolist()


def test_strided_input(device: str) -> None:
    x = (torch.rand(40, 3, device=device) < 0.5)[:, 1]
    assert torch.equal(packbits(x).cpu(), expected(x, "big"))
    assert torch.equal(segment_packbits(x, torch.tensor([0, 40], device=device))[0].cpu(), expected(x, "big"))


def test_errors(device: str) -> None:
    x = torch.ones(16, dtype=torch.bool, device=device)
    with pytest.raises(TypeError, match=r"x: got list"):
        packbits([True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: got dtype torch.float32"):
        packbits(x.float())
    with pytest.raises(ValueError, match=r"x: got 2 dimensions"):
        packbits(x.view(2, 8))
    with pytest.raises(ValueError, match=r"bitorder: got 'middle', expected one of 'big', 'little'"):
        packbits(x, "middle")
    with pytest.raises(ValueError, match=r"indptr: got dtype torch.float32"):
        segment_packbits(x, torch.tensor([0.0, 16.0], device=device))
    with pytest.raises(ValueError, match=r"indptr: got a tensor on meta"):
        segment_packbits(x, torch.tensor([0, 16], device="meta"))
    with pytest.raises(ValueError, match=r"indptr: got shape \[0\]"):
        segment_packbits(x, torch.empty(0, dtype=torch.int32, device=device))


def test_range_errors() -> None:
    """What only the host can see is checked on the host."""
    x = torch.ones(16, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"indptr: got last value 15, expected 16"):
        segment_packbits(x, torch.tensor([0, 15]))
    for bad in ([0, 9, 5, 16], [1, 16]):
        with pytest.raises(ValueError, match=r"indptr: got values that do not rise from 0"):
            segment_packbits(x, torch.tensor(bad))
