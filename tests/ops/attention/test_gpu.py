"""What only a GPU shows: planning without a sync, CUDA graphs, offsets past 2^31."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import flashinfer
from tests.ops.common import captured

from .common import (
    DEVICE,
    ON_GPU,
    Case,
    Problem,
    check,
    decode_of,
    decode_wrapper,
    make,
    paged_cache,
    plan_decode,
    plan_prefill,
    plan_ragged,
    prefill_wrapper,
    prefix_sum,
    ragged_wrapper,
    workspace,
)

pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
DTYPE = torch.bfloat16


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mask", ["", "packed"])
def test_prefill_plan_on_device_tensors_does_not_sync(mask, rng):
    problem = make(Case((5, 0, 300), (1000, 7, 300), dtype=DTYPE, causal=True, mask=mask))
    cache = paged_cache(problem, rng)
    wrapper = prefill_wrapper(problem.case, "triton")
    indices, qo_indptr = cache.plan_arguments(DEVICE), prefix_sum(problem.case.qo_lens, DEVICE)
    for _ in range(2):
        with no_sync():
            plan_prefill(wrapper, problem, indices, qo_indptr)
            result = wrapper.run(problem.q, cache.kv, return_lse=True)
        check(problem, *result)


def test_decode_plan_on_device_tensors_does_not_sync(rng):
    problem = make(decode_of(Case((), (4000, 1, 17, 0, 300), dtype=DTYPE, page_size=16)))
    cache = paged_cache(problem, rng)
    wrapper = decode_wrapper(problem.case, "triton")
    indices = cache.plan_arguments(DEVICE)
    for _ in range(2):
        with no_sync():
            plan_decode(wrapper, problem.case, indices)
            result = wrapper.run(problem.q, cache.kv, return_lse=True)
        check(problem, *result)


def test_ragged_plan_on_device_tensors_does_not_sync(rng):
    problem = make(Case((5, 0, 300), (1000, 7, 300), dtype=DTYPE, causal=True))
    k, v = torch.cat(problem.k), torch.cat(problem.v)
    wrapper = ragged_wrapper("triton")
    kv_indptr, qo_indptr = prefix_sum(problem.case.kv_lens, DEVICE), prefix_sum(problem.case.qo_lens, DEVICE)
    for _ in range(2):
        with no_sync():
            plan_ragged(wrapper, problem, kv_indptr, qo_indptr)
            result = wrapper.run(problem.q, k, v, return_lse=True)
        check(problem, *result)


def test_host_plans_in_flight_do_not_disturb_each_other(rng):
    """plan() from host tensors again while the GPU is still busy: an upload buffer must not be reused too soon."""
    problems = [make(decode_of(Case((), (n, 40 + n, 7), dtype=DTYPE, page_size=16))) for n in range(1, 9)]
    caches = [paged_cache(p, rng) for p in problems]
    wrapper = decode_wrapper(problems[0].case, "triton")
    plan_decode(wrapper, problems[0].case, caches[0].plan_arguments())
    wrapper.run(problems[0].q, caches[0].kv)
    arguments = [c.plan_arguments() for c in caches]
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    results = []
    for problem, cache, given in zip(problems, caches, arguments, strict=True):
        plan_decode(wrapper, problem.case, given)
        results.append(wrapper.run(problem.q, cache.kv, return_lse=True))
        given[0].fill_(0), given[2].fill_(1)
    for problem, result in zip(problems, results, strict=True):
        check(problem, *result)


def fixed_pages(case: Case, num_pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (num_pages, case.page_size, case.num_kv_heads, case.head_dim)
    return tuple(torch.full(shape, float("nan"), dtype=case.dtype, device=DEVICE) for _ in range(2))


def buffers(batch: int, num_pages: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.zeros(batch + 1, dtype=torch.int32, device=DEVICE),
        torch.zeros(num_pages, dtype=torch.int32, device=DEVICE),
        torch.zeros(batch, dtype=torch.int32, device=DEVICE),
    )


def move_in(static: tuple[torch.Tensor, torch.Tensor], cache) -> None:
    """Fill the captured cache's tensors with this problem's pages."""
    for where, what in zip(static, cache.kv, strict=True):
        where.fill_(float("nan"))
        where[: what.shape[0]] = what


BATCHES = [(200, 3, 17, 64), (1, 1, 1, 1), (5000, 0, 16, 33), (700, 900, 800, 1000)]


@pytest.mark.parametrize("index_device", ["cpu", "cuda"])
@pytest.mark.parametrize("use_tensor_cores", [False, True])
def test_decode_graph_replays_after_other_plans(use_tensor_cores, index_device, rng):
    case = decode_of(Case((), BATCHES[0], 8, 2, 64, dtype=DTYPE, page_size=16))
    indptr, indices, last = buffers(4, 400)
    wrapper = decode_wrapper(
        case, "triton", use_cuda_graph=True, use_tensor_cores=use_tensor_cores,
        paged_kv_indptr_buffer=indptr, paged_kv_indices_buffer=indices, paged_kv_last_page_len_buffer=last,
    )  # fmt: skip
    assert wrapper.is_cuda_graph_enabled
    static, q = fixed_pages(case, 400), torch.zeros(4, 8, 64, dtype=DTYPE, device=DEVICE)
    out, lse = torch.zeros_like(q), torch.zeros(4, 8, device=DEVICE)
    graph = None
    for kv_lens in BATCHES:
        problem = make(replace(case, kv_lens=kv_lens))
        cache = paged_cache(problem, rng)
        move_in(static, cache)
        q.copy_(problem.q)
        plan_decode(wrapper, problem.case, cache.plan_arguments(index_device))
        if graph is None:
            graph = captured(lambda: wrapper.run(q, static, out=out, lse=lse, return_lse=True))
        out.fill_(float("nan")), lse.fill_(float("nan"))
        graph.replay()
        check(problem, out, lse)


QO_BATCHES = [(40, 3, 17, 4), (1, 1, 1, 1), (0, 60, 2, 2), (30, 0, 0, 0)]


@pytest.mark.parametrize("index_device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_prefill_graph_replays_after_other_plans(kind, index_device, rng):
    """Fewer query rows than at capture: the rows past the batch are left to whatever they were."""
    case = Case(QO_BATCHES[0], BATCHES[0], 8, 2, 64, dtype=DTYPE, page_size=16, causal=True)
    rows = sum(case.qo_lens)
    indptr, indices, last = buffers(4, 400)
    qo_buffer = torch.zeros_like(indptr)
    if kind == "paged":
        wrapper = prefill_wrapper(
            case, "triton", use_cuda_graph=True, qo_indptr_buf=qo_buffer, paged_kv_indptr_buf=indptr,
            paged_kv_indices_buf=indices, paged_kv_last_page_len_buf=last,
        )  # fmt: skip
        static = fixed_pages(case, 400)
    else:
        wrapper = ragged_wrapper("triton", use_cuda_graph=True, qo_indptr_buf=qo_buffer, kv_indptr_buf=indptr)
        static = tuple(torch.zeros(6000, 2, 64, dtype=DTYPE, device=DEVICE) for _ in range(2))
    q = torch.zeros(rows, 8, 64, dtype=DTYPE, device=DEVICE)
    out, lse = torch.zeros_like(q), torch.zeros(rows, 8, device=DEVICE)
    graph = None
    for qo_lens, kv_lens in zip(QO_BATCHES, BATCHES, strict=True):
        problem = make(replace(case, qo_lens=qo_lens, kv_lens=kv_lens))
        nnz = sum(qo_lens)
        q[:nnz].copy_(problem.q)
        qo_indptr = prefix_sum(qo_lens, index_device)
        if kind == "paged":
            cache = paged_cache(problem, rng)
            move_in(static, cache)
            plan_prefill(wrapper, problem, cache.plan_arguments(index_device), qo_indptr)
        else:
            for where, what in zip(static, (problem.k, problem.v), strict=True):
                where.fill_(float("nan"))
                where[: sum(kv_lens)] = torch.cat(what)
            plan_ragged(wrapper, problem, prefix_sum(kv_lens, index_device), qo_indptr)
        if graph is None:
            given = (static,) if kind == "paged" else static
            graph = captured(lambda given=given: wrapper.run(q, *given, out=out, lse=lse, return_lse=True))
        out.fill_(float("nan")), lse.fill_(float("nan"))
        graph.replay()
        check(problem, out[:nnz], lse[:nnz])


def test_graph_batch_size_is_fixed(rng):
    case = decode_of(Case((), (20, 30), dtype=DTYPE))
    indptr, indices, last = buffers(4, 100)
    wrapper = decode_wrapper(
        case, "triton", use_cuda_graph=True, paged_kv_indptr_buffer=indptr, paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last,
    )  # fmt: skip
    problem = make(case)
    with pytest.raises(ValueError, match="batch"):
        plan_decode(wrapper, case, paged_cache(problem, rng).plan_arguments())


def need(num_bytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < num_bytes:
        pytest.skip(f"needs {num_bytes >> 30} GiB of free GPU memory")


def far_cache(page_size: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A K and a V cache of a little more than 2^31 elements each."""
    num_pages = (1 << 31) // (page_size * heads * dim) + 64
    need(3 * num_pages * page_size * heads * dim * 2)
    return tuple(torch.full((num_pages, page_size, heads, dim), float("nan"), dtype=DTYPE, device=DEVICE)
                 for _ in range(2))  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_past_2_to_the_31_elements(page_size, rng):
    case = Case((3, 1), (100, 47), 8, 8, 128, dtype=DTYPE, page_size=page_size, causal=True)
    problem = make(case)
    kv = far_cache(page_size, 8, 128)
    small = paged_cache(problem, rng, spare_pages=0)
    count = small.kv[0].shape[0]
    for far, near in zip(kv, small.kv, strict=True):
        far[-count:] = near
    indptr, indices, last = small.plan_arguments()
    indices = indices + (kv[0].shape[0] - count)
    wrapper = prefill_wrapper(case, "triton")
    plan_prefill(wrapper, problem, (indptr, indices, last))
    check(problem, *wrapper.run(problem.q, kv, return_lse=True))
    decode = replace(problem, case=decode_of(case), q=problem.q[:2])
    wrapper = decode_wrapper(case, "triton")
    plan_decode(wrapper, decode.case, (indptr, indices, last))
    check(decode, *wrapper.run(decode.q, kv, return_lse=True))


