"""Heads, head dimensions, lengths, page sizes and layouts: each entry point against the fp64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flashinfer

from .common import (
    PREFILLS,
    Case,
    Dtypes,
    check,
    decode_of,
    in_layout,
    make,
    random_lengths,
    run_decode,
    run_paged,
    run_ragged,
    size,
)

# (num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or None, page_size, kv_layout, causal): a pairwise-like cover
SHAPES = [
    (4, 4, 64, None, 16, "NHD", True),
    (8, 2, 128, None, 16, "HND", False),
    (5, 1, 40, None, 3, "NHD", True),
    (9, 3, 16, None, 5, "HND", True),
    (6, 2, 8, None, 1, "NHD", False),
    (14, 2, 64, None, 5, "HND", True),
    (10, 2, 80, None, 64, "NHD", True),
    (1, 1, 96, None, 1, "HND", True),
    (32, 4, 16, None, 16, "NHD", False),
    (3, 1, 256, None, 3, "NHD", True),
    (2, 1, 512, None, 16, "NHD", True),
    (4, 1, 192, 128, 16, "NHD", True),
    (2, 2, 64, 32, 5, "HND", False),
    (6, 2, 16, 64, 16, "NHD", True),
]


def shaped(row, dtype, rng) -> Case:
    num_qo_heads, num_kv_heads, head_dim, head_dim_vo, page_size, kv_layout, causal = row
    qo_lens, kv_lens = random_lengths(rng, size(2, 9), size(40, 700))
    return Case(
        (7, 1, *qo_lens), (size(37, 1100), page_size, *kv_lens), num_qo_heads, num_kv_heads, head_dim, head_dim_vo,
        dtype, page_size=page_size, kv_layout=kv_layout, causal=causal,
    )  # fmt: skip


def narrow_if_wide(row, dtypes, backend) -> Dtypes:
    """head_dim above 256 is for 16-bit types where a tile must fit in registers."""
    if row[2] <= 256 or backend == "torch":
        return dtypes
    allowed = tuple(d for d in dtypes.allowed if d != torch.float32)
    return Dtypes(allowed) if allowed else pytest.skip("float32 tiles of head_dim 512 do not fit in registers")


@pytest.mark.parametrize("row", SHAPES, ids=str)
@pytest.mark.parametrize("entry", PREFILLS)
def test_prefill(entry, row, backend, dtypes, rng):
    problem = make(shaped(row, narrow_if_wide(row, dtypes, backend).pick(rng, backend), rng))
    check(problem, *PREFILLS[entry](problem, backend, rng))


@pytest.mark.parametrize("row", [r for r in SHAPES if r[3] is None], ids=str)
def test_decode(row, backend, dtypes, rng):
    problem = make(decode_of(shaped(row, narrow_if_wide(row, dtypes, backend).pick(rng, backend), rng)))
    check(problem, *run_decode(problem, backend, rng))


@pytest.mark.parametrize("row", SHAPES, ids=str)
@pytest.mark.parametrize("use_tensor_cores", [False, True])
def test_single_decode(row, use_tensor_cores, dtypes, rng):
    """It has no backend argument: this is what "auto" picks on this device."""
    num_qo_heads, num_kv_heads, head_dim, head_dim_vo, _, kv_layout, _ = row
    dtype = dtypes.pick(rng, "torch")
    case = Case((1,), (rng.randint(1, size(90, 3000)),), num_qo_heads, num_kv_heads, head_dim, head_dim_vo, dtype)
    problem = make(case)
    k, v = in_layout(problem.k[0], kv_layout), in_layout(problem.v[0], kv_layout)
    given = {"kv_layout": kv_layout, "use_tensor_cores": use_tensor_cores}
    out, lse = flashinfer.single_decode_with_kv_cache(problem.q[0], k, v, **given, return_lse=True)
    check(problem, out[None], lse[None])
    alone = flashinfer.single_decode_with_kv_cache(problem.q[0], k, v, **given)
    assert alone.equal(out)


@pytest.mark.parametrize("batch", [1, 7, "large"])
def test_batch_sizes(batch, backend, dtypes, rng):
    if batch == "large":
        batch = size(300 if backend == "torch" else 40, 4096)
    lengths = tuple(rng.choice((0, 1, 2, 5, 6, 20)) for _ in range(batch))
    shape = {"num_qo_heads": 2, "num_kv_heads": 1, "head_dim": 16, "page_size": 5}
    decode = make(Case((1,) * batch, lengths, dtype=dtypes.pick(rng, backend), **shape))
    check(decode, *run_decode(decode, backend, rng))
    qo_lens = tuple(rng.choice((0, 1, 3)) for _ in range(batch))
    prefill = make(replace(decode.case, qo_lens=qo_lens, causal=True))
    for run in (run_paged, run_ragged):
        check(prefill, *run(prefill, backend, rng))


@pytest.mark.parametrize("entry", ["paged", "ragged"])
def test_one_long_request_among_short_ones(entry, backend, dtypes, rng):
    """Skew: the long request is shared by many programs, the short ones share a program."""
    kv_lens = (3, size(150, 20_000), 1, 17)
    problem = make(Case((1, 2, 1, 9), kv_lens, 2, 1, 64, dtype=dtypes.pick(rng, backend), causal=True, page_size=16))
    check(problem, *PREFILLS[entry](problem, backend, rng))


def test_long_decode(backend, dtypes, rng):
    kv_lens = (1, size(150, 30_000), 16, 31)
    problem = make(Case((1,) * 4, kv_lens, 4, 1, 64, dtype=dtypes.pick(rng, backend), page_size=16))
    check(problem, *run_decode(problem, backend, rng))


@pytest.mark.parametrize("qo_len", [1, size(33, 129), size(50, 1500)])
def test_long_prefill(qo_len, backend, dtypes, rng):
    kv_lens = (qo_len, qo_len + size(20, 1000))
    problem = make(Case((qo_len,) * 2, kv_lens, 4, 2, 64, dtype=dtypes.pick(rng, backend), causal=True, page_size=16))
    for run in PREFILLS.values():
        check(problem, *run(problem, backend, rng))


def test_scale_of_the_logits(backend, dtypes, rng):
    """Queries 30 times larger: nearly one-hot softmax, where a wrong running maximum would overflow."""
    problem = make(Case(dtype=dtypes.pick(rng, backend), causal=True))
    problem.q.mul_(30)
    for run in PREFILLS.values():
        check(problem, *run(problem, backend, rng))


def test_entry_points_agree_on_the_expected_shapes(backend, dtypes, rng):
    problem = make(Case(dtype=dtypes.pick(rng, backend), head_dim_vo=16))
    rows, heads = problem.q.shape[:2]
    for run in PREFILLS.values():
        got, got_lse = run(problem, backend, rng)
        assert got.shape == (rows, heads, 16) and got.is_contiguous()
        assert got_lse.shape == (rows, heads) and got_lse.is_contiguous()
