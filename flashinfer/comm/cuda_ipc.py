"""Memory that all ranks of a host see, handed around as addresses; the CUDA run-time library through ctypes.

An address that `create_shared_buffer` gives is a real one, and the key by which this package finds the tensors behind
it: `vllm_*` functions take such addresses, and none from elsewhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from flashinfer.comm.collectives import here
from flashinfer.core import check
from flashinfer.core.peers import Peers


class SharedBuffer(NamedTuple):
    """Memory of each rank, uint8 `[num_bytes]`, as this rank sees it."""

    peers: Peers
    parts: tuple[torch.Tensor, ...]

    @property
    def addresses(self) -> list[int]:
        return [part.data_ptr() for part in self.parts]


_buffers: dict[int, SharedBuffer] = {}


def create_shared_buffer(size_in_bytes: int, group: dist.ProcessGroup | None = None) -> list[int]:
    """Memory on each rank that all ranks can write to, zeroed: its addresses in this process, in the order of ranks.

    On the current GPU, on the CPU where there is none. All ranks of `group` (None: the whole world) make it together.
    Raises ValueError for a size below 1, RuntimeError where the ranks cannot reach each other's memory.
    """
    check.positive("size_in_bytes", size_in_bytes)
    peers = Peers(group, here())
    reason = peers.unreachable()
    if reason is not None:
        fix = "Use torch.distributed's collectives there."
        raise RuntimeError(check.problem("group", reason, "ranks that reach each other's memory", fix))
    buffer = SharedBuffer(peers, peers.allocate(size_in_bytes))
    _buffers[buffer.addresses[peers.rank]] = buffer
    return buffer.addresses


def shared_buffer(name: str, addresses: Sequence[int]) -> SharedBuffer:
    """The memory behind addresses; ValueError for those that `create_shared_buffer` did not give."""
    for address in addresses:
        found = _buffers.get(address)
        if found is not None and found.addresses == list(addresses):
            return found
    got = f"addresses {[hex(address) for address in addresses]}"
    raise ValueError(check.problem(name, got, "what create_shared_buffer returned", "Make the buffer with it."))


def free_shared_buffer(pointers: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
    """Free what `create_shared_buffer` gave, once all ranks have come here; group is that of its making.

    Raises ValueError for other addresses.
    """
    buffer = shared_buffer("pointers", pointers)
    if buffer.peers.device.type == "cuda":
        torch.cuda.synchronize(buffer.peers.device)
    buffer.peers.gather("free_shared_buffer", None)
    del _buffers[buffer.addresses[buffer.peers.rank]]
    buffer.peers.close()


class _Handle(ctypes.Structure):
    """cudaIpcMemHandle_t."""

    _fields_ = (("internal", ctypes.c_byte * 64),)


_POINTER, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
# Arguments of the functions used (CUDA Runtime API manual); all return cudaError_t.
FUNCTIONS: dict[str, list[Any]] = {
    "cudaSetDevice": [_INT],
    "cudaDeviceSynchronize": [],
    "cudaDeviceReset": [],
    "cudaMalloc": [ctypes.POINTER(_POINTER), _SIZE],
    "cudaFree": [_POINTER],
    "cudaMemset": [_POINTER, _INT, _SIZE],
    "cudaMemcpy": [_POINTER, _POINTER, _SIZE, _INT],
    "cudaIpcGetMemHandle": [ctypes.POINTER(_Handle), _POINTER],
    "cudaIpcOpenMemHandle": [ctypes.POINTER(_POINTER), _Handle, ctypes.c_uint],
    "cudaIpcCloseMemHandle": [_POINTER],
}
_COPY_BY_ADDRESS, _LAZY_PEER_ACCESS = 4, 1


def _loaded(name: str) -> str:
    """The path of a shared library that this process has loaded; RuntimeError if it has not."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line[line.find("/") :] if "/" in line else ""
        if Path(path).name.startswith(name):
            return path
    fix = "Pass so_file, or call torch.cuda.init() first."
    raise RuntimeError(check.problem("so_file", f"no {name} in this process", "a loaded one", fix))


class CudaRTLibrary:
    """The CUDA run-time library: methods of its functions' names that raise RuntimeError where these report an error.

    so_file: its path, by default the one that torch has loaded. Device memory is a `ctypes.c_void_p`.
    """

    def __init__(self, so_file: str | None = None) -> None:
        self.lib = ctypes.CDLL(_loaded("libcudart") if so_file is None else so_file)
        for name, arguments in FUNCTIONS.items():
            function = getattr(self.lib, name)
            function.argtypes, function.restype = arguments, _INT
        self.lib.cudaGetErrorString.argtypes, self.lib.cudaGetErrorString.restype = [_INT], ctypes.c_char_p

    def CUDART_CHECK(self, result: int) -> None:
        """Raise RuntimeError for a cudaError_t that is none of success."""
        if result != 0:
            raise RuntimeError(f"CUDART error: {self.cudaGetErrorString(result)}")

    def cudaGetErrorString(self, error: int) -> str:
        text: bytes = self.lib.cudaGetErrorString(error)
        return text.decode()

    def cudaSetDevice(self, device: int) -> None:
        self.CUDART_CHECK(self.lib.cudaSetDevice(device))

    def cudaDeviceSynchronize(self) -> None:
        self.CUDART_CHECK(self.lib.cudaDeviceSynchronize())

    def cudaDeviceReset(self) -> None:
        self.CUDART_CHECK(self.lib.cudaDeviceReset())

    def cudaMalloc(self, size: int) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self.CUDART_CHECK(self.lib.cudaMalloc(ctypes.byref(pointer), size))
        return pointer

    def cudaFree(self, devPtr: ctypes.c_void_p) -> None:
        self.CUDART_CHECK(self.lib.cudaFree(devPtr))

    def cudaMemset(self, devPtr: ctypes.c_void_p, value: int, count: int) -> None:
        self.CUDART_CHECK(self.lib.cudaMemset(devPtr, value, count))

    def cudaMemcpy(self, dst: ctypes.c_void_p, src: ctypes.c_void_p, count: int) -> None:
        """Between any two places: what they are is told by their addresses."""
        self.CUDART_CHECK(self.lib.cudaMemcpy(dst, src, count, _COPY_BY_ADDRESS))

    def cudaIpcGetMemHandle(self, devPtr: ctypes.c_void_p) -> _Handle:
        handle = _Handle()
        self.CUDART_CHECK(self.lib.cudaIpcGetMemHandle(ctypes.byref(handle), devPtr))
        return handle

    def cudaIpcOpenMemHandle(self, handle: _Handle) -> ctypes.c_void_p:
        pointer = ctypes.c_void_p()
        self.CUDART_CHECK(self.lib.cudaIpcOpenMemHandle(ctypes.byref(pointer), handle, _LAZY_PEER_ACCESS))
        return pointer

    def cudaIpcCloseMemHandle(self, devPtr: ctypes.c_void_p) -> None:
        self.CUDART_CHECK(self.lib.cudaIpcCloseMemHandle(devPtr))
