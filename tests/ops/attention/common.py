"""Cases, random inputs, paged caches and the comparison shared by the attention tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import flashinfer
from flashinfer.core.config import config
from flashinfer.testing import (
    AttentionOptions,
    assert_close_to_oracle,
    assert_lse_close_to_oracle,
    attention,
    attention_noise,
    poisoned,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
BACKENDS = ["torch", "triton"] if ON_GPU or config().triton_interpret else ["torch"]
ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Dtypes:
    """The dtypes a test may run in: one on a GPU; on a CPU any, of which the test's random numbers pick one."""

    allowed: tuple[torch.dtype, ...]

    def pick(self, rng: random.Random, backend: str) -> torch.dtype:
        """One of them that `backend` computes rightly here: Triton's interpreter has a wrong bfloat16 dot."""
        usable = [d for d in self.allowed if ON_GPU or backend == "torch" or d != torch.bfloat16]
        return rng.choice(usable)


def size(cpu: int, gpu: int) -> int:
    """A size for this machine: the interpreter is slow, a GPU shows more when it has more to do."""
    return gpu if ON_GPU else cpu


@dataclass(frozen=True)
class Case:
    """One attention problem: lengths in tokens per request, heads, dtypes, the form of the cache, and options.

    cache_form: "tuple" (two 4-D tensors), "5d", "packed" (K and V side by side in the last dimension), "strided"
    (5-D, K and V of one token adjacent), and for page_size 1 "tuple3d" and "4d".
    mask: "" (none), "bool" or "packed".
    """

    qo_lens: tuple[int, ...] = (5, 1, 12)
    kv_lens: tuple[int, ...] = (20, 33, 12)
    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    head_dim_vo: int | None = None
    dtype: torch.dtype = torch.float16
    kv_dtype: torch.dtype | None = None
    page_size: int = 5
    kv_layout: str = "NHD"
    cache_form: str = "tuple"
    strided_q: bool = False
    causal: bool = False
    window_left: int = -1
    logits_soft_cap: float | None = None
    sm_scale: float | None = None
    mask: str = ""
    pos_encoding_mode: str = "NONE"
    rope_scale: float | None = None
    rope_theta: float | None = None
    k_scale: float | None = None
    v_scale: float | None = None

    @property
    def dim_vo(self) -> int:
        return self.head_dim if self.head_dim_vo is None else self.head_dim_vo

    @property
    def stored(self) -> torch.dtype:
        return self.dtype if self.kv_dtype is None else self.kv_dtype

    def shared_options(self) -> dict[str, Any]:
        """The keyword arguments every entry point spells alike."""
        names = ("window_left", "logits_soft_cap", "sm_scale", "pos_encoding_mode", "rope_scale", "rope_theta")
        return {name: getattr(self, name) for name in names}


@dataclass
class Problem:
    """A case with its random tensors: q `[nnz_qo, num_qo_heads, head_dim]`; k, v and masks per request."""

    case: Case
    q: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    masks: list[torch.Tensor] = field(default_factory=list)

    def q_rows(self) -> list[torch.Tensor]:
        return list(self.q.split(list(self.case.qo_lens)))

    def mask_arguments(self) -> dict[str, torch.Tensor]:
        """`custom_mask` (bool, flattened) or `packed_custom_mask` (each request from a byte of its own)."""
        if self.case.mask == "bool":
            return {"custom_mask": torch.cat([m.flatten() for m in self.masks])}
        if self.case.mask == "packed":
            return {"packed_custom_mask": torch.cat([pack_bits(m) for m in self.masks])}
        return {}


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Bits of a bool tensor, row-major, least significant bit first, uint8."""
    flat = mask.flatten()
    padded = torch.zeros(-(-flat.numel() // 8) * 8, dtype=torch.int32, device=mask.device)
    padded[: flat.numel()] = flat.int()
    weights = (1 << torch.arange(8, device=mask.device)).int()
    return (padded.view(-1, 8) * weights).sum(dim=1).to(torch.uint8)


def prefix_sum(lengths: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """int32 `[len + 1]`, starting at 0."""
    sums = [0]
    for n in lengths:
        sums.append(sums[-1] + n)
    return torch.tensor(sums, dtype=torch.int32, device=device)


def make(case: Case) -> Problem:
    """Random tensors for `case` on the tests' device (torch's generator, seeded per test)."""
    nnz = sum(case.qo_lens)
    if case.strided_q:
        wide = poisoned((nnz, case.num_qo_heads + 2, case.head_dim + 8), case.dtype, DEVICE)
        q = wide[:, 1:-1, : case.head_dim]
        q.copy_(torch.randn(q.shape, device=DEVICE))
    else:
        q = torch.randn(nnz, case.num_qo_heads, case.head_dim, device=DEVICE).to(case.dtype)
    tokens = [
        [torch.randn(n, case.num_kv_heads, dim, device=DEVICE).to(case.dtype).to(case.stored) for n in case.kv_lens]
        for dim in (case.head_dim, case.dim_vo)
    ]
    masks = []
    if case.mask:
        pairs = zip(case.qo_lens, case.kv_lens, strict=True)
        masks = [torch.rand(qo_len, kv_len, device=DEVICE) < 0.6 for qo_len, kv_len in pairs]
    return Problem(case, q, tokens[0], tokens[1], masks)


@dataclass
class PagedCache:
    """`kv` as the wrappers take it, with host index tensors; every slot that holds no token is NaN."""

    kv: Any
    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor

    def plan_arguments(self, index_device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
        """indptr and last_page_len on `index_device`; indices on the tests' device."""
        return self.indptr.to(index_device), self.indices.to(DEVICE), self.last_page_len.to(index_device)


