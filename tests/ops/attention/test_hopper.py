"""The Hopper prefill: every option in its own kernel, what it refuses and why, and random cases in numbers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import flashinfer
from flashinfer.core.arch import arch_of
from flashinfer.core.select import BackendSupportedError
from flashinfer.device.language import tl
from flashinfer.ops.attention.support import gluon_sm90_supports
from flashinfer.ops.attention.variants import Twin, variant
from flashinfer.ops.attention.wrapper import attention_spec
from flashinfer.testing import poisoned

from .common import (
    DEVICE,
    PREFILLS,
    Case,
    check,
    make,
    paged_cache,
    plan_prefill,
    plan_ragged,
    prefill_wrapper,
    ragged_wrapper,
    random_lengths,
    run_paged,
    run_ragged,
)

HALVES = (torch.float16, torch.bfloat16)
SPEC = attention_spec((8, 2), (128, 128), 16, (torch.bfloat16,) * 3)
HERE = gluon_sm90_supports(SPEC, arch_of(DEVICE))
on_hopper = pytest.mark.skipif(HERE is not None, reason=f"no Hopper prefill here: {HERE}")
BACKEND = "fa3"
# Empty requests, single queries, ends inside, at and past tiles of 64 and 128, kv_len < qo_len, no KV.
LENGTHS = ((1, 77, 128, 300, 5, 0, 129, 3), (1, 200, 128, 300, 64, 40, 0, 1100))
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_left": 70},
    "window alone": {"window_left": 130},
    "window 0": {"causal": True, "window_left": 0},
    "cap": {"causal": True, "logits_soft_cap": 1.5},
    "alibi": {"pos_encoding_mode": "ALIBI", "causal": True},
    "capped alibi window": {
        "pos_encoding_mode": "ALIBI", "causal": True, "logits_soft_cap": 3.0, "window_left": 150,
    },
    "mask": {"mask": "bool"},
    "mask window": {"mask": "packed", "window_left": 90},
    "negative sm_scale": {"sm_scale": -0.2, "causal": True},
    "scales": {"k_scale": 0.7, "v_scale": 1.4, "causal": True},
    "no cap": {"causal": True, "logits_soft_cap": 1e9},
}  # fmt: skip


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("entry", PREFILLS)
def test_options(entry, option, head_dim, rng):
    heads = rng.choice([(8, 2), (6, 2), (5, 5), (7, 1)])
    case = Case(*LENGTHS, *heads, head_dim, dtype=rng.choice(HALVES), page_size=16, **OPTIONS[option])
    problem = make(case)
    check(problem, *PREFILLS[entry](problem, BACKEND, rng))


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window_left", [-1, 0, 63, 64, 127, 128, 255, 1023])
def test_edges_of_tiles(window_left, head_dim, rng):
    """Where the diagonal or the window's edge leaves half of a tile, a warpgroup multiplies the other half only."""
    lens = [(qo, qo + more) for qo in (64, 128, 129, 192, 300) for more in (-20, 0, 1, 63, 64, 65, 127, 128, 1000)]
    rng.shuffle(lens)
    given = {"dtype": rng.choice(HALVES), "page_size": 16, "causal": True, "window_left": window_left}
    problem = make(Case(*zip(*lens, strict=True), 2, 1, head_dim, **given))
    for run in (run_ragged, run_paged):
        check(problem, *run(problem, BACKEND, rng))


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("cap", "dtype"), [(50.0, HALVES[1]), (50.0, HALVES[0]), (60.0, HALVES[1])])
@pytest.mark.parametrize("entry", PREFILLS)
def test_logits_at_both_ends_of_the_cap(entry, cap, dtype, head_dim, rng):
    """bf16 with a cap up to 55 keeps no running maximum; fp16 and larger caps do."""
    case = Case(*LENGTHS, 6, 2, head_dim, dtype=dtype, page_size=16, causal=True, logits_soft_cap=cap, sm_scale=2.0)
    problem = make(case)
    check(problem, *PREFILLS[entry](problem, BACKEND, rng))


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sinks_beside_a_cap(head_dim, rng):
    """Rows that see nothing have the sink alone, however small it is."""
    given = {"dtype": torch.bfloat16, "page_size": 16, "causal": True, "logits_soft_cap": 50.0}
    problem = make(Case(*LENGTHS, 4, 2, head_dim, **given))
    cache, sinks = paged_cache(problem, rng), torch.tensor([0.5, -1.0, -300.0, 40.0], device=DEVICE)
    results = []
    for backend in (BACKEND, "torch"):
        wrapper = prefill_wrapper(problem.case, backend)
        plan_prefill(wrapper, problem, cache.plan_arguments())
        results.append(wrapper.run(problem.q, cache.kv, return_lse=True, sinks=sinks))
    (out, lse), (expected, expected_lse) = results
    largest = float(torch.cat(problem.v).abs().max())
    torch.testing.assert_close(out, expected, rtol=0, atol=2 * torch.finfo(torch.bfloat16).eps * largest)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=2e-2)


