"""Wrappers over time: planning again, aliases and overrides, given outputs, determinism, batch invariance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flashinfer

from .common import (
    DEVICE,
    PREFILLS,
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
    poisoned,
    prefill_wrapper,
    prefix_sum,
    ragged_wrapper,
    random_lengths,
    run_decode,
    run_paged,
    size,
    workspace,
)


def test_planned_again_and_again(backend, dtypes, rng):
    """One wrapper, batches growing and shrinking, other heads, page sizes and options."""
    dtype = dtypes.pick(rng, backend)
    prefill, decode = prefill_wrapper(Case(), backend), decode_wrapper(Case(), backend)
    for batch in (3, 1, 6, 2):
        lengths = random_lengths(rng, batch, size(30, 600))
        heads = rng.choice([(4, 2, 32), (3, 1, 16)])
        problem = make(Case(*lengths, *heads, dtype=dtype, page_size=rng.choice((1, 5)), causal=batch % 2 == 0))
        cache = paged_cache(problem, rng)
        plan_prefill(prefill, problem, cache.plan_arguments())
        check(problem, *prefill.run(problem.q, cache.kv, return_lse=True))
        problem = make(decode_of(problem.case))
        cache = paged_cache(problem, rng)
        plan_decode(decode, problem.case, cache.plan_arguments())
        check(problem, *decode.run(problem.q, cache.kv, return_lse=True))


def test_ragged_planned_again(backend, dtypes, rng):
    dtype = dtypes.pick(rng, backend)
    wrapper = ragged_wrapper(backend)
    for batch in (2, 5, 1):
        problem = make(Case(*random_lengths(rng, batch, size(30, 600)), dtype=dtype, causal=True))
        plan_ragged(wrapper, problem)
        check(problem, *wrapper.run(problem.q, torch.cat(problem.k), torch.cat(problem.v), return_lse=True))


def test_one_plan_serves_many_layers(backend, dtypes, rng):
    """Two runs of one plan over other tensors, then the first again: nothing of a run stays behind."""
    case = Case(dtype=dtypes.pick(rng, backend), causal=True)
    wrapper = prefill_wrapper(case, backend)
    layers = [make(case) for _ in range(2)]
    seed = rng.getrandbits(32)
    caches = [paged_cache(layer, type(rng)(seed)) for layer in layers]
    plan_prefill(wrapper, layers[0], caches[0].plan_arguments())
    results = [wrapper.run(p.q, c.kv, return_lse=True) for p, c in zip(layers, caches, strict=True)]
    for problem, result in zip(layers, results, strict=True):
        check(problem, *result)
    again = wrapper.run(layers[0].q, caches[0].kv, return_lse=True)
    assert all(a.equal(b) for a, b in zip(again, results[0], strict=True))


def prefill_ready(problem: Problem, backend, rng):
    cache = paged_cache(problem, rng)
    wrapper = prefill_wrapper(problem.case, backend)
    plan_prefill(wrapper, problem, cache.plan_arguments())
    return wrapper, (problem.q, cache.kv)


def decode_ready(problem: Problem, backend, rng):
    cache = paged_cache(problem, rng)
    wrapper = decode_wrapper(problem.case, backend)
    plan_decode(wrapper, problem.case, cache.plan_arguments())
    return wrapper, (problem.q, cache.kv)


def ragged_ready(problem: Problem, backend, rng):
    wrapper = ragged_wrapper(backend)
    plan_ragged(wrapper, problem)
    return wrapper, (problem.q, torch.cat(problem.k), torch.cat(problem.v))


READY = {"decode": decode_ready, "paged": prefill_ready, "ragged": ragged_ready}


def of_kind(kind: str, case: Case) -> Problem:
    return make(decode_of(case) if kind == "decode" else case)


@pytest.mark.parametrize("kind", READY)
def test_given_out_and_lse(kind, backend, dtypes, rng):
    """out= and lse= are filled wholly and returned; the rows around a view into a larger tensor are left alone."""
    problem = of_kind(kind, Case(dtype=dtypes.pick(rng, backend), head_dim=16))
    wrapper, arguments = READY[kind](problem, backend, rng)
    rows, heads = problem.q.shape[:2]
    wide = poisoned((rows + 2, heads, 16), problem.case.dtype, DEVICE)
    out, lse = wide[1:-1], poisoned((rows, heads), torch.float32, DEVICE)
    got, got_lse = wrapper.run(*arguments, out=out, lse=lse, return_lse=True)
    assert got.data_ptr() == out.data_ptr() and got_lse.data_ptr() == lse.data_ptr()
    check(problem, out, lse)
    assert wide[0].isnan().all() and wide[-1].isnan().all()
    out.fill_(float("nan"))
    assert wrapper.run(*arguments, out=out).data_ptr() == out.data_ptr()
    check(problem, out)


def test_given_out_of_rows_without_keys(backend, dtypes, rng):
    """Rows that see no key are written too."""
    problem = make(Case((3, 2, 4), (0, 9, 1), dtype=dtypes.pick(rng, backend), causal=True))
    wrapper, arguments = prefill_ready(problem, backend, rng)
    out, lse = (
        poisoned(problem.q.shape, problem.case.dtype, DEVICE),
        poisoned(problem.q.shape[:2], torch.float32, DEVICE),
    )
    wrapper.run(*arguments, out=out, lse=lse, return_lse=True)
    check(problem, out, lse)


@pytest.mark.parametrize("kind", READY)
def test_run_return_lse_is_run_with_lse(kind, backend, dtypes, rng):
    problem = of_kind(kind, Case(dtype=dtypes.pick(rng, backend)))
    wrapper, arguments = READY[kind](problem, backend, rng)
    out, lse = wrapper.run_return_lse(*arguments)
    check(problem, out, lse)


OVERRIDES = {"causal": True, "sm_scale": 0.4, "window_left": 6, "logits_soft_cap": 3.0, "pos_encoding_mode": "ALIBI"}


@pytest.mark.parametrize("kind", READY)
def test_old_names_override_the_plan_for_one_call(kind, backend, dtypes, rng):
    """forward(causal=..., sm_scale=..., ...) and forward_return_lse override; a later run has the plan's again."""
    problem = of_kind(kind, Case(dtype=dtypes.pick(rng, backend), sm_scale=0.9))
    wrapper, arguments = READY[kind](problem, backend, rng)
    given = {k: v for k, v in OVERRIDES.items() if kind != "decode" or k != "causal"}
    other = replace(problem, case=replace(problem.case, **given))
    check(other, *wrapper.forward_return_lse(*arguments, **given))
    check(other, wrapper.forward(*arguments, **given))
    check(problem, *wrapper.run(*arguments, return_lse=True))
    plain = replace(problem, case=replace(problem.case, sm_scale=None))
    check(plain, wrapper.forward(*arguments))
    wrapper.end_forward()


