"""FlashInfer's module of communicators and memory over NVLink: the communicators.

Memory that all ranks see comes from `flashinfer.core.peers`, without multicast.
"""

from flashinfer.comm.comm_backend import CommBackend, TorchDistBackend

__all__ = ["CommBackend", "TorchDistBackend"]
