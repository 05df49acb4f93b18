"""Memory at an address as a tensor."""

from __future__ import annotations

import ctypes

import torch

from flashinfer.core import check


class _Memory:
    """Bytes at an address on a GPU, as torch takes them (Numba's CUDA array interface, version 3)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def memory_at(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 `[num_bytes]` at an address; the tensor does not keep the memory alive."""
    if device.type == "cuda":
        return torch.as_tensor(_Memory(address, num_bytes), device=device)
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_ubyte * num_bytes).from_address(address), dtype=torch.uint8)


def pack_strided_memory(
    ptr: int, segment_size: int, segment_stride: int, num_segments: int, dtype: torch.dtype, dev_id: int | torch.device
) -> torch.Tensor:
    """Segments of memory as the rows of a tensor `[num_segments, segment_size in elements]`, without a copy.

    ptr: address of the first. segment_size, segment_stride: bytes, multiples of the dtype's. dev_id: number of the GPU,
    or a device. The tensor does not keep the memory alive. Raises ValueError for sizes that are no multiples.
    """
    device = torch.device("cuda", dev_id) if isinstance(dev_id, int) else torch.device(dev_id)
    check.positive("num_segments", num_segments)
    for name, value in (("segment_size", segment_size), ("segment_stride", segment_stride), ("ptr", ptr)):
        check.multiple(name, value, f"the size of {dtype}", dtype.itemsize)
    whole = memory_at(ptr, (num_segments - 1) * segment_stride + segment_size, device).view(dtype)
    shape = (num_segments, segment_size // dtype.itemsize)
    return whole.as_strided(shape, (segment_stride // dtype.itemsize, 1))
