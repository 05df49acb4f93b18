"""Masks, windows, soft cap, scales and position encodings: alone, in chosen pairs, and in random combinations."""

from __future__ import annotations

from dataclasses import replace

import pytest

import flashinfer

from .common import (
    ON_GPU,
    PREFILLS,
    Case,
    check,
    decode_of,
    in_layout,
    make,
    random_lengths,
    run_decode,
    run_paged,
    run_ragged,
    scales,
    size,
)

OPTIONS = {
    "causal": {"causal": True},
    "window 0": {"window_left": 0},
    "window": {"window_left": 7},
    "window longer than kv": {"window_left": 10_000},
    "soft cap": {"logits_soft_cap": 0.8},
    "soft cap 0 is off": {"logits_soft_cap": 0.0},
    "soft cap below 0 is off": {"logits_soft_cap": -1.0},
    "sm_scale": {"sm_scale": 0.77},
    "negative sm_scale": {"sm_scale": -0.4},
    "bool mask": {"mask": "bool"},
    "packed mask": {"mask": "packed"},
    "rope": {"pos_encoding_mode": "ROPE_LLAMA"},
    "rope scaled": {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 4.0, "rope_theta": 5e5},
    "alibi": {"pos_encoding_mode": "ALIBI"},
    "causal window": {"causal": True, "window_left": 5},
    "mask beats causal": {"causal": True, "mask": "bool"},
    "mask window": {"mask": "packed", "window_left": 6},
    "capped alibi": {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 0.6, "sm_scale": 1.1, "causal": True},
    "rope causal window cap": {
        "pos_encoding_mode": "ROPE_LLAMA", "causal": True, "window_left": 9, "logits_soft_cap": 5.0,
    },
}  # fmt: skip
# Every tile size is met: a window or mask that ends inside, at, and past a tile of 16, 32, 64 or 128 keys.
LENGTHS = ((9, 1, 16, 3), (33, 16, 16, 71))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("entry", PREFILLS)
def test_prefill(entry, option, backend, dtypes, rng):
    heads = rng.choice([(4, 2), (3, 1), (6, 6)])
    case = Case(*LENGTHS, *heads, 32, dtype=dtypes.pick(rng, backend), **OPTIONS[option])
    problem = make(case)
    check(problem, *PREFILLS[entry](problem, backend, rng))


@pytest.mark.parametrize("option", [name for name, o in OPTIONS.items() if not {"causal", "mask"} & set(o)])
def test_decode(option, backend, dtypes, rng):
    heads = rng.choice([(4, 2), (3, 1), (6, 6)])
    case = decode_of(Case((), (70, 1, 33, 8), *heads, 32, dtype=dtypes.pick(rng, backend), **OPTIONS[option]))
    problem = make(case)
    check(problem, *run_decode(problem, backend, rng))


@pytest.mark.parametrize("option", [name for name, o in OPTIONS.items() if not {"causal", "mask"} & set(o)])
def test_single_decode(option, dtypes, rng):
    case = Case((1,), (70,), dtype=dtypes.pick(rng, "torch"), kv_layout=rng.choice(("NHD", "HND")), **OPTIONS[option])
    problem = make(case)
    k, v = in_layout(problem.k[0], case.kv_layout), in_layout(problem.v[0], case.kv_layout)
    given = {"kv_layout": case.kv_layout, **case.shared_options(), **scales(case)}
    out, lse = flashinfer.single_decode_with_kv_cache(problem.q[0], k, v, return_lse=True, **given)
    check(problem, out[None], lse[None])


def test_single_mask_may_be_flat(backend, dtypes, rng):
    """Single prefill takes the bool mask as [qo_len, kv_len] and flattened."""
    problem = make(Case((7,), (19,), dtype=dtypes.pick(rng, backend), mask="bool"))
    out = flashinfer.single_prefill_with_kv_cache(
        problem.q, problem.k[0], problem.v[0], custom_mask=problem.masks[0].flatten(), backend=backend
    )
    check(problem, out)


