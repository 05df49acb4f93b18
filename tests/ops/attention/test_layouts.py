"""Forms of the KV cache, strides, page tables and index tensors. Every slot without a token holds NaN."""

from __future__ import annotations

import pytest
import torch

import flashinfer

from .common import (
    DEVICE,
    ON_GPU,
    PREFILLS,
    Case,
    check,
    decode_of,
    decode_wrapper,
    make,
    paged_cache,
    plan_decode,
    plan_prefill,
    plan_ragged,
    poisoned,
    prefill_wrapper,
    prefix_sum,
    ragged_wrapper,
    run_decode,
    run_paged,
    scales,
    size,
)

CACHES = [
    ("tuple", "NHD", 16),
    ("tuple", "HND", 3),
    ("5d", "NHD", 5),
    ("5d", "HND", 64),
    ("packed", "NHD", 16),
    ("packed", "HND", 1),
    ("strided", "NHD", 3),
    ("strided", "HND", 16),
    ("tuple3d", "NHD", 1),
    ("tuple3d", "HND", 1),
    ("4d", "NHD", 1),
    ("4d", "HND", 1),
]


def cached(row, dtype, rng) -> Case:
    cache_form, kv_layout, page_size = row
    longest = size(50, 900)
    kv_lens = (page_size, page_size + 1, 2 * page_size, rng.randint(1, longest), 1, max(page_size - 1, 1))
    qo_lens = tuple(rng.randint(0, 9) for _ in kv_lens)
    return Case(
        qo_lens, kv_lens, 4, 2, 32, dtype=dtype, page_size=page_size, kv_layout=kv_layout, cache_form=cache_form,
        causal=True, strided_q=True,
    )  # fmt: skip


@pytest.mark.parametrize("row", CACHES, ids=str)
def test_prefill(row, backend, dtypes, rng):
    problem = make(cached(row, dtypes.pick(rng, backend), rng))
    check(problem, *run_paged(problem, backend, rng))


@pytest.mark.parametrize("row", CACHES, ids=str)
def test_decode(row, backend, dtypes, rng):
    problem = make(decode_of(cached(row, dtypes.pick(rng, backend), rng)))
    check(problem, *run_decode(problem, backend, rng))


def test_packed_cache_of_unequal_head_dims(backend, dtypes, rng):
    problem = make(Case(dtype=dtypes.pick(rng, backend), head_dim=64, head_dim_vo=32, cache_form="packed"))
    check(problem, *run_paged(problem, backend, rng))


@pytest.mark.parametrize("entry", PREFILLS)
def test_q_as_a_view(entry, backend, dtypes, rng):
    """q is a slice of a wider tensor, as after a fused QKV projection; what lies around it is NaN."""
    problem = make(Case(dtype=dtypes.pick(rng, backend), strided_q=True))
    assert not problem.q.is_contiguous()
    check(problem, *PREFILLS[entry](problem, backend, rng))


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_single_kv_as_views(kv_layout, backend, dtypes, rng):
    """K and V interleaved token by token in one tensor of the other layout."""
    case = Case((6,), (23,), dtype=dtypes.pick(rng, backend), causal=True, kv_layout=kv_layout)
    problem = make(case)
    both = poisoned((case.num_kv_heads, 23, 2, case.head_dim), case.dtype, DEVICE)
    both[:, :, 0] = problem.k[0].transpose(0, 1)
    both[:, :, 1] = problem.v[0].transpose(0, 1)
    k, v = both[:, :, 0], both[:, :, 1]
    if kv_layout == "NHD":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    given = {"causal": True, "kv_layout": kv_layout, "backend": backend}
    check(problem, *flashinfer.single_prefill_with_kv_cache(problem.q, k, v, return_lse=True, **given))


def slice_case(dtype) -> Case:
    return Case((4, 2, 1, 6, 3), (20, 9, 30, 6, 14), dtype=dtype, causal=True)


def of_requests(problem, first: int):
    """The problem of the requests from `first` on."""
    case = problem.case
    qo = prefix_sum(case.qo_lens)
    rest = Case(case.qo_lens[first:], case.kv_lens[first:], dtype=case.dtype, causal=case.causal)
    return type(problem)(rest, problem.q[qo[first] :], problem.k[first:], problem.v[first:])


def test_absolute_paged_kv_indptr(backend, dtypes, rng):
    """A slice of a larger batch's indptr, not starting at 0, into the larger batch's page list (as vLLM passes it)."""
    whole = make(slice_case(dtypes.pick(rng, backend)))
    cache = paged_cache(whole, rng)
    part = of_requests(whole, 2)
    indptr, indices, last = cache.plan_arguments()
    assert indptr[2] > 0
    wrapper = prefill_wrapper(part.case, backend)
    plan_prefill(wrapper, part, (indptr[2:], indices, last[2:]))
    check(part, *wrapper.run(part.q, cache.kv, return_lse=True))