@pytest.mark.parametrize("kind", READY)
def test_begin_forward_is_plan(kind):
    owner = {
        "decode": flashinfer.BatchDecodeWithPagedKVCacheWrapper,
        "paged": flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        "ragged": flashinfer.BatchPrefillWithRaggedKVCacheWrapper,
    }[kind]
    assert owner.begin_forward is owner.plan


def test_window_given_to_run_as_planned(backend, dtypes, rng):
    problem = make(Case(dtype=dtypes.pick(rng, backend), window_left=4, causal=True))
    wrapper, arguments = prefill_ready(problem, backend, rng)
    check(problem, wrapper.run(*arguments, window_left=4))


@pytest.mark.parametrize("kind", READY)
def test_runs_are_bitwise_equal(kind, backend, dtypes, rng):
    """Again on the same wrapper, and on a new one: the merge of partial results has a fixed order."""
    lengths = ((2, 1, 30), (size(100, 9000), 40, size(60, 3000)))
    problem = of_kind(kind, Case(*lengths, 4, 1, dtype=dtypes.pick(rng, backend), page_size=16))
    seed = rng.getrandbits(32)
    wrapper, arguments = READY[kind](problem, backend, type(rng)(seed))
    first = wrapper.run(*arguments, return_lse=True)
    for _ in range(size(1, 20)):
        assert all(a.equal(b) for a, b in zip(first, wrapper.run(*arguments, return_lse=True), strict=True))
    wrapper, arguments = READY[kind](problem, backend, type(rng)(seed))
    assert all(a.equal(b) for a, b in zip(first, wrapper.run(*arguments, return_lse=True), strict=True))