@on_hopper
@pytest.mark.parametrize("cache_form", ["tuple", "5d", "packed", "strided"])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 2, 5, 8, 12, 24, 64, 128, 192])
def test_pages(page_size, kv_layout, cache_form, rng):
    case = Case(*LENGTHS, 4, 2, rng.choice((64, 128, 256)), dtype=rng.choice(HALVES), page_size=page_size,
                kv_layout=kv_layout, cache_form=cache_form, causal=rng.random() < 0.5)  # fmt: skip
    problem = make(case)
    check(problem, *run_paged(problem, BACKEND, rng))


def _louder(captured, x, at):
    return x + tl.load(captured[0] + at.qo_head) * tl.where(at.kv_idx % 2 == 0, 1.0, 0.0)


def _louder_twin(captured, x, at):
    return x + captured[0][at.qo_head] * (at.kv_idx % 2 == 0)


def _thirds(captured, at):
    return (at.kv_idx + at.qo_idx) % 3 != 0


@on_hopper
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_sinks_factors_of_heads_and_a_users_hooks(head_dim, page_size, rng):
    """What the oracle does not know, against the torch implementation."""
    problem = make(Case(*LENGTHS, 6, 2, head_dim, dtype=torch.bfloat16, page_size=page_size, causal=True))
    cache = paged_cache(problem, rng)
    per_head = {
        name: torch.rand(n, device=DEVICE) + 0.5 for name, n in (("q_scale", 6), ("k_scale", 2), ("v_scale", 2))
    }
    per_head["sinks"] = torch.randn(6, device=DEVICE)
    bias = torch.randn(6, device=DEVICE)
    mine = variant("mine", captured=(bias,), logits=_louder, mask=_thirds, twin=Twin(logits=_louder_twin, mask=_thirds))
    results = []
    for backend in (BACKEND, "torch"):
        wrapper = prefill_wrapper(problem.case, backend, jit_args=mine)
        plan_prefill(wrapper, problem, cache.plan_arguments())
        results.append(wrapper.run(problem.q, cache.kv, return_lse=True, **per_head))
        assert torch.equal(wrapper.run(problem.q, cache.kv, **per_head), results[-1][0])
    (out, lse), (expected, expected_lse) = results
    # Both round the weights and the output to bf16 once each.
    largest = float(torch.cat(problem.v).abs().max() * per_head["v_scale"].max())
    torch.testing.assert_close(out, expected, rtol=0, atol=2 * torch.finfo(torch.bfloat16).eps * largest)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-2)


@on_hopper
@pytest.mark.parametrize("lens", [(1024,) * 40, (3000, 1, 900, 2500), (130,) * 300], ids=["even", "skew", "many"])
def test_many_items(lens, rng):
    """More work items than programs: each program goes round its rings many times."""
    case = Case(lens, lens, 4, 2, 128, dtype=rng.choice(HALVES), page_size=64, causal=True)
    check(problem := make(case), *run_ragged(problem, BACKEND, rng))
    for page_size in (1, 64):
        check(problem := make(replace(case, page_size=page_size)), *run_paged(problem, BACKEND, rng))