def test_absolute_paged_kv_indptr_decode(backend, dtypes, rng):
    whole = make(decode_of(slice_case(dtypes.pick(rng, backend))))
    cache = paged_cache(whole, rng)
    part = of_requests(whole, 2)
    indptr, indices, last = cache.plan_arguments()
    wrapper = decode_wrapper(part.case, backend)
    plan_decode(wrapper, part.case, (indptr[2:], indices, last[2:]))
    check(part, *wrapper.run(part.q, cache.kv, return_lse=True))


def test_absolute_ragged_kv_indptr(backend, dtypes, rng):
    whole = make(slice_case(dtypes.pick(rng, backend)))
    part = of_requests(whole, 2)
    k, v = torch.cat(whole.k), torch.cat(whole.v)
    k[: sum(whole.case.kv_lens[:2])] = float("nan")
    wrapper = ragged_wrapper(backend)
    plan_ragged(wrapper, part, prefix_sum(whole.case.kv_lens)[2:])
    check(part, *wrapper.run(part.q, k, v, return_lse=True))


def test_pages_shared_by_requests(backend, dtypes, rng):
    """Two requests with a common prefix list the same pages."""
    case = Case((3, 2), (20, 20), dtype=dtypes.pick(rng, backend), causal=True, page_size=5)
    problem = make(case)
    problem.k[1][:10], problem.v[1][:10] = problem.k[0][:10], problem.v[0][:10]
    cache = paged_cache(problem, rng)
    cache.indices[4:6] = cache.indices[0:2]
    wrapper = prefill_wrapper(case, backend)
    plan_prefill(wrapper, problem, cache.plan_arguments())
    check(problem, *wrapper.run(problem.q, cache.kv, return_lse=True))


def test_indices_longer_than_needed(backend, dtypes, rng):
    """Entries of the page list past indptr[-1] are not read."""
    problem = make(Case(dtype=dtypes.pick(rng, backend)))
    cache = paged_cache(problem, rng)
    indptr, indices, last = cache.plan_arguments()
    indices = torch.cat([indices, torch.full((9,), 2**31 - 1, dtype=torch.int32, device=DEVICE)])
    wrapper = prefill_wrapper(problem.case, backend)
    plan_prefill(wrapper, problem, (indptr, indices, last))
    check(problem, *wrapper.run(problem.q, cache.kv, return_lse=True))


def test_last_page_len_without_pages_may_be_anything(backend, dtypes, rng):
    problem = make(Case((2, 3, 1), (11, 0, 0), dtype=dtypes.pick(rng, backend)))
    cache = paged_cache(problem, rng)
    cache.last_page_len[1:] = torch.tensor([0, 77])
    wrapper = prefill_wrapper(problem.case, backend)
    plan_prefill(wrapper, problem, cache.plan_arguments())
    check(problem, *wrapper.run(problem.q, cache.kv, return_lse=True))


@pytest.mark.skipif(not ON_GPU, reason="index tensors can be on one device only")
@pytest.mark.parametrize("index_device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["decode", "paged", "ragged"])
def test_index_tensors_on_host_or_device(kind, index_device, backend, dtypes, rng):
    problem = make(Case(dtype=dtypes.pick(rng, backend)))
    if kind == "decode":
        problem = make(decode_of(problem.case))
    cache = paged_cache(problem, rng)
    indices = cache.plan_arguments(index_device)
    qo_indptr = prefix_sum(problem.case.qo_lens, index_device)
    if kind == "decode":
        wrapper = decode_wrapper(problem.case, backend)
        plan_decode(wrapper, problem.case, indices)
        result = wrapper.run(problem.q, cache.kv, return_lse=True)
    elif kind == "paged":
        wrapper = prefill_wrapper(problem.case, backend)
        plan_prefill(wrapper, problem, indices, qo_indptr)
        result = wrapper.run(problem.q, cache.kv, return_lse=True)
    else:
        wrapper = ragged_wrapper(backend)
        plan_ragged(wrapper, problem, prefix_sum(problem.case.kv_lens, index_device), qo_indptr=qo_indptr)
        result = wrapper.run(problem.q, torch.cat(problem.k), torch.cat(problem.v), return_lse=True)
    check(problem, *result)


def test_inputs_are_left_unchanged(backend, dtypes, rng):
    problem = make(Case(dtype=dtypes.pick(rng, backend), mask="bool", k_scale=0.5, pos_encoding_mode="ROPE_LLAMA"))
    cache = paged_cache(problem, rng)
    arguments = cache.plan_arguments()
    mask = problem.mask_arguments()["custom_mask"]
    tensors = [problem.q, *cache.kv, *arguments, mask]
    before = [t.clone() for t in tensors]
    wrapper = prefill_wrapper(problem.case, backend)
    plan_prefill(wrapper, problem, arguments)
    wrapper.run(problem.q, cache.kv, return_lse=True, **scales(problem.case))
    for now, then in zip(tensors, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