Views = tuple[Any, torch.Tensor, torch.Tensor]


def _five_dims(case: Case, num_pages: int, page: tuple[int, int], dims: tuple[int, int]) -> Views:
    kv = poisoned((num_pages, 2, *page, dims[0]), case.stored, DEVICE)
    return kv, kv[:, 0], kv[:, 1]


def _strided(case: Case, num_pages: int, page: tuple[int, int], dims: tuple[int, int]) -> Views:
    kv = poisoned((num_pages, *page, 2, dims[0]), case.stored, DEVICE).permute(0, 3, 1, 2, 4)
    return kv, kv[:, 0], kv[:, 1]


def _packed(case: Case, num_pages: int, page: tuple[int, int], dims: tuple[int, int]) -> Views:
    both = poisoned((num_pages, *page, sum(dims)), case.stored, DEVICE)
    k, v = both[..., : dims[0]], both[..., dims[0] :]
    return (k, v), k, v


def _tuple(case: Case, num_pages: int, page: tuple[int, int], dims: tuple[int, int]) -> Views:
    k, v = (poisoned((num_pages, *page, d), case.stored, DEVICE) for d in dims)
    return (k, v), k, v


def _four_dims(case: Case, num_pages: int, page: tuple[int, int], dims: tuple[int, int]) -> Views:
    kv = poisoned((num_pages, 2, case.num_kv_heads, dims[0]), case.stored, DEVICE)
    token = 2 if case.kv_layout == "HND" else 1
    return kv, kv[:, 0].unsqueeze(token), kv[:, 1].unsqueeze(token)


def _tuple_of_three_dims(case: Case, num_pages: int, page: tuple[int, int], dims: tuple[int, int]) -> Views:
    k, v = (poisoned((num_pages, case.num_kv_heads, d), case.stored, DEVICE) for d in dims)
    token = 2 if case.kv_layout == "HND" else 1
    return (k, v), k.unsqueeze(token), v.unsqueeze(token)


CACHE_FORMS = {
    "5d": _five_dims,
    "strided": _strided,
    "packed": _packed,
    "tuple": _tuple,
    "4d": _four_dims,
    "tuple3d": _tuple_of_three_dims,
}


def page_views(case: Case, num_pages: int) -> Views:
    """NaN-filled storage in the case's form: (the cache, its K and V as `[pages, page_size, num_kv_heads, dim]`)."""
    hnd = case.kv_layout == "HND"
    page = (case.num_kv_heads, case.page_size) if hnd else (case.page_size, case.num_kv_heads)
    kv, k, v = CACHE_FORMS[case.cache_form](case, num_pages, page, (case.head_dim, case.dim_vo))
    return (kv, k.transpose(1, 2), v.transpose(1, 2)) if hnd else (kv, k, v)