def test_ragged_tokens_past_2_to_the_31_elements():
    problem = make(Case((5,), (100,), 8, 8, 128, dtype=DTYPE, causal=True))
    k, v = (x.view(-1, 8, 128) for x in far_cache(1, 8, 128))
    k[-100:], v[-100:] = problem.k[0], problem.v[0]
    end = k.shape[0]
    wrapper = ragged_wrapper("triton")
    plan_ragged(wrapper, problem, torch.tensor([end - 100, end], dtype=torch.int32))
    check(problem, *wrapper.run(problem.q, k, v, return_lse=True))


def test_queries_past_2_to_the_31_elements():
    """Query and output rows beyond 2^31 elements: many rows of one key each."""
    rows = (1 << 31) // (8 * 128) + 5
    need(5 * rows * 8 * 128 * 2)
    q = torch.zeros(rows, 8, 128, dtype=DTYPE, device=DEVICE)
    k, v = (torch.randn(1, 8, 128, device=DEVICE).to(DTYPE) for _ in range(2))
    q[-5:] = torch.randn(5, 8, 128, device=DEVICE).to(DTYPE)
    out = flashinfer.single_prefill_with_kv_cache(q, k, v, backend="triton")
    for block in out.split(1 << 18):
        assert block.equal(v.expand_as(block))


def test_another_stream(rng):
    """plan and run on a stream of their own."""
    problem: Problem = make(Case((5, 9), (300, 70), dtype=DTYPE, causal=True))
    cache = paged_cache(problem, rng)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend="triton")
        plan_prefill(wrapper, problem, cache.plan_arguments())
        result = wrapper.run(problem.q, cache.kv, return_lse=True)
    torch.cuda.current_stream().wait_stream(stream)
    check(problem, *result)
