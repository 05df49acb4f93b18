"""The paged KV cache in plain torch: no host sync on a GPU, any strides."""

from __future__ import annotations

import torch

from flashinfer.ops.page.spec import Append, AppendSpec


def seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """int32 `[batch_size]` tokens of each request; 0 without pages, whatever its last_page_len says."""
    pages = kv_indptr.diff()
    return torch.where(pages > 0, (pages - 1) * page_size + kv_last_page_len, 0).to(torch.int32)


def batch_indices_positions(
    append_indptr: torch.Tensor, seq_lens: torch.Tensor, batch_indices: torch.Tensor, positions: torch.Tensor
) -> None:
    """Fill `batch_indices` and `positions` `[nnz]`: request i's tokens are the last ones of its seq_lens[i] tokens.

    Rows past `append_indptr[-1]` get batch index -1 and position 0.
    """
    batch_size = seq_lens.numel()
    if batch_size == 0:
        batch_indices.fill_(-1)
        positions.zero_()
        return
    token = torch.arange(batch_indices.numel(), dtype=append_indptr.dtype, device=append_indptr.device)
    found = torch.searchsorted(append_indptr[1:], token, right=True)
    inside = found < batch_size
    request = found.clamp(max=batch_size - 1)
    batch_indices.copy_(torch.where(inside, request, -1))
    positions.copy_(torch.where(inside, seq_lens[request] - append_indptr[request + 1] + token, 0))


def _converted(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """`x`, or its bytes in the fp8 `dtype`: saturating, NaN kept."""
    if dtype is None:
        return x
    limit = torch.finfo(dtype).max
    return x.float().clamp(-limit, limit).to(dtype).view(torch.uint8)


def append(spec: AppendSpec, tensors: Append) -> None:
    """Write each token's key and value into its page.

    A skipped token repeats the write of the first token that is not; if all are skipped, each writes some slot of the
    first page with what it holds. So no row is left out, which would need their number on the host.
    """
    keep = tensors.batch_indices >= 0
    row = torch.where(keep, torch.arange(keep.numel(), device=keep.device), keep.int().argmax())
    kept, request, position = keep[row], tensors.batch_indices[row].clamp(min=0), tensors.positions[row]
    entry = torch.where(kept, tensors.kv_indptr[request] + position // spec.page_size, 0)
    page, slot = tensors.kv_indices[entry], position % spec.page_size
    for source, cache in ((tensors.key, tensors.k_cache), (tensors.value, tensors.v_cache)):
        new = _converted(source, spec.fp8_dtype)[row].to(cache.dtype)
        cache[page, slot] = torch.where(kept[:, None, None], new, cache[page, slot])
