"""Attention: decode, prefill and append, against torch's SDPA and a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

import flashinfer
from bench.record import COPY, Call, Peer, Row, Sample, nan_like

WORKSPACE_BYTES = 128 << 20
INDEX_BYTES = 4
CHECKED_ROWS = 32


@dataclass(frozen=True)
class AttentionShape:
    """One attention batch over NHD KV, softmax scale 1/sqrt(head_dim).

    qo_lens, kv_lens: tokens of each request. page_size: tokens; 0 means ragged KV. causal: bottom-right aligned.
    window_left: tokens visible to the left of a query's own, -1 = all. logits_soft_cap: 0 = off.
    """

    qo_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    causal: bool
    dtype: torch.dtype
    window_left: int = -1
    logits_soft_cap: float = 0.0

    @property
    def batch_size(self) -> int:
        return len(self.qo_lens)

    @property
    def is_uniform(self) -> bool:
        """Whether all requests have the same lengths, so that a dense batch holds them without padding."""
        return len(set(self.qo_lens)) == 1 and len(set(self.kv_lens)) == 1

    @property
    def num_pages(self) -> tuple[int, ...]:
        """KV index entries of each request: pages, or tokens when ragged."""
        size = max(self.page_size, 1)
        return tuple(-(-n // size) for n in self.kv_lens)

    def fields(self) -> dict[str, Any]:
        """The parameters, for JSON; equal lengths as one number."""
        lens = {name: list(getattr(self, name)) for name in ("qo_lens", "kv_lens")}
        return {
            "batch_size": self.batch_size,
            **{name: values[0] if len(set(values)) == 1 else values for name, values in lens.items()},
            "num_qo_heads": self.num_qo_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "page_size": self.page_size,
            "causal": self.causal,
            "window_left": self.window_left,
            "logits_soft_cap": self.logits_soft_cap,
            "dtype": str(self.dtype),
        }

    @cached_property
    def num_bytes(self) -> int:
        """Bytes that must move: q, k, v and the page numbers read once, the output written once."""
        qo = 2 * sum(self.qo_lens) * self.num_qo_heads * self.head_dim * self.dtype.itemsize
        kv = 2 * sum(self.kv_lens) * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return qo + kv + (INDEX_BYTES * sum(self.num_pages) if self.page_size else 0)

    @cached_property
    def num_flops(self) -> int:
        """Floating-point operations of the two products: 4 per visible (query, key) pair, head and dimension."""
        lens = zip(self.qo_lens, self.kv_lens, strict=True)
        pairs = sum(len(self.visible(kv - qo + row, kv)) for qo, kv in lens for row in range(qo))
        return 4 * pairs * self.num_qo_heads * self.head_dim

    def visible(self, position: int, kv_len: int) -> range:
        """The keys that the query at `position` of a request of `kv_len` tokens sees."""
        first = max(0, position - self.window_left) if self.window_left >= 0 else 0
        return range(first, position + 1 if self.causal else kv_len)


@dataclass(frozen=True)
class AttentionInputs:
    """Fresh random tensors of one `AttentionShape`.

    q: [nnz_qo, num_qo_heads, head_dim]. kv: (k, v), each [nnz_kv, num_kv_heads, head_dim], when ragged, else
    (cache,) of [pages, 2, page_size, num_kv_heads, head_dim], shuffled. The index tensors are int32; all but the page
    table are on the host, where engines make them.
    """

    q: torch.Tensor
    kv: tuple[torch.Tensor, ...]
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.q.device


# ---- inputs


def _indptr(counts: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def make_attention(shape: AttentionShape, generator: torch.Generator) -> AttentionInputs:
    """Normally distributed q, k, v; the pages of all requests shuffled over the cache."""
    device = generator.device
    normal = partial(torch.randn, generator=generator, device=device, dtype=shape.dtype)
    q = normal(sum(shape.qo_lens), shape.num_qo_heads, shape.head_dim)
    entries = sum(shape.num_pages)
    if shape.page_size:
        kv: tuple[torch.Tensor, ...] = (normal(entries, 2, shape.page_size, shape.num_kv_heads, shape.head_dim),)
    else:
        kv = (normal(entries, shape.num_kv_heads, shape.head_dim), normal(entries, shape.num_kv_heads, shape.head_dim))
    last = [(n - 1) % max(shape.page_size, 1) + 1 for n in shape.kv_lens]
    return AttentionInputs(
        q,
        kv,
        _indptr(shape.qo_lens),
        _indptr(shape.num_pages),
        torch.randperm(entries, generator=generator, device=device).int(),
        torch.tensor(last, dtype=torch.int32),
    )


# ---- the public API


def _workspace(inputs: AttentionInputs) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.q.device)


def call_decode(shape: AttentionShape, inputs: AttentionInputs) -> Call:
    """`BatchDecodeWithPagedKVCacheWrapper`."""
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(inputs), "NHD")
    plan = partial(
        wrapper.plan,
        inputs.kv_indptr,
        inputs.kv_indices,
        inputs.last_page_len,
        shape.num_qo_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.page_size,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )
    out = nan_like(inputs.q)
    return Call(plan, partial(wrapper.run, inputs.q, *inputs.kv, out=out), out)


def call_prefill_paged(shape: AttentionShape, inputs: AttentionInputs, backend: str = "auto") -> Call:
    """`BatchPrefillWithPagedKVCacheWrapper`; append is this with few query tokens."""
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(inputs), "NHD", backend=backend)
    plan = partial(
        wrapper.plan,
        inputs.qo_indptr,
        inputs.kv_indptr,
        inputs.kv_indices,
        inputs.last_page_len,
        shape.num_qo_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.page_size,
        causal=shape.causal,
        window_left=shape.window_left,
        logits_soft_cap=shape.logits_soft_cap,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )
    out = nan_like(inputs.q)
    return Call(plan, partial(wrapper.run, inputs.q, *inputs.kv, out=out), out)


def call_prefill_ragged(shape: AttentionShape, inputs: AttentionInputs, backend: str = "auto") -> Call:
    """`BatchPrefillWithRaggedKVCacheWrapper`."""
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(inputs), "NHD", backend=backend)
    plan = partial(
        wrapper.plan,
        inputs.qo_indptr,
        inputs.kv_indptr,
        shape.num_qo_heads,
        shape.num_kv_heads,
        shape.head_dim,
        causal=shape.causal,
        window_left=shape.window_left,
        logits_soft_cap=shape.logits_soft_cap,
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
    )
    out = nan_like(inputs.q)
    return Call(plan, partial(wrapper.run, inputs.q, *inputs.kv, out=out), out)


# ---- the reference


def _request_kv(shape: AttentionShape, inputs: AttentionInputs, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v of one request, each [kv_len, num_kv_heads, head_dim]."""
    begin = sum(shape.num_pages[:request])
    end = begin + shape.num_pages[request]
    if not shape.page_size:
        return inputs.kv[0][begin:end], inputs.kv[1][begin:end]
    pages = inputs.kv[0][inputs.kv_indices[begin:end].long()]
    k, v = (pages[:, i].flatten(0, 1)[: shape.kv_lens[request]] for i in range(2))
    return k, v


