"""The paged KV cache in plain torch: no host sync on a GPU, any strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from flashinfer.core.arch import Arch
from flashinfer.ops.page.spec import Append, AppendSpec, Fp4Append, PageTable, Scale, as_bytes
from flashinfer.ops.quantization import e2m1_codes


@torch.no_grad()
def seq_lens(out: torch.Tensor, kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> None:
    """Tokens of each request; 0 without pages."""
    pages = kv_indptr.diff()
    out.copy_(torch.where(pages > 0, (pages - 1) * page_size + kv_last_page_len, 0))


@torch.no_grad()
def batch_indices_positions(
    batch_indices: torch.Tensor, positions: torch.Tensor, append_indptr: torch.Tensor, seq_lens: torch.Tensor
) -> None:
    """The request and the position of each row; (-1, 0) past the last."""
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


def _converted(x: torch.Tensor, spec: AppendSpec, scale: Scale) -> torch.Tensor:
    """`x` over its scale, in the cache's dtype: fp8 and int8 saturate, NaN is kept (0 in int8); fp8 as bytes."""
    if spec.scaled:
        # A tensor in both cases: to divide by a number, torch multiplies with its inverse on a GPU, and rounds twice.
        divisor = torch.full((), scale.value, device=x.device) if scale.tensor is None else scale.tensor[:, None]
        x = x.float() / divisor
    dtype = spec.code_dtype
    if dtype is None:
        return as_bytes(x).to(spec.cache_dtype) if x.dtype != spec.cache_dtype else as_bytes(x)
    if dtype == torch.int8:
        return x.float().nan_to_num(nan=0.0).round().clamp(-128, 127).to(torch.int8)
    limit = torch.finfo(dtype).max
    return x.float().clamp(-limit, limit).to(dtype).view(torch.uint8)


def _places(where: PageTable | torch.Tensor, page_size: int) -> tuple[torch.Tensor, ...]:
    """(row, whether it is kept, page, slot of the page), `[nnz]` each.

    A skipped token repeats the write of the first token that is not; if all are skipped, each writes some slot of the
    first page with what it holds. So no row is left out, which would need their number on the host.
    """
    index = where.batch_indices if isinstance(where, PageTable) else where
    keep = index >= 0
    row = torch.where(keep, torch.arange(keep.numel(), device=keep.device), keep.int().argmax())
    kept, index = keep[row], index[row].clamp(min=0)
    if not isinstance(where, PageTable):
        return row, kept, index // page_size, index % page_size
    position = where.positions[row]
    entry = torch.where(kept, where.kv_indptr[index] + position // page_size, 0)
    return row, kept, where.kv_indices[entry], position % page_size


def bind(spec: AppendSpec, arch: Arch) -> Callable[[Append], None]:
    """The call for one kind of append."""
    return partial(append, spec)


@torch.no_grad()
def append(spec: AppendSpec, tensors: Append) -> None:
    """Write each token's key and value into its place."""
    row, kept, page, slot = _places(tensors.where, spec.page_size)
    key, value, k_cache, v_cache, _, k_scale, v_scale = tensors
    for source, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        cache = as_bytes(cache)
        new = _converted(source, spec, scale)[row]
        cache[page, slot] = torch.where(kept[:, None, None], new, cache[page, slot])


@torch.no_grad()
def append_fp4(tensors: Fp4Append) -> None:
    """Write each token's codes and scales into its place."""
    rows, codes, scales, where, global_scale = tensors
    row, kept, page, slot = _places(where, codes.shape[1])
    x = rows.float().unflatten(-1, (-1, 16))
    # Tensors, since a division by a number may become a product with its inverse.
    six, factor = (torch.full((), value, device=x.device) for value in (6.0, global_scale))
    stored = (x.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1) / six / factor).clamp(max=448.0)
    stored = stored.to(torch.float8_e4m3fn)
    divisor = (stored.float() * factor)[..., None]
    code = e2m1_codes(torch.where(divisor == 0, 0.0, x / divisor)).flatten(-2)
    for new, cache in ((code[..., ::2] | code[..., 1::2] << 4, codes), (stored.view(torch.uint8), scales)):
        cache[page, slot] = torch.where(kept[:, None, None], new[row], cache[page, slot])