def paged_cache(problem: Problem, rng: random.Random, spare_pages: int = 3) -> PagedCache:
    """The problem's KV in shuffled pages, with `spare_pages` unused ones between them."""
    case = problem.case
    counts = [-(-n // case.page_size) for n in case.kv_lens]
    total = sum(counts)
    page_ids = list(range(total + spare_pages))
    rng.shuffle(page_ids)
    kv, k_pages, v_pages = page_views(case, len(page_ids))
    indptr = prefix_sum(counts)
    for i, n in enumerate(case.kv_lens):
        if n == 0:
            continue
        slots = torch.arange(n)
        pages = torch.tensor(page_ids[indptr[i] : indptr[i + 1]])[slots // case.page_size].to(DEVICE)
        offsets = (slots % case.page_size).to(DEVICE)
        for where, what in ((k_pages, problem.k[i]), (v_pages, problem.v[i])):
            raw(where)[pages, offsets] = raw(what)
    last = [n - max(c - 1, 0) * case.page_size for n, c in zip(case.kv_lens, counts, strict=True)]
    indices = torch.tensor(page_ids[:total], dtype=torch.int32)
    return PagedCache(kv, indptr, indices, torch.tensor(last, dtype=torch.int32))


def raw(x: torch.Tensor) -> torch.Tensor:
    """fp8 as bytes, which torch can scatter; anything else as it is."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def request_options(problem: Problem, i: int) -> AttentionOptions:
    """The oracle's options for request `i`."""
    case = problem.case
    return AttentionOptions(
        causal=case.causal,
        custom_mask=problem.masks[i] if problem.masks else None,
        k_scale=1.0 if case.k_scale is None else case.k_scale,
        v_scale=1.0 if case.v_scale is None else case.v_scale,
        **case.shared_options(),
    )


def batched(problem: Problem, function: Callable[..., tuple[torch.Tensor, torch.Tensor]], *args: Any) -> list[Any]:
    """`function(q, k, v, options, *args)` of each request by itself, its two results put together as a batch's."""
    parts = [
        function(q, problem.k[i], problem.v[i], request_options(problem, i), *args)
        for i, q in enumerate(problem.q_rows())
    ]
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def check(problem: Problem, out: torch.Tensor, lse: torch.Tensor | None = None, rows: slice = slice(None)) -> None:
    """Compare with the oracle; `rows` picks the queries to look at."""
    case = problem.case
    oracle, twin = batched(problem, attention, torch.float64), batched(problem, attention, case.dtype)
    noise = batched(problem, attention_noise, case.dtype)
    assert out.dtype == case.dtype and out.device == problem.q.device
    for i, (name, got, judge) in enumerate(
        (("out", out, assert_close_to_oracle), ("lse", lse, assert_lse_close_to_oracle))
    ):
        if got is not None:
            judge(got[rows], oracle[i][rows], twin[i][rows], f"{name} of {case}", noise[i][rows])


def workspace(num_bytes: int = 1 << 16) -> torch.Tensor:
    """A small user workspace; the package must cope when it needs more."""
    return torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE)


def decode_wrapper(case: Case, backend: str, **kwargs: Any) -> Any:
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), case.kv_layout, backend=backend, **kwargs)


def prefill_wrapper(case: Case, backend: str, **kwargs: Any) -> Any:
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), case.kv_layout, backend=backend, **kwargs)


def ragged_wrapper(backend: str, **kwargs: Any) -> Any:
    return flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", backend=backend, **kwargs)


def plan_decode(wrapper: Any, case: Case, indices: Sequence[torch.Tensor], **extra: Any) -> None:
    """`indices`: indptr, indices, last_page_len."""
    heads = (case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size)
    types = {"q_data_type": case.dtype, "kv_data_type": case.stored}
    wrapper.plan(*indices, *heads, **types, **case.shared_options(), **extra)


def plan_prefill(
    wrapper: Any, problem: Problem, indices: Sequence[torch.Tensor], qo_indptr: torch.Tensor | None = None, **extra: Any
) -> None:
    """`indices`: paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len."""
    case = problem.case
    qo_indptr = prefix_sum(case.qo_lens) if qo_indptr is None else qo_indptr
    heads = (case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size)
    given = {"causal": case.causal, "q_data_type": case.dtype, "kv_data_type": case.stored, **case.shared_options()}
    if case.head_dim_vo is not None:
        given["head_dim_vo"] = case.head_dim_vo
    wrapper.plan(qo_indptr, *indices, *heads, **given, **problem.mask_arguments(), **extra)