def single_request(problem: Problem, i: int) -> Problem:
    case = replace(problem.case, qo_lens=problem.case.qo_lens[i : i + 1], kv_lens=problem.case.kv_lens[i : i + 1])
    return Problem(case, problem.q_rows()[i], [problem.k[i]], [problem.v[i]])


@pytest.mark.parametrize("split_pages", [1, 4])
def test_decode_is_batch_invariant(split_pages, backend, dtypes, rng):
    """With fixed_split_size a request gives the same bits alone and in any batch."""
    kv_lens = (17, size(140, 5000), 1, size(64, 1024), 33)
    problem = make(decode_of(Case((), kv_lens, 4, 1, dtype=dtypes.pick(rng, backend), page_size=16)))
    invariant = {"fixed_split_size": split_pages * size(1, 16)}
    cache = paged_cache(problem, rng)
    wrapper = decode_wrapper(problem.case, backend, use_tensor_cores=True)
    plan_decode(wrapper, problem.case, cache.plan_arguments(), **invariant)
    out, lse = wrapper.run(problem.q, cache.kv, return_lse=True)
    check(problem, out, lse)
    for i in range(len(kv_lens)):
        alone = single_request(problem, i)
        cache = paged_cache(alone, rng)
        plan_decode(wrapper, alone.case, cache.plan_arguments(), **invariant)
        got, got_lse = wrapper.run(alone.q, cache.kv, return_lse=True)
        assert got[0].equal(out[i]) and got_lse[0].equal(lse[i]), f"request {i}"


def test_prefill_is_batch_invariant(backend, dtypes, rng):
    lengths = ((3, 20, 1, 9), (40, size(90, 3000), 70, 9))
    problem = make(Case(*lengths, 4, 1, dtype=dtypes.pick(rng, backend), page_size=16, causal=True))
    invariant = {"fixed_split_size": size(2, 16)}
    out, lse = run_paged(problem, backend, rng, **invariant)
    check(problem, out, lse)
    starts = prefix_sum(problem.case.qo_lens).tolist()
    for i in range(4):
        got, got_lse = run_paged(single_request(problem, i), backend, rng, **invariant)
        rows = slice(starts[i], starts[i + 1])
        assert got.equal(out[rows]) and got_lse.equal(lse[rows]), f"request {i}"


@pytest.mark.parametrize("kind", ["decode", "paged"])
def test_without_split(kind, backend, dtypes, rng):
    problem = of_kind(kind, Case(dtype=dtypes.pick(rng, backend), kv_lens=(100, 33, 12)))
    run = {"decode": run_decode, "paged": run_paged}[kind]
    check(problem, *run(problem, backend, rng, disable_split_kv=True))


@pytest.mark.parametrize("use_tensor_cores", [False, True])
def test_decode_with_and_without_tensor_cores(use_tensor_cores, backend, dtypes, rng):
    problem = make(decode_of(Case(dtype=dtypes.pick(rng, backend))))
    cache = paged_cache(problem, rng)
    wrapper = decode_wrapper(problem.case, backend, use_tensor_cores=use_tensor_cores)
    assert wrapper.use_tensor_cores == use_tensor_cores
    assert not wrapper.is_cuda_graph_enabled
    plan_decode(wrapper, problem.case, cache.plan_arguments())
    check(problem, *wrapper.run(problem.q, cache.kv, return_lse=True))


