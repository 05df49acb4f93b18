"""One frozen row per GPU architecture; the only reader of device capability."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


@dataclass(frozen=True)
class Arch:
    """What a kernel's support and configuration may depend on.

    name: "cpu" or "smXX". num_sms: multiprocessors. smem_bytes: shared memory one program may take, in bytes.
    triton: the release that compiles for it, None where there is none.
    """

    name: str
    num_sms: int
    smem_bytes: int
    triton: str | None = None

    @property
    def has_wgmma(self) -> bool:
        """Whether matrix products take operands and accumulate as Hopper's warpgroup instructions do."""
        return self.name == "sm90"

    @property
    def has_tma(self) -> bool:
        """Whether tensor maps copy tiles; the interpreter knows them too."""
        return self.is_cpu or self.name in ("sm90", "sm100", "sm103", "sm120", "sm121")

    @property
    def has_fp8(self) -> bool:
        """Whether Triton has fp8 numbers there; the interpreter has them."""
        return self.name not in ("sm80", "sm86")

    @property
    def converts_to_fp8(self) -> bool:
        """Whether Triton rounds fp32 to fp8 in one instruction, saturating (for sm_89, 3.6 goes through fp16)."""
        return self.name.startswith("sm") and int(self.name[2:]) >= 90

    @property
    def launches_early(self) -> bool:
        """Whether a kernel may be launched while the one before it runs, and wait for it itself."""
        return self.name.startswith("sm") and int(self.name[2:]) >= 90

    @property
    def is_nvidia(self) -> bool:
        """Whether kernels may hold PTX; all of these multiply pairs of bf16 in one instruction."""
        return self.name.startswith("sm")

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


CPU = Arch("cpu", num_sms=4, smem_bytes=0)
# Shared memory per block (opt-in maximum), CUDA C++ Programming Guide, table "Technical Specifications".
SMEM_BYTES = {"sm80": 166_912, "sm86": 101_376, "sm89": 101_376, "sm90": 232_448, "sm100": 232_448, "sm120": 101_376}


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


@cache
def _cuda(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    name = f"sm{properties.major}{properties.minor}"
    # An unknown architecture gets what every CUDA device gives a program without opting in.
    return Arch(name, properties.multi_processor_count or 1, SMEM_BYTES.get(name, 49_152), _triton())


def arch_of(device: torch.device) -> Arch:
    """The row of `device`."""
    if device.type != "cuda":
        return CPU
    return _cuda(torch.cuda.current_device() if device.index is None else device.index)


def identity_of(device: torch.device) -> tuple[str, str]:
    """The GPU's own name in the world, and which GPU of this process it cannot reach the memory of ("": none)."""
    index = torch.cuda.current_device() if device.index is None else device.index
    refused = [
        f"GPU {index} cannot reach the memory of GPU {other}"
        for other in range(torch.cuda.device_count())
        if other != index and not torch.cuda.can_device_access_peer(index, other)
    ]
    return str(torch.cuda.get_device_properties(index).uuid), "; ".join(refused)


def address_of(index: int) -> tuple[str, str]:
    """The UUID and the PCI address of GPU `index`: the same in every process, however it numbers its GPUs."""
    properties: Any = torch.cuda.get_device_properties(index)
    place = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    return str(properties.uuid), place
