"""Attention in torch: the meaning of the op, on the CPU and the GPU, one request at a time.

Softmax(logits) V with fp32 arithmetic (fp64 for fp64 queries); rows that see nothing give 0 and lse -inf. On a GPU
`plan` copies the index arrays to the host: this is the reference, not the serving path.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from flashinfer.core.workspace import Arena
from flashinfer.ops.attention.spec import AttentionSpec, Batch, Scales, Tensors
from flashinfer.ops.attention.variant import At, Variant, clamped_bounds

# Logits held at once: bounds the memory of a long prefill (64 Mi fp32 values = 256 MiB).
MAX_LOGITS = 1 << 26
LOG2_E = math.log2(math.e)


class Request(NamedTuple):
    """Host ints of one request: query rows [q_begin, q_end), entries [kv_begin, kv_end) of the page table, tokens."""

    q_begin: int
    q_end: int
    kv_begin: int
    kv_end: int
    kv_len: int


class ReferencePlan(NamedTuple):
    requests: list[Request]
    kv_indices: torch.Tensor | None


class Cache(NamedTuple):
    """K or V `[pages, page_size, num_kv_heads, dim]`, and where the pages of one request are gathered if need be."""

    pages: torch.Tensor
    gathered: torch.Tensor | None


def plan(spec: AttentionSpec, batch: Batch, variant: Variant, arena: Arena) -> ReferencePlan:
    """Lists the requests as host ints; `arena` is not needed."""
    kv = batch.kv_indptr.tolist()
    n = batch.batch_size
    uniform = spec.uniform_qo_len
    qo = batch.qo_indptr.tolist() if batch.qo_indptr is not None else [i * (uniform or 0) for i in range(n + 1)]
    last = batch.last_page_len.tolist() if batch.last_page_len is not None else [spec.page_size] * n
    requests = []
    for i in range(n):
        pages = kv[i + 1] - kv[i]
        kv_len = (pages - 1) * spec.page_size + last[i] if pages > 0 else 0
        requests.append(Request(qo[i], qo[i + 1], kv[i], kv[i + 1], kv_len))
    return ReferencePlan(requests, batch.kv_indices)


def run(spec: AttentionSpec, plan: ReferencePlan, tensors: Tensors, variant: Variant, scales: Scales) -> None:
    """Writes `tensors.out` and `tensors.lse`, request by request."""
    caches = (_cache(plan, tensors.k), _cache(plan, tensors.v))
    for index, request in enumerate(plan.requests):
        if request.q_end > request.q_begin:
            _attend_request(spec, plan, tensors, caches, variant, scales, index)


def _cache(plan: ReferencePlan, pages: torch.Tensor) -> Cache:
    """One buffer for all requests: it stays in the CPU's cache, where a new one each time costs page faults."""
    if plan.kv_indices is None:
        return Cache(pages, None)
    most = max((request.kv_end - request.kv_begin for request in plan.requests), default=0)
    return Cache(pages, pages.new_empty(most, *pages.shape[1:]))