def _visible_mask(shape: AttentionShape, request: int, q_rows: torch.Tensor) -> torch.Tensor:
    """Which keys the rows `q_rows` of a request see: bool [rows, kv_len]."""
    kv_len = shape.kv_lens[request]
    position = (kv_len - shape.qo_lens[request] + q_rows)[:, None]
    keys = torch.arange(kv_len, device=q_rows.device)
    mask = (keys <= position) if shape.causal else (keys < kv_len).expand(len(q_rows), -1)
    return mask & (keys >= position - shape.window_left) if shape.window_left >= 0 else mask


def _capped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, cap: float
) -> torch.Tensor:
    """What SDPA has no argument for: softmax(cap * tanh(q k^T / (sqrt(head_dim) * cap))) v.

    16-bit tensors are multiplied in fp32 and rounded at the end, as SDPA's own plain implementation does.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = cap * torch.tanh(q.to(dtype) @ k.to(dtype).mT / (q.shape[-1] ** 0.5 * cap))
    return (logits.masked_fill(~mask, float("-inf")).softmax(-1) @ v.to(dtype)).to(q.dtype)


def attention_reference(
    shape: AttentionShape, inputs: AttentionInputs, request: int, q_rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows `q_rows` (local to `request`) of the output by torch in `dtype`: [rows, num_qo_heads, head_dim].

    The heads that share a KV head become rows of one product, so KV is never expanded and fp64 fits.
    """
    k, v = (x.transpose(0, 1).to(dtype)[None] for x in _request_kv(shape, inputs, request))
    group = shape.num_qo_heads // shape.num_kv_heads
    q = inputs.q[sum(shape.qo_lens[:request]) + q_rows].to(dtype)
    q = q.unflatten(1, (shape.num_kv_heads, group)).transpose(0, 1).flatten(1, 2)[None]
    mask = _visible_mask(shape, request, q_rows).repeat_interleave(group, 0)[None, None]
    if shape.logits_soft_cap:
        out = _capped_attention(q, k, v, mask, shape.logits_soft_cap)[0]
    else:
        with sdpa_kernel([SDPBackend.MATH]):  # whatever backend a peer has chosen around this
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask)[0]
    return out.unflatten(1, (len(q_rows), group)).transpose(0, 1).flatten(1, 2)