def plan_ragged(
    wrapper: Any,
    problem: Problem,
    kv_indptr: torch.Tensor | None = None,
    qo_indptr: torch.Tensor | None = None,
    **extra: Any,
) -> None:
    case = problem.case
    kv_indptr = prefix_sum(case.kv_lens) if kv_indptr is None else kv_indptr
    qo_indptr = prefix_sum(case.qo_lens) if qo_indptr is None else qo_indptr
    heads = (case.num_qo_heads, case.num_kv_heads, case.head_dim)
    given = {"causal": case.causal, "q_data_type": case.dtype, "kv_data_type": case.stored, **case.shared_options()}
    if case.head_dim_vo is not None:
        given["head_dim_vo"] = case.head_dim_vo
    wrapper.plan(qo_indptr, kv_indptr, *heads, **given, **problem.mask_arguments(), **extra)


def scales(case: Case) -> dict[str, float]:
    """The k_scale and v_scale the case has, as `run` takes them."""
    return {name: getattr(case, name) for name in ("k_scale", "v_scale") if getattr(case, name) is not None}


def run_decode(problem: Problem, backend: str, rng: random.Random, **extra: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Paged decode of the problem; (out, lse)."""
    cache = paged_cache(problem, rng)
    wrapper = decode_wrapper(problem.case, backend)
    plan_decode(wrapper, problem.case, cache.plan_arguments(), **extra)
    return wrapper.run(problem.q, cache.kv, return_lse=True, **scales(problem.case))


def run_paged(problem: Problem, backend: str, rng: random.Random, **extra: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Paged prefill of the problem; (out, lse)."""
    cache = paged_cache(problem, rng)
    wrapper = prefill_wrapper(problem.case, backend)
    plan_prefill(wrapper, problem, cache.plan_arguments(), **extra)
    return wrapper.run(problem.q, cache.kv, return_lse=True, **scales(problem.case))


def run_ragged(problem: Problem, backend: str, rng: random.Random, **extra: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged prefill of the problem; (out, lse). K and V are views into one wider tensor."""
    case = problem.case
    both = poisoned((sum(case.kv_lens), case.num_kv_heads, case.head_dim + case.dim_vo + 8), case.stored, DEVICE)
    raw(both)[..., : case.head_dim] = raw(torch.cat(problem.k))
    raw(both)[..., case.head_dim : case.head_dim + case.dim_vo] = raw(torch.cat(problem.v))
    k, v = both[..., : case.head_dim], both[..., case.head_dim : case.head_dim + case.dim_vo]
    wrapper = ragged_wrapper(backend)
    plan_ragged(wrapper, problem, **extra)
    return wrapper.run(problem.q, k, v, return_lse=True, **scales(case))


def run_single(problem: Problem, backend: str, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Each request through single prefill, in the case's layout; (out, lse) of the batch."""
    case = problem.case
    parts = []
    for i, q in enumerate(problem.q_rows()):
        k, v = in_layout(problem.k[i], case.kv_layout), in_layout(problem.v[i], case.kv_layout)
        mask = {}
        if case.mask == "bool":
            mask = {"custom_mask": problem.masks[i]}
        if case.mask == "packed":
            mask = {"packed_custom_mask": pack_bits(problem.masks[i])}
        parts.append(
            flashinfer.single_prefill_with_kv_cache_return_lse(
                q, k, v, causal=case.causal, kv_layout=case.kv_layout, backend=backend,
                **case.shared_options(), **mask, **scales(case),
            )
        )  # fmt: skip
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def in_layout(x: torch.Tensor, kv_layout: str) -> torch.Tensor:
    """`[kv_len, heads, dim]` as kv_layout has it, contiguous."""
    return x.transpose(0, 1).contiguous() if kv_layout == "HND" else x


PREFILLS = {"paged": run_paged, "ragged": run_ragged, "single": run_single}


def decode_of(case: Case) -> Case:
    """The case with one query per request and what decode has no argument for taken out."""
    return replace(case, qo_lens=(1,) * len(case.kv_lens), head_dim_vo=None, causal=False, mask="")


def random_lengths(rng: random.Random, batch: int, limit: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(qo_lens, kv_lens) up to `limit` tokens: decodes, appends, prefills, empty requests, kv_len < qo_len."""
    qo_lens, kv_lens = [], []
    for _ in range(batch):
        kind = rng.choice(("decode", "append", "prefill", "free", "free"))
        kv_len = rng.randint(0, limit)
        qo_len = {
            "decode": 1, "append": rng.randint(0, min(8, kv_len)), "prefill": kv_len, "free": rng.randint(0, limit),
        }[kind]  # fmt: skip
        qo_lens.append(qo_len)
        kv_lens.append(kv_len)
    return tuple(qo_lens), tuple(kv_lens)