def test_several_queries_per_request_in_decode(backend, dtypes, rng):
    """q_len_per_req (speculative decoding): causal within the block of queries."""
    problem = make(Case((3, 3, 3), (20, 3, 47), dtype=dtypes.pick(rng, backend), causal=True))
    cache = paged_cache(problem, rng)
    wrapper = decode_wrapper(problem.case, backend, use_tensor_cores=True)
    plan_decode(wrapper, problem.case, cache.plan_arguments(), q_len_per_req=3)
    check(problem, *wrapper.run(problem.q, cache.kv, return_lse=True))


def test_legacy_positional_options_of_decode_plan(backend, dtypes, rng):
    """pos_encoding_mode, window_left, logits_soft_cap, q, kv, o dtype by position, with a DeprecationWarning."""
    problem = make(decode_of(Case(dtype=dtypes.pick(rng, backend), pos_encoding_mode="ALIBI", window_left=9)))
    case, cache = problem.case, paged_cache(problem, rng)
    wrapper = decode_wrapper(case, backend)
    heads = (case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size)
    with pytest.warns(DeprecationWarning, match="position"):
        wrapper.plan(*cache.plan_arguments(), *heads, "ALIBI", 9, None, case.dtype, case.dtype)
    check(problem, wrapper.run(problem.q, cache.kv))


def test_data_type_fills_what_is_unset_and_dtypes_may_be_names(backend, rng):
    problem = make(decode_of(Case(dtype=torch.float16)))
    case, cache = problem.case, paged_cache(problem, rng)
    heads = (case.num_qo_heads, case.num_kv_heads, case.head_dim, case.page_size)
    for given in ({}, {"data_type": "float16"}, {"data_type": torch.float32, "q_data_type": "float16",
                                                 "kv_data_type": torch.float16}):  # fmt: skip
        wrapper = decode_wrapper(case, backend)
        wrapper.plan(*cache.plan_arguments(), *heads, **given)
        check(problem, wrapper.run(problem.q, cache.kv))


@pytest.mark.parametrize("num_bytes", [16, 1 << 22])
def test_any_workspace_will_do(num_bytes, backend, dtypes, rng):
    """The user's buffer is accepted and need not be large enough."""
    problem = make(decode_of(Case((), (size(150, 20_000), 40), 4, 1, dtype=dtypes.pick(rng, backend), page_size=16)))
    cache = paged_cache(problem, rng)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(num_bytes), "NHD", backend=backend)
    plan_decode(wrapper, problem.case, cache.plan_arguments())
    check(problem, *wrapper.run(problem.q, cache.kv, return_lse=True))


def test_wrappers_may_share_a_workspace(backend, dtypes, rng):
    shared = workspace(1 << 20)
    problems = [make(decode_of(Case((), (n, 40), 4, 1, dtype=dtypes.pick(rng, backend)))) for n in (90, 20)]
    caches = [paged_cache(p, rng) for p in problems]
    wrappers = [flashinfer.BatchDecodeWithPagedKVCacheWrapper(shared, backend=backend) for _ in problems]
    for wrapper, problem, cache in zip(wrappers, problems, caches, strict=True):
        plan_decode(wrapper, problem.case, cache.plan_arguments())
    for wrapper, problem, cache in zip(wrappers, problems, caches, strict=True):
        check(problem, *wrapper.run(problem.q, cache.kv, return_lse=True))


def test_reset_workspace_buffer(backend, dtypes, rng):
    problem = make(Case(dtype=dtypes.pick(rng, backend)))
    cache = paged_cache(problem, rng)
    wrapper = prefill_wrapper(problem.case, backend)
    plan_prefill(wrapper, problem, cache.plan_arguments())
    wrapper.reset_workspace_buffer(workspace(1 << 12), workspace(1 << 12))
    plan_prefill(wrapper, problem, cache.plan_arguments())
    check(problem, *wrapper.run(problem.q, cache.kv, return_lse=True))


@pytest.mark.parametrize("entry", ["paged", "ragged"])
def test_output_dtype(entry, backend, rng):
    """o_data_type: float16 inputs, float32 result; judged as a float16 computation."""
    problem = make(Case(dtype=torch.float16))
    out, lse = PREFILLS[entry](problem, backend, rng, o_data_type=torch.float32)
    assert out.dtype == torch.float32
    check(problem, out.half(), lse)
