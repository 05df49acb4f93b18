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


class Request(NamedTuple):
    """Host ints of one request: query rows [q_begin, q_end), KV entries [kv_begin, kv_end) of the table, kv_len tokens."""

    q_begin: int
    q_end: int
    kv_begin: int
    kv_end: int
    kv_len: int


class ReferencePlan(NamedTuple):
    requests: list[Request]
    kv_indices: torch.Tensor | None


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
    for index, request in enumerate(plan.requests):
        if request.q_end > request.q_begin:
            _attend_request(spec, plan, tensors, variant, scales, index, request)


def _attend_request(
    spec: AttentionSpec,
    plan: ReferencePlan,
    tensors: Tensors,
    variant: Variant,
    scales: Scales,
    index: int,
    request: Request,
) -> None:
    qo_len = request.q_end - request.q_begin
    rows = max(1, min(qo_len, MAX_LOGITS // max(1, request.kv_len * spec.num_qo_heads)))
    lo, hi, _, _ = clamped_bounds(variant, 0, qo_len, qo_len, request.kv_len, max, min)
    work = torch.promote_types(spec.q_dtype, torch.float32) if spec.q_dtype.itemsize > 1 else torch.float32
    k = _gather(spec, plan, tensors.k, request, lo, hi).to(work)
    v = _gather(spec, plan, tensors.v, request, lo, hi).to(work)
    k = _rotate(variant, k, torch.arange(lo, hi, device=k.device)).transpose(0, 1)  # [num_kv_heads, tokens, dim]
    v = v.transpose(0, 1)
    for begin in range(0, qo_len, rows):
        end = min(begin + rows, qo_len)
        q = tensors.q[request.q_begin + begin : request.q_begin + end].to(work)
        position = torch.arange(begin, end, device=q.device) + request.kv_len - qo_len
        q = _rotate(variant, q, position)
        at = At(
            index,
            torch.arange(begin, end, device=q.device)[:, None],
            torch.arange(lo, hi, device=q.device),
            torch.arange(spec.num_qo_heads, device=q.device)[:, None, None],
            qo_len,
            request.kv_len,
        )
        out, lse = _attend_rows(spec, q, k, v, at, variant, scales)
        tensors.out[request.q_begin + begin : request.q_begin + end] = out.to(spec.o_dtype)
        if tensors.lse is not None:
            tensors.lse[request.q_begin + begin : request.q_begin + end] = lse.to(torch.float32)


def _gather(
    spec: AttentionSpec, plan: ReferencePlan, cache: torch.Tensor, request: Request, lo: int, hi: int
) -> torch.Tensor:
    """The tokens [lo, hi) of a request, `[hi - lo, num_kv_heads, dim]`; touches only the pages that hold them."""
    first = lo // spec.page_size
    last = -(-hi // spec.page_size)
    begin, end = request.kv_begin + first, request.kv_begin + last
    if plan.kv_indices is None:
        pages = cache[begin:end]
    else:
        pages = cache[plan.kv_indices[begin:end].to(torch.int64)]
    return pages.flatten(0, 1)[lo - first * spec.page_size : hi - first * spec.page_size]


def _rotate(variant: Variant, x: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    for part in variant.parts:
        if part.twin.rotate is not None:
            x = part.twin.rotate(part.captured, x, pos)
    return x


def _attend_rows(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    at: At,
    variant: Variant,
    scales: Scales,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q `[rows, heads, dim]` over k, v `[num_kv_heads, tokens, dim]` -> out `[rows, heads, dim]`, base-2 lse."""
    rows, tokens, group = q.shape[0], k.shape[1], spec.group_size
    # Heads of a group become rows of one product, so that K and V are read once and never repeated.
    packed = q.view(rows, spec.num_kv_heads, group, -1).permute(1, 2, 0, 3).reshape(spec.num_kv_heads, group * rows, -1)
    logits = (packed * scales.sm_scale) @ k.transpose(1, 2)
    logits = logits.view(spec.num_qo_heads, rows, tokens)
    if scales.logits is not None:
        logits = logits * scales.logits.to(logits.dtype).view(-1, 1, 1)
    for part in variant.parts:
        if part.twin.logits is not None:
            logits = part.twin.logits(part.captured, logits, at)
    for part in variant.parts:
        if part.twin.mask is not None:
            logits = torch.where(part.twin.mask(part.captured, at), logits, -math.inf)
    sinks = None if scales.sinks is None else scales.sinks.to(logits.dtype).view(-1, 1, 1)
    highest = logits.amax(-1, keepdim=True) if tokens else logits.new_full((spec.num_qo_heads, rows, 1), -math.inf)
    if sinks is not None:
        highest = torch.maximum(highest, sinks)
    shift = torch.where(highest == -math.inf, torch.zeros_like(highest), highest)
    p = torch.exp(logits - shift)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - shift)
    out = (p.view(spec.num_kv_heads, group * rows, tokens) @ v).view(spec.num_qo_heads, rows, -1)
    # A row that sees nothing has total 0: its output is 0, not 0/0.
    out = torch.where(total == 0, torch.zeros_like(out), out / total) * scales.output_scale
    if scales.output is not None:
        out = out * scales.output.to(out.dtype).view(-1, 1, 1)
    lse = (shift + torch.log(total)).squeeze(-1) * math.log2(math.e)
    return out.transpose(0, 1), lse.transpose(0, 1)