@on_hopper
@pytest.mark.parametrize("page_size", [1, 64])
def test_page_numbers_past_2_to_the_31_elements(page_size, rng):
    """A cache of more than 2^31 elements: the last pages are used."""
    heads, dim = 2, 128
    pages = (1 << 31) // (page_size * heads * dim) + 1000
    kv = [torch.empty(pages, page_size, heads, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    problem = make(Case((200, 300), (200, 500), 4, heads, dim, dtype=torch.bfloat16, page_size=page_size, causal=True))
    counts = [-(-n // page_size) for n in problem.case.kv_lens]
    ids = torch.randperm(999)[: sum(counts)] + pages - 999
    first = 0
    for i, (count, length) in enumerate(zip(counts, problem.case.kv_lens, strict=True)):
        for cache, values in zip(kv, (problem.k[i], problem.v[i]), strict=True):
            whole = torch.full((count * page_size, heads, dim), float("nan"), dtype=torch.bfloat16, device=DEVICE)
            whole[:length] = values
            cache[ids[first : first + count].to(DEVICE)] = whole.view(count, page_size, heads, dim)
        first += count
    wrapper = prefill_wrapper(problem.case, BACKEND)
    last = torch.tensor([(n - 1) % page_size + 1 for n in problem.case.kv_lens], dtype=torch.int32)
    plan_prefill(
        wrapper, problem, (torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32), ids.int().to(DEVICE), last)
    )
    check(problem, *wrapper.run(problem.q, tuple(kv), return_lse=True))


@on_hopper
def test_runs_are_bitwise_equal(rng):
    problem = make(Case((700, 900), (700, 1500), 8, 2, 128, dtype=torch.bfloat16, page_size=16, causal=True))
    first = run_paged(problem, BACKEND, random.Random(1))
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run_paged(problem, BACKEND, random.Random(2)), strict=True))


@on_hopper
def test_graph_replays_another_plan(rng):
    """A captured run follows a later plan of the same shape, without a sync while planning."""
    case = Case((300, 200), (400, 200), 8, 2, 128, dtype=torch.bfloat16, page_size=16, causal=True)
    other = Case((150, 350), (500, 352), 8, 2, 128, dtype=torch.bfloat16, page_size=16, causal=True)
    buffers = [torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (3, 3, 64, 2)]
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(1 << 20, dtype=torch.uint8, device=DEVICE), "NHD", True, *buffers, backend=BACKEND
    )
    problems = [make(c) for c in (case, other)]
    caches = [paged_cache(p, rng) for p in problems]
    assert caches[0].kv[0].shape[0] <= caches[1].kv[0].shape[0]
    kv = tuple(torch.zeros_like(x) for x in caches[1].kv)
    q = problems[0].q.clone()

    def load(i: int) -> None:
        for held, given in zip(kv, caches[i].kv, strict=True):
            held[: given.shape[0]] = given
        q.copy_(problems[i].q)
        plan_prefill(wrapper, problems[i], caches[i].plan_arguments())

    load(0)
    wrapper.run(q, kv)
    out, lse = poisoned(q.shape, q.dtype, DEVICE), poisoned(q.shape[:2], torch.float32, DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        wrapper.run(q, kv, out=out, lse=lse, return_lse=True)
    for i in (1, 0, 1):
        load(i)
        out.fill_(float("nan"))
        graph.replay()
        check(problems[i], out, lse)


@on_hopper
def test_auto_takes_it_for_long_prompts_only(rng):
    for lens, expected in (((4096,) * 2, "gluon_sm90"), ((16,) * 8, "triton"), ((128,), "triton")):
        problem = make(Case(lens, lens, 8, 2, 128, dtype=torch.bfloat16, causal=True))
        wrapper = ragged_wrapper("auto")
        plan_ragged(wrapper, problem)
        wrapper.run(problem.q, torch.cat(problem.k), torch.cat(problem.v))
        assert wrapper._backend == expected


@on_hopper
def test_an_output_that_tma_cannot_write(rng):
    """Also where an aligned one was written before."""
    problem = make(Case((512,) * 40, (512,) * 40, 8, 2, 128, dtype=torch.bfloat16, causal=True))
    wrapper = ragged_wrapper("auto")
    plan_ragged(wrapper, problem)
    k, v = torch.cat(problem.k), torch.cat(problem.v)
    for offset, expected in ((0, "gluon_sm90"), (1, "triton")):
        storage = poisoned((problem.q.numel() + offset,), torch.bfloat16, DEVICE)
        out, lse = wrapper.run(problem.q, k, v, out=storage[offset:].view_as(problem.q), return_lse=True)
        assert wrapper._backend == expected
        check(problem, out, lse)


@on_hopper
def test_strides_that_tma_cannot_take(rng):
    """By name: an error that says why. By itself: Triton, the reason on record."""
    problem = make(Case((512,) * 40, (512,) * 40, 8, 2, 128, dtype=torch.bfloat16, causal=True))
    wide = torch.empty(sum(problem.case.kv_lens), 2, 129, dtype=torch.bfloat16, device=DEVICE)
    k, v = wide[..., :128], torch.cat(problem.v)
    k.copy_(torch.cat(problem.k))
    wrapper = ragged_wrapper("auto")
    plan_ragged(wrapper, problem)
    check(problem, *wrapper.run(problem.q, k, v, return_lse=True))
    assert wrapper._backend == "triton" and "multiples of 16 bytes" in wrapper._session.layout_problem
    named = ragged_wrapper(BACKEND)
    plan_ragged(named, problem)
    with pytest.raises(BackendSupportedError, match=r"k: strides .* multiples of 16 bytes"):
        named.run(problem.q, k, v)


@on_hopper
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 80}, "head_dim must be one of"),
        ({"dtype": torch.float32}, "16-bit"),
        ({"pos_encoding_mode": "ROPE_LLAMA"}, "rotated"),
    ],
    ids=["head_dim", "dtype", "rope"],
)
def test_refusals_by_name_say_why(change, reason, rng):
    given = {"head_dim": 128, "dtype": torch.bfloat16, "page_size": 16, **change}
    problem = make(Case((40,), (40,), 4, 2, **given))
    with pytest.raises(BackendSupportedError, match=reason):
        run_paged(problem, BACKEND, rng)


# 60 kernels, 40 random batches each.
KERNELS = [(head_dim, option, page) for head_dim in (64, 128) for option in list(OPTIONS)[:10] for page in (0, 1, 16)]


@on_hopper
@pytest.mark.parametrize(("head_dim", "option", "page"), KERNELS)
def test_random_batches(head_dim, option, page, rng):
    # Heads are compiled in: one choice a kernel.
    group, kv_heads = rng.choice((1, 2, 3, 8)), rng.randint(1, 3)
    for _ in range(40):
        lens: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        while not sum(lens[0]):
            lens = random_lengths(rng, rng.randint(1, 6), rng.choice((40, 200, 600)))
        case = Case(*lens, group * kv_heads, kv_heads, head_dim, dtype=torch.bfloat16, page_size=page or 16,
                    kv_layout=rng.choice(("NHD", "HND")) if page else "NHD", **OPTIONS[option])  # fmt: skip
        problem = make(case)
        check(problem, *(run_paged if page else run_ragged)(problem, BACKEND, rng))
