"""The paged KV cache: where tokens lie in it, and writing them there."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from flashinfer.core import check, library
from flashinfer.core.arch import arch_of
from flashinfer.core.select import Impl, select
from flashinfer.ops.page.spec import Append, AppendSpec, PageTable, Scale
from flashinfer.ops.page.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.page.triton", triton_supports),
    Impl("torch", "flashinfer.ops.page.reference", torch_supports),
)


@cache
def _implementation(spec: AppendSpec | None, device: torch.device, backend: str) -> Any:
    """The chosen implementation's call for one kind of append, or for None its module with the index functions.

    Kept, because choosing takes longer than launching.
    """
    arch = arch_of(device)
    module = select(IMPLS, spec, arch, backend).load()
    return module if spec is None else module.bind(spec, arch)


def append(tensors: Append, backend: str = "auto") -> None:
    """Write new tokens into their pages, in place; "auto" is Triton on a GPU and torch on CPU tensors."""
    where = tensors.where
    pages = where.kv_indices if isinstance(where, PageTable) else tensors.k_cache
    if tensors.key.shape[0] == 0 or pages.shape[0] == 0:
        return
    spec = tensors.spec
    _implementation(spec, tensors.key.device, backend)(tensors)


@library.register(
    "append_paged_kv_cache(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor key, Tensor value, Tensor[] where, "
    "float[] scales, Tensor[] scale_tensors) -> ()"
)
def append_paged_kv_cache(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    where: list[torch.Tensor],
    scales: list[float],
    scale_tensors: list[torch.Tensor],
) -> None:
    """`append`. where: the four tensors of a page table, or slots. scales, or scale_tensors: of k and v, or none."""
    target = PageTable(*where) if len(where) > 1 else where[0]
    if key.is_cpu:
        check_places(target, k_cache.shape[0], k_cache.shape[1])
    factors = [Scale(x) for x in scales] + [Scale(1.0, x) for x in scale_tensors]
    append(Append(key, value, k_cache, v_cache, target, *factors))


def check_places(where: PageTable | torch.Tensor, num_pages: int, page_size: int) -> None:
    """Check on the CPU that every token that is not skipped has a place; raises ValueError."""
    if not isinstance(where, PageTable):
        check.index_range("slot_mapping", where.clamp(min=0), 0, max(num_pages * page_size, 1))
        return
    check.index_range("kv_indices", where.kv_indices, 0, num_pages)
    kept = where.batch_indices >= 0
    request, position = where.batch_indices[kept], where.positions[kept]
    check.index_range("batch_indices", request, 0, where.kv_indptr.numel() - 1)
    check.index_range("positions", position, 0, 2**31)
    entry = where.kv_indptr[request] + position // page_size
    check.index_range("kv_indptr", where.kv_indptr, 0, where.kv_indices.numel() + 1)
    outside = entry >= where.kv_indptr[request + 1]
    if bool(outside.any()):
        first = int(outside.int().argmax())
        raise ValueError(
            check.problem(
                "positions",
                f"position {int(position[first])} of request {int(request[first])}",
                "positions inside of the request's pages",
                "Add pages to kv_indices and kv_indptr before the append.",
            )
        )


@library.register(
    "get_batch_indices_positions(Tensor(a!) batch_indices, Tensor(b!) positions, Tensor append_indptr, "
    "Tensor seq_lens) -> ()"
)
def batch_indices_positions(
    batch_indices: torch.Tensor, positions: torch.Tensor, append_indptr: torch.Tensor, seq_lens: torch.Tensor
) -> None:
    """Fill `batch_indices` and `positions` `[nnz]`: request i's tokens are the last ones of its seq_lens[i] tokens.

    Rows past `append_indptr[-1]` get batch index -1 and position 0.
    """
    check.indptr("append_indptr", append_indptr)
    check.index_range("append_indptr", append_indptr, 0, batch_indices.numel() + 1)
    if batch_indices.shape[0] == 0:
        return
    implementation = _implementation(None, batch_indices.device, "auto")
    implementation.batch_indices_positions(batch_indices, positions, append_indptr, seq_lens)


@library.register("get_seq_lens(Tensor(a!) out, Tensor kv_indptr, Tensor kv_last_page_len, int page_size) -> ()")
def seq_lens(out: torch.Tensor, kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> None:
    """int32 `[batch_size]` tokens of each request; 0 without pages, whatever its last_page_len says."""
    check.indptr("kv_indptr", kv_indptr)
    if out.shape[0] == 0:
        return
    _implementation(None, out.device, "auto").seq_lens(out, kv_indptr, kv_last_page_len, page_size)


__all__ = [
    "IMPLS",
    "Append",
    "AppendSpec",
    "PageTable",
    "Scale",
    "append",
    "append_paged_kv_cache",
    "batch_indices_positions",
    "check_places",
    "seq_lens",
]