@pytest.mark.parametrize("mask", ["bool", "packed"])
@pytest.mark.parametrize("run", [run_paged, run_ragged])
def test_masks_whose_bits_do_not_fill_bytes(run, mask, backend, dtypes, rng):
    """qo_len * kv_len not a multiple of 8, several times over, an empty request between: each starts on a byte."""
    problem = make(Case((3, 0, 5, 1, 7), (5, 4, 3, 11, 9), dtype=dtypes.pick(rng, backend), mask=mask))
    check(problem, *run(problem, backend, rng))


def test_mask_of_nothing(backend, dtypes, rng):
    """A request whose mask is all False, and single rows of it: output 0, lse -inf."""
    problem = make(Case((4, 3), (20, 40), dtype=dtypes.pick(rng, backend), mask="bool"))
    problem.masks[0][:] = False
    problem.masks[1][1] = False
    for run in (run_paged, run_ragged):
        out, lse = run(problem, backend, rng)
        assert not out[:4].any() and lse[:4].isneginf().all()
        check(problem, out, lse)


@pytest.mark.parametrize("page_size", [1, 16])
def test_alibi_of_heads_that_are_no_power_of_two(page_size, backend, dtypes, rng):
    problem = make(
        Case(*LENGTHS, 12, 4, 16, dtype=dtypes.pick(rng, backend), pos_encoding_mode="ALIBI", page_size=page_size)
    )
    check(problem, *run_paged(problem, backend, rng))


def test_rope_of_unequal_head_dims(backend, dtypes, rng):
    rope = {"pos_encoding_mode": "ROPE_LLAMA", "causal": True}
    problem = make(Case(*LENGTHS, head_dim=40, head_dim_vo=16, dtype=dtypes.pick(rng, backend), **rope))
    check(problem, *run_ragged(problem, backend, rng))


def random_case(rng, dtype) -> Case:
    """Anything with anything."""
    num_kv_heads = rng.choice((1, 2, 3))
    cache_form = rng.choice(("tuple", "5d", "packed", "strided"))
    head_dim = rng.choice((8, 16, 24, 32, 64) if not ON_GPU else (16, 40, 64, 96, 128, 192, 256))
    return Case(
        (), (), num_kv_heads * rng.choice((1, 2, 3, 4, 7)), num_kv_heads, head_dim,
        rng.choice((None, 16, 32)) if cache_form in ("tuple", "packed") else None,
        dtype,
        page_size=rng.choice((1, 3, 5, 16, 64)),
        kv_layout=rng.choice(("NHD", "HND")),
        cache_form=cache_form,
        strided_q=rng.random() < 0.3,
        causal=rng.random() < 0.5,
        window_left=rng.choice((-1, -1, 0, 3, 17, 40)),
        logits_soft_cap=rng.choice((None, None, 0.5, 8.0)),
        sm_scale=rng.choice((None, None, 0.3)),
        mask=rng.choice(("", "", "bool", "packed")),
        pos_encoding_mode=rng.choice(("NONE", "NONE", "ROPE_LLAMA", "ALIBI")),
        rope_scale=rng.choice((None, 2.0)),
        rope_theta=rng.choice((None, 1e6)),
    )  # fmt: skip


def of_lengths(case: Case, rng) -> Case:
    qo_lens, kv_lens = random_lengths(rng, rng.randint(1, size(3, 12)), size(50, 400))
    return replace(case, qo_lens=qo_lens, kv_lens=kv_lens)


@pytest.mark.parametrize("entry", PREFILLS)
@pytest.mark.parametrize("_repeat", range(size(10, 30)))
def test_random_prefill(_repeat, entry, backend, dtypes, rng):
    """On a GPU several batches a case: another batch costs nothing, another case a compilation."""
    case = random_case(rng, dtypes.pick(rng, backend))
    for _ in range(size(1, 6)):
        problem = make(of_lengths(case, rng))
        check(problem, *PREFILLS[entry](problem, backend, rng))


@pytest.mark.parametrize("_repeat", range(size(10, 30)))
def test_random_decode(_repeat, backend, dtypes, rng):
    case = random_case(rng, dtypes.pick(rng, backend))
    case = replace(case, cache_form="strided" if case.head_dim_vo else case.cache_form)
    for _ in range(size(1, 6)):
        problem = make(decode_of(of_lengths(case, rng)))
        check(problem, *run_decode(problem, backend, rng))