def attention_samples(shape: AttentionShape, inputs: AttentionInputs, generator: torch.Generator) -> Iterator[Sample]:
    """The longest, the first, the last and one random request; of each its first, last and random query rows."""
    draw = partial(torch.randint, generator=generator, device=inputs.q.device)
    longest = shape.kv_lens.index(max(shape.kv_lens))
    for request in sorted({0, longest, shape.batch_size - 1, int(draw(shape.batch_size, (1,)))}):
        qo_len = shape.qo_lens[request]
        picked = draw(qo_len, (CHECKED_ROWS,))
        q_rows = torch.cat([picked, picked.new_tensor([0, qo_len - 1])]).unique()
        exact, same_dtype = (
            attention_reference(shape, inputs, request, q_rows, dtype) for dtype in (torch.float64, shape.dtype)
        )
        rows = sum(shape.qo_lens[:request]) + q_rows
        yield Sample(f"request {request}", rows, exact, same_dtype, shape.kv_lens[request])


# ---- the peers


def _dense_kv(shape: AttentionShape, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v of a uniform batch as views [batch, num_kv_heads, kv_len, head_dim]; paged KV is gathered (copied)."""
    kv_len = shape.kv_lens[0]
    if not shape.page_size:
        k, v = (x.unflatten(0, (shape.batch_size, kv_len)).transpose(1, 2) for x in inputs.kv)
        return k, v
    pages = (inputs.kv[0][:, i].index_select(0, inputs.kv_indices) for i in range(2))  # as fast as a copy on the CPU
    k, v = (x.unflatten(0, (shape.batch_size, -1)).flatten(1, 2)[:, :kv_len].transpose(1, 2) for x in pages)
    return k, v


def _from_heads_first(out: torch.Tensor) -> torch.Tensor:
    return out.transpose(1, 2).flatten(0, 1)


def _sdpa_mask(shape: AttentionShape, backend: SDPBackend | None, device: torch.device) -> dict[str, Any]:
    """How to tell SDPA of the mask: its own causal flag is top-left aligned, right only where qo_len = kv_len."""
    qo_len, kv_len = shape.qo_lens[0], shape.kv_lens[0]
    if not shape.causal:
        return {}
    if qo_len == kv_len:
        return {"is_causal": True}
    if backend is SDPBackend.FLASH_ATTENTION:  # takes no mask tensor
        return {"attn_mask": causal_lower_right(qo_len, kv_len)}
    return {"attn_mask": torch.ones(qo_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - qo_len)}


@contextmanager
def _open_sdpa(
    shape: AttentionShape, inputs: AttentionInputs, backend: SDPBackend | None, gather: bool
) -> Iterator[Callable[[], torch.Tensor]]:
    """torch SDPA over the same batch, dense. gather: whether collecting the pages belongs to the timed call.

    Raises NotImplementedError for what its fast backends do not compute.
    """
    if shape.logits_soft_cap:
        raise NotImplementedError("SDPA has no soft cap")
    if shape.window_left >= 0:
        raise NotImplementedError("SDPA has no window; with a mask tensor it would read every key")
    q = inputs.q.unflatten(0, (shape.batch_size, shape.qo_lens[0])).transpose(1, 2)
    dense = None if gather else _dense_kv(shape, inputs)
    mask = _sdpa_mask(shape, backend, q.device)
    enable_gqa = shape.num_qo_heads != shape.num_kv_heads

    def call() -> torch.Tensor:
        k, v = _dense_kv(shape, inputs) if dense is None else dense
        return scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa, **mask)

    with nullcontext() if backend is None else sdpa_kernel([backend]):
        yield call


SDPA_CUDNN = Peer(
    "sdpa_cudnn", partial(_open_sdpa, backend=SDPBackend.CUDNN_ATTENTION, gather=False), _from_heads_first
)
SDPA_FLASH = Peer(
    "sdpa_flash", partial(_open_sdpa, backend=SDPBackend.FLASH_ATTENTION, gather=False), _from_heads_first
)
SDPA_CPU = Peer("sdpa", partial(_open_sdpa, backend=None, gather=False), _from_heads_first)
GATHER_SDPA_CPU = Peer("gather_and_sdpa", partial(_open_sdpa, backend=None, gather=True), _from_heads_first)


# ---- the table


def _row(
    op: str, device: str, shape: AttentionShape, call: Callable[[AttentionShape, AttentionInputs], Call], size: str
) -> Row:
    peers: tuple[Peer, ...] = (SDPA_CPU, GATHER_SDPA_CPU)
    if device == "cuda":
        peers = (SDPA_CUDNN, SDPA_FLASH) if shape.is_uniform else ()
        peers += (COPY,) if op == "decode" else ()
    kv = f"page{shape.page_size}" if shape.page_size else "ragged"
    mask = "" if op == "decode" else "_causal" if shape.causal else "_full"
    mask += f"_window{shape.window_left}" if shape.window_left >= 0 else ""
    mask += f"_cap{shape.logits_soft_cap:g}" if shape.logits_soft_cap else ""
    heads = f"h{shape.num_qo_heads}-{shape.num_kv_heads}_d{shape.head_dim}"
    prefix = "cpu_" if device == "cpu" else ""
    name = f"{prefix}{op}_{kv}_{size}_{heads}{mask}"
    return Row(name, op, device, shape, make_attention, call, peers, attention_samples)


def decode_row(
    size: str,
    kv_lens: tuple[int, ...],
    page_size: int,
    heads: tuple[int, int, int] = (32, 8, 128),
    device: str = "cuda",
) -> Row:
    """Paged decode, one query token a request. heads: (num_qo_heads, num_kv_heads, head_dim). fp32 on the CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = AttentionShape((1,) * len(kv_lens), kv_lens, *heads, page_size=page_size, causal=False, dtype=dtype)
    return _row("decode", device, shape, call_decode, size)


def prefill_row(shape: AttentionShape, backend: str = "auto") -> Row:
    """Prefill on a GPU; another backend than the one chosen by itself shows in the name."""
    call = call_prefill_paged if shape.page_size else call_prefill_ragged
    size = f"b{shape.batch_size}_s{shape.qo_lens[0]}"
    row = _row("prefill", "cuda", shape, partial(call, backend=backend), size)
    return row if backend == "auto" else replace(row, name=f"{row.name}_{backend}")


def append_row(batch: int, qo_len: int, kv_len: int, page_size: int = 16) -> Row:
    """bf16 append: the last `qo_len` of `kv_len` tokens of each request, causal."""
    shape = AttentionShape((qo_len,) * batch, (kv_len,) * batch, 32, 8, 128, page_size, True, torch.bfloat16)
    return _row("append", "cuda", shape, call_prefill_paged, f"b{batch}_q{qo_len}_l{kv_len}")


def skewed_kv_lens() -> tuple[int, ...]:
    """63 short requests and one of 65536 tokens: the batch that static schedules handle worst."""
    generator = torch.Generator().manual_seed(1)
    return (*torch.randint(64, 1024, (63,), generator=generator).tolist(), 65536)


_DECODE = (
    (1, 4096, 16),
    (1, 131072, 16),
    (16, 4096, 16),
    (64, 1024, 16),
    (64, 4096, 16),
    (64, 4096, 1),
    (256, 1024, 16),
    (64, 16384, 64),
)
HEADS = (32, 8, 128)
# (batch, tokens, heads) of prefill: as many tokens in all, whatever their lengths and heads.
PROMPTS = ((16, 1024, HEADS), (4, 4096, HEADS), (1, 16384, HEADS), (2, 8192, (16, 16, 64)), (2, 8192, (8, 8, 256)))


def prompts(batch: int, seq_len: int, heads: tuple[int, int, int], causal: bool, page_size: int = 0) -> AttentionShape:
    """bf16 prefill of whole prompts of equal length, ragged (page_size 0) or paged; heads as in `decode_row`."""
    lens = (seq_len,) * batch
    return AttentionShape(lens, lens, *heads, page_size=page_size, causal=causal, dtype=torch.bfloat16)


def _prefill_rows() -> Iterator[Row]:
    for causal in (True, False):
        for page_size in (0, 64, 16):
            sizes = [size for size in PROMPTS if page_size == 0 or size[2] == HEADS]
            yield from (prefill_row(prompts(*size, causal, page_size)) for size in sizes)
    middle = prompts(4, 4096, HEADS, causal=True)
    yield prefill_row(replace(middle, logits_soft_cap=30.0))
    yield prefill_row(replace(middle, window_left=1023))
    yield from (prefill_row(replace(middle, page_size=page_size), "fa2") for page_size in (0, 16))


ROWS: tuple[Row, ...] = (
    *(decode_row(f"b{batch}_l{kv_len}", (kv_len,) * batch, page) for batch, kv_len, page in _DECODE),
    decode_row("skew", skewed_kv_lens(), 16),
    *_prefill_rows(),
    *(append_row(16, qo_len, 4096) for qo_len in (4, 16)),
    *(decode_row("b8_l1024", (1024,) * 8, 16, heads, "cpu") for heads in ((9, 3, 64), (32, 8, 128))),
)
# Rows whose first call is timed with an empty kernel cache: each kernel family once, a process and a compilation each.
COLD_ROWS = (
    "decode_page16_b16_l4096_h32-8_d128",
    "prefill_ragged_b2_s8192_h16-16_d64_causal",
    "prefill_ragged_b4_s4096_h32-8_d128_causal",
    "prefill_ragged_b2_s8192_h8-8_d256_causal",
)
