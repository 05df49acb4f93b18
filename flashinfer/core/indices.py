"""Index arrays of the caller: checked where the host can see them, and brought to the device in one upload."""

from __future__ import annotations

import torch

from flashinfer.core import check


def indptr(name: str, x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Check an int32 prefix sum `[batch + 1]` on `device` or the host; values are looked at on the host only."""
    _index(name, x, device)
    if x.numel() == 0:
        raise ValueError(check.problem(name, "0 entries", "batch + 1 entries", "Begin the prefix sum with 0."))
    if x.device.type == "cpu" and bool((x[1:] < x[:-1]).any() | (x[0] < 0)):
        raise ValueError(check.problem(name, "decreasing or negative values", "a prefix sum", "Use cumsum of lengths."))
    return x


def last_page_len(name: str, x: torch.Tensor, device: torch.device, kv_indptr: torch.Tensor, page_size: int) -> None:
    """Check the fill of each request's last page: int32 `[batch]`, 1..page_size where the request has pages."""
    _index(name, x, device)
    if x.numel() != kv_indptr.numel() - 1:
        raise ValueError(
            check.problem(name, f"{x.numel()} entries", f"batch = {kv_indptr.numel() - 1} entries", "One a request.")
        )
    if x.device.type == "cpu" and kv_indptr.device.type == "cpu":
        outside = (kv_indptr[1:] > kv_indptr[:-1]) & ((x < 1) | (x > page_size))
        if bool(outside.any()):
            got = f"{int(x[outside][0])} for request {int(outside.nonzero()[0])}"
            raise ValueError(
                check.problem(name, got, f"1..page_size = {page_size}", "Count the tokens of the last page.")
            )


def page_indices(name: str, x: torch.Tensor, device: torch.device, kv_indptr: torch.Tensor) -> int | None:
    """Check the page table: int32 `[pages]`, long enough for `kv_indptr`, not negative where it is used.

    Returns how many pages the cache must have at least, None when only the device knows.
    """
    _index(name, x, device)
    if kv_indptr.device.type == "cpu" and int(kv_indptr[-1]) > x.numel():
        raise ValueError(
            check.problem(
                name, f"{x.numel()} entries", f"at least indptr[-1] = {int(kv_indptr[-1])}", "List every page."
            )
        )
    if x.device.type != "cpu" or kv_indptr.device.type != "cpu":
        return None
    used = x[int(kv_indptr[0]) : int(kv_indptr[-1])]
    lowest, highest = (int(bound) for bound in used.aminmax()) if used.numel() else (0, -1)
    if lowest < 0:
        raise ValueError(check.problem(name, f"page number {lowest}", "page numbers >= 0", "Check the page table."))
    return highest + 1


def last_of(x: torch.Tensor) -> int | None:
    """The last entry where the host can see it, else None."""
    return int(x[-1]) if x.device.type == "cpu" else None


def _index(name: str, x: torch.Tensor, device: torch.device) -> None:
    check.tensor(name, x, dtypes=check.INDEX_DTYPES, shape=(None,))
    if x.device.type != "cpu" and x.device != device:
        raise ValueError(
            check.problem(name, f"a tensor on {x.device}", f"one on {device} or on the CPU", "Move it there.")
        )


def upload(device: torch.device, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same tensors on `device`: those on the host travel in one pinned, asynchronous copy.

    Every call takes fresh pinned memory from torch's caching host allocator, which does not hand it out again before
    the copy is done: calling again while an upload is in flight is safe, and so is changing the tensors after the
    return.
    """
    host = [t for t in tensors if t.device != device]
    if not host:
        return [t.contiguous() for t in tensors]
    # Every array begins on 16 bytes there, as a tensor of its own would.
    sizes = [-(-t.numel() // 4) * 4 for t in host]
    packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
    for part, t in zip(packed.split(sizes), host, strict=True):
        part[: t.numel()] = t
    parts = packed.to(device, non_blocking=True).split(sizes)
    arrived = iter([part[: t.numel()] for part, t in zip(parts, host, strict=True)])
    return [t.contiguous() if t.device == device else next(arrived) for t in tensors]
