"""Empty requests, rows that see no key, lengths around pages and tiles, and NaN or inf in what belongs to others."""

from __future__ import annotations

import math

import pytest

import flashinfer

from .common import (
    PREFILLS,
    Case,
    check,
    decode_of,
    make,
    paged_cache,
    plan_prefill,
    prefill_wrapper,
    run_decode,
    size,
)

# name: (qo_lens, kv_lens)
LENGTHS = {
    "an empty request first": ((0, 3, 1), (9, 20, 1)),
    "an empty request last": ((3, 1, 0), (20, 1, 9)),
    "several empty requests in a row": ((2, 0, 0, 0, 5), (20, 0, 7, 0, 5)),
    "no queries at all": ((0, 0), (4, 0)),
    "no keys at all": ((3, 1), (0, 0)),
    "no keys for one": ((3, 4, 2), (11, 0, 2)),
    "kv shorter than qo": ((9, 6), (4, 1)),
    "one token": ((1,), (1,)),
    "page edges": ((1, 1, 1, 1, 1), (15, 16, 17, 32, 33)),
    "tile edges": ((16, 17, 31), (63, 64, 65)),
    "qo around a tile": ((15, 16, 33), (33, 33, 33)),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("entry", ["paged", "ragged"])
def test_prefill(entry, lengths, causal, backend, dtypes, rng):
    problem = make(Case(*LENGTHS[lengths], 2, 1, 16, dtype=dtypes.pick(rng, backend), causal=causal, page_size=16))
    check(problem, *PREFILLS[entry](problem, backend, rng))


@pytest.mark.parametrize("lengths", ["no keys for one", "no keys at all", "one token", "page edges"])
def test_decode(lengths, backend, dtypes, rng):
    problem = make(decode_of(Case((), LENGTHS[lengths][1], 4, 1, 16, dtype=dtypes.pick(rng, backend), page_size=16)))
    check(problem, *run_decode(problem, backend, rng))


@pytest.mark.parametrize(("qo_len", "kv_len"), [(1, 1), (3, 0), (9, 4), (0, 5), (16, 16), (17, 64), (1, 65)])
def test_single(qo_len, kv_len, backend, dtypes, rng):
    problem = make(Case((qo_len,), (kv_len,), 2, 1, 16, dtype=dtypes.pick(rng, backend), causal=True))
    check(problem, *PREFILLS["single"](problem, backend, rng))


def test_single_decode_without_keys(dtypes, rng):
    problem = make(Case((1,), (0,), dtype=dtypes.pick(rng, "torch")))
    out, lse = flashinfer.single_decode_with_kv_cache(problem.q[0], problem.k[0], problem.v[0], return_lse=True)
    check(problem, out[None], lse[None])


def test_fully_masked_rows_are_zero_and_minus_infinity(backend, dtypes, rng):
    """Said apart from the oracle, so that both cannot be wrong together."""
    problem = make(Case((9,), (4,), dtype=dtypes.pick(rng, backend), causal=True))
    for run in PREFILLS.values():
        out, lse = run(problem, backend, rng)
        assert not out[:5].any() and lse[:5].isneginf().all()
        assert out[5:].any(dim=-1).all() and lse[5:].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("entry", PREFILLS)
def test_bad_queries_stay_in_their_rows(entry, value, backend, dtypes, rng):
    """A NaN or inf query row, its GQA mates in one tile, leaves every other row as it is."""
    problem = make(Case((6, 3), (21, 9), dtype=dtypes.pick(rng, backend), causal=True))
    check(problem, *PREFILLS[entry](problem, backend, rng))
    problem.q[2] = value
    out, lse = PREFILLS[entry](problem, backend, rng)
    assert out[2].isnan().any()
    for rows in (slice(0, 2), slice(3, None)):
        check(problem, out, lse, rows)


def test_bad_query_head_stays_in_its_head(backend, dtypes, rng):
    problem = make(Case((4,), (21,), 4, 1, dtype=dtypes.pick(rng, backend)))
    clean, clean_lse = PREFILLS["paged"](problem, backend, rng)
    problem.q[1, 2] = math.nan
    out, lse = PREFILLS["paged"](problem, backend, rng)
    assert out[1, 2].isnan().all() and lse[1, 2].isnan()
    for head in (0, 1, 3):
        assert out[:, head].equal(clean[:, head]) and lse[:, head].equal(clean_lse[:, head])


def test_bad_keys_stay_in_their_request(backend, dtypes, rng):
    """NaN in the keys and values of one request is seen by that request alone."""
    problem = make(Case((3, 4, 2), (12, 30, 7), dtype=dtypes.pick(rng, backend)))
    problem.k[1][:], problem.v[1][:] = math.nan, math.nan
    for run in PREFILLS.values():
        out, lse = run(problem, backend, rng)
        assert out[3:7].isnan().all()
        for rows in (slice(0, 3), slice(7, None)):
            check(problem, out, lse, rows)


def test_lengths_one_by_one(backend, dtypes, rng):
    """Every kv length around a tile edge in one batch."""
    kv_lens = tuple(range(1, size(36, 300)))
    problem = make(decode_of(Case((), kv_lens, 2, 1, 16, dtype=dtypes.pick(rng, backend), page_size=16)))
    check(problem, *run_decode(problem, backend, rng))


def test_rerun_without_lse(backend, dtypes, rng):
    """`return_lse=False` gives the out alone, and the same."""
    problem = make(Case(dtype=dtypes.pick(rng, backend), causal=True))
    cache = paged_cache(problem, rng)
    wrapper = prefill_wrapper(problem.case, backend)
    plan_prefill(wrapper, problem, cache.plan_arguments())
    out, _ = wrapper.run(problem.q, cache.kv, return_lse=True)
    assert wrapper.run(problem.q, cache.kv).equal(out)
