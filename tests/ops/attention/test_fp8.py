"""fp8 keys and values with float or tensor scales."""

from __future__ import annotations

import pytest
import torch

import flashinfer

from .common import (
    DEVICE,
    PREFILLS,
    Case,
    check,
    decode_of,
    decode_wrapper,
    make,
    paged_cache,
    plan_decode,
    plan_prefill,
    prefill_wrapper,
    run_decode,
    size,
)

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
CACHES = [("tuple", "NHD", 16), ("5d", "HND", 5), ("packed", "NHD", 3), ("tuple3d", "NHD", 1)]


def fp8_case(kv_dtype, dtypes, rng, backend, cache=CACHES[0], **options) -> Case:
    cache_form, kv_layout, page_size = cache
    dtype = dtypes.pick(rng, backend)
    given = {"k_scale": 0.37, "v_scale": 1.7, **options}
    lengths = ((5, 1, 12), (size(40, 700), 33, 12))
    return Case(*lengths, dtype=dtype, kv_dtype=kv_dtype, page_size=page_size, kv_layout=kv_layout,
                cache_form=cache_form, **given)  # fmt: skip


@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_paged(kv_dtype, cache, backend, dtypes, rng):
    problem = make(fp8_case(kv_dtype, dtypes, rng, backend, cache, causal=True))
    check(problem, *PREFILLS["paged"](problem, backend, rng))
    problem = make(decode_of(problem.case))
    check(problem, *run_decode(problem, backend, rng))


@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
@pytest.mark.parametrize("entry", ["ragged", "single"])
def test_ragged_and_single(kv_dtype, entry, backend, dtypes, rng):
    problem = make(fp8_case(kv_dtype, dtypes, rng, backend, causal=True))
    check(problem, *PREFILLS[entry](problem, backend, rng))


@pytest.mark.parametrize("options", [
    {"k_scale": None, "v_scale": None},
    {"k_scale": 1.0, "v_scale": 1.0},
    {"pos_encoding_mode": "ROPE_LLAMA", "window_left": 9},
    {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 1.5},
    {"mask": "bool", "sm_scale": 0.9},
], ids=str)  # fmt: skip
def test_with_variants(options, backend, dtypes, rng):
    """A scale of K acts before the soft cap and leaves the ALiBi bias alone."""
    problem = make(fp8_case(rng.choice(FP8), dtypes, rng, backend, **options))
    check(problem, *PREFILLS["paged"](problem, backend, rng))


@pytest.mark.parametrize("kind", ["decode", "paged"])
def test_scales_as_tensors(kind, backend, dtypes, rng):
    """0-d and one-element float32 tensors mean the same as floats; q_scale joins k_scale."""
    case = fp8_case(rng.choice(FP8), dtypes, rng, backend)
    problem = make(decode_of(case) if kind == "decode" else case)
    cache = paged_cache(problem, rng)
    if kind == "decode":
        wrapper = decode_wrapper(case, backend)
        plan_decode(wrapper, problem.case, cache.plan_arguments())
    else:
        wrapper = prefill_wrapper(case, backend)
        plan_prefill(wrapper, problem, cache.plan_arguments())
    for shape in ((), (1,)):
        k_scale = torch.full(shape, 0.37, device=DEVICE)
        v_scale = torch.full(shape, 1.7, device=DEVICE)
        check(problem, *wrapper.run(problem.q, cache.kv, k_scale=k_scale, v_scale=v_scale, return_lse=True))
    halves = {"q_scale": 0.5, "k_scale": 0.74, "v_scale": 1.7}
    check(problem, *wrapper.run(problem.q, cache.kv, return_lse=True, **halves))


def test_scales_of_a_run_do_not_stay(backend, dtypes, rng):
    problem = make(fp8_case(FP8[0], dtypes, rng, backend, k_scale=None, v_scale=None))
    cache = paged_cache(problem, rng)
    wrapper = prefill_wrapper(problem.case, backend)
    plan_prefill(wrapper, problem, cache.plan_arguments())
    wrapper.run(problem.q, cache.kv, q_scale=2.0, k_scale=3.0, v_scale=4.0)
    check(problem, *wrapper.run(problem.q, cache.kv, return_lse=True))


def test_scales_without_fp8(backend, dtypes, rng):
    problem = make(Case(dtype=dtypes.pick(rng, backend), k_scale=1.5, v_scale=0.6, causal=True))
    for run in PREFILLS.values():
        check(problem, *run(problem, backend, rng))


@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
def test_single_decode(kv_dtype, dtypes, rng):
    problem = make(Case((1,), (50,), dtype=dtypes.pick(rng, "torch"), kv_dtype=kv_dtype, k_scale=0.3, v_scale=2.5))
    given = {"q_scale": 0.5, "k_scale": 0.6, "v_scale": 2.5}
    out, lse = flashinfer.single_decode_with_kv_cache(
        problem.q[0], problem.k[0], problem.v[0], return_lse=True, **given
    )
    check(problem, out[None], lse[None])