def _attend_request(
    spec: AttentionSpec,
    plan: ReferencePlan,
    tensors: Tensors,
    caches: tuple[Cache, Cache],
    variant: Variant,
    scales: Scales,
    index: int,
) -> None:
    request = plan.requests[index]
    qo_len, kv_len = request.q_end - request.q_begin, request.kv_len
    lo, hi, _, _ = clamped_bounds(variant, 0, qo_len, qo_len, kv_len, max, min)
    work = torch.promote_types(spec.q_dtype, torch.float32) if spec.q_dtype.itemsize > 1 else torch.float32
    k, v = (_gather(spec, plan, cache, request, lo, hi) for cache in caches)
    if _is_fusable(tensors.q, k, v, variant, scales):
        here = slice(request.q_begin, request.q_end)
        out, lse = _attend_fused(spec, tensors.q[here], k, v, scales)
        if tensors.lse is not None and work != k.dtype:
            lse = _lse(spec, tensors.q[here].to(work), k.to(work), scales)
        _store(tensors, here, out, lse)
        return
    # [num_kv_heads, tokens, dim]
    k, v = _rotate(variant, k.to(work), lo).transpose(0, 1), v.to(work).transpose(0, 1)
    rows = max(1, min(qo_len, MAX_LOGITS // max(1, kv_len * spec.num_qo_heads)))
    for begin in range(0, qo_len, rows):
        end = min(begin + rows, qo_len)
        here = slice(request.q_begin + begin, request.q_begin + end)
        q = _rotate(variant, tensors.q[here].to(work), begin + kv_len - qo_len)
        at = _at(spec, index, (begin, end, qo_len), (lo, hi, kv_len), q.device) if variant.parts else None
        _store(tensors, here, *_attend_rows(spec, q, k, v, at, variant, scales))


def _store(tensors: Tensors, rows: slice, out: torch.Tensor, lse: torch.Tensor) -> None:
    """out `[heads, rows, dim]`, natural-log lse `[heads, rows]`, into the caller's rows; the lse becomes base 2."""
    tensors.out[rows] = out.transpose(0, 1)
    if tensors.lse is not None:
        tensors.lse[rows] = lse.transpose(0, 1) * LOG2_E


def _at(
    spec: AttentionSpec, index: int, qo: tuple[int, int, int], kv: tuple[int, int, int], device: torch.device
) -> At:
    """Positions that broadcast against logits `[num_qo_heads, rows, tokens]`; qo, kv: (begin, end, length)."""
    rows = torch.arange(qo[0], qo[1], device=device)[:, None]
    heads = torch.arange(spec.num_qo_heads, device=device)[:, None, None]
    return At(index, rows, torch.arange(kv[0], kv[1], device=device), heads, qo[2], kv[2])


def _gather(spec: AttentionSpec, plan: ReferencePlan, cache: Cache, request: Request, lo: int, hi: int) -> torch.Tensor:
    """The tokens [lo, hi) of a request, `[hi - lo, num_kv_heads, dim]`; touches only the pages that hold them.

    They lie in `cache.gathered` until the next call, where there is a page table.
    """
    first = lo // spec.page_size
    last = -(-hi // spec.page_size)
    begin, end = request.kv_begin + first, request.kv_begin + last
    if plan.kv_indices is None or cache.gathered is None:
        pages = cache.pages[begin:end]
    else:
        # index_select copies whole rows; indexing with a tensor takes twice as long on the CPU.
        pages = torch.index_select(cache.pages, 0, plan.kv_indices[begin:end], out=cache.gathered[: end - begin])
    return pages.flatten(0, 1)[lo - first * spec.page_size : hi - first * spec.page_size]


def _rotate(variant: Variant, x: torch.Tensor, position: int) -> torch.Tensor:
    """x `[tokens, heads, dim]`, its first token at `position`, after the variant's rotations."""
    for part in variant.parts:
        if part.twin.rotate is not None:
            x = part.twin.rotate(part.captured, x, torch.arange(position, position + x.shape[0], device=x.device))
    return x


def _is_fusable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Variant, scales: Scales) -> bool:
    """Plain softmax attention that torch's fused CPU kernel takes."""
    scaled = scales.output_scale != 1.0 or any(x is not None for x in (scales.logits, scales.output, scales.sinks))
    same = q.dtype == k.dtype == v.dtype and k.shape == v.shape
    cpu = q.device.type == "cpu" and q.dtype.itemsize > 1
    return cpu and same and not variant.parts and not scaled and k.shape[0] > 0


def _attend_fused(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: Scales
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_attend_rows` without variants, k and v `[tokens, num_kv_heads, dim]`, by torch's fused kernel.

    It is what scaled_dot_product_attention runs on a CPU; this entry gives the lse too, and takes K and V strided. Its
    exponentials of 16-bit inputs are coarser than an lse may be: see `_lse`.
    """
    rows, heads = q.shape[0], spec.num_qo_heads
    packed = q.transpose(0, 1).reshape(1, spec.num_kv_heads, spec.group_size * rows, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        packed, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=scales.sm_scale
    )
    return out.reshape(heads, rows, -1), lse.reshape(heads, rows)


def _lse(spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The natural lse `[heads, rows]` of plain attention, in the dtype of q; k `[tokens, num_kv_heads, dim]`."""
    packed = q.transpose(0, 1).reshape(spec.num_kv_heads, spec.group_size * q.shape[0], -1)
    parts = (packed * scales.sm_scale).split(max(1, MAX_LOGITS // (spec.num_kv_heads * k.shape[0])), dim=1)
    lse = torch.cat([(part @ k.permute(1, 2, 0)).logsumexp(-1) for part in parts], dim=1)
    return lse.reshape(spec.num_qo_heads, q.shape[0])


def _attend_rows(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    at: At | None,
    variant: Variant,
    scales: Scales,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q `[rows, heads, dim]` over k, v `[num_kv_heads, tokens, dim]` -> out `[heads, rows, dim]`, natural lse."""
    rows, tokens, heads = q.shape[0], k.shape[1], spec.num_qo_heads
    # Heads of a group become rows of one product, so that K and V are read once and never repeated.
    packed = q.transpose(0, 1).reshape(spec.num_kv_heads, spec.group_size * rows, -1)
    logits = ((packed * scales.sm_scale) @ k.transpose(1, 2)).view(heads, rows, tokens)
    if scales.logits is not None:
        logits = logits * scales.logits.to(logits.dtype).view(-1, 1, 1)
    for part in variant.parts:
        if part.twin.logits is not None:
            logits = part.twin.logits(part.captured, logits, at)
    for part in variant.parts:
        if part.twin.mask is not None:
            logits = logits.masked_fill(~part.twin.mask(part.captured, at), -math.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    if scales.sinks is not None:
        lse = torch.logaddexp(lse, scales.sinks.to(lse.dtype).view(-1, 1, 1))
    # A row that sees nothing has lse -inf: shifted by 0 instead, its weights are exp(-inf) = 0.
    p = (logits - lse.masked_fill(lse == -math.inf, 0.0)).exp_()
    out = (p.view(spec.num_kv_heads, spec.group_size * rows, tokens) @ v).view(heads, rows, -1)
    if scales.output_scale != 1.0:
        out = out * scales.output_scale
    if scales.output is not None:
        out = out * scales.output.to(out.dtype).view(-1, 1, 1)
    return out, lse.squeeze(-1)
