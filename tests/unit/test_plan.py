"""The planner's properties, and that the device planner agrees with its numpy twin in every integer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer.core.config import config
from flashinfer.core.workspace import Arena
from flashinfer.ops.attention import variants
from flashinfer.ops.attention.options import Options
from flashinfer.ops.attention.plan import RECORD_FIELDS, Lengths, Schedule, Tiling, owner, schedule
from flashinfer.ops.attention.spec import AttentionSpec, Batch
from flashinfer.ops.attention.variant import Variant, clamped_bounds

REQUESTS = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 200)), min_size=0, max_size=9)
VARIANTS = {
    "plain": Variant(),
    "causal": variants.causal(),
    "window": variants.causal() & variants.sliding_window(17),
    "window_only": variants.sliding_window(5),
}


def lengths_of(requests: list[tuple[int, int]]) -> Lengths:
    qo, kv = (np.array([r[i] for r in requests], dtype=np.int64) for i in (0, 1))
    return Lengths(np.concatenate([[0], np.cumsum(qo)]), np.concatenate([[0], np.cumsum(kv)]), kv)


def work_items(plan: Schedule, tiling: Tiling, num_kv_heads: int) -> list[tuple[int, int, int, int]]:
    """(program, record, head, KV tile) of every unit of work, walking the shares as the kernel does."""
    items = []
    for program in range(tiling.num_programs):
        place, end = int(plan.shares[program, RECORD_FIELDS]), int(plan.shares[program + 1, RECORD_FIELDS])
        for at in range(place, end):
            record = int(np.searchsorted(plan.first, at, side="right")) - 1
            length = int(plan.records[record, 3]) + tiling.item_cost
            head, passed = divmod(at - int(plan.first[record]), length)
            if passed >= tiling.item_cost:
                items.append((program, record, head, passed - tiling.item_cost))
    return items


@settings(deadline=None, max_examples=150)
@given(
    requests=REQUESTS,
    name=st.sampled_from(sorted(VARIANTS)),
    block_m=st.sampled_from([16, 32]),
    block_n=st.sampled_from([16, 64]),
    programs=st.integers(1, 13),
    group=st.integers(1, 5),
    heads=st.integers(1, 3),
    item_cost=st.integers(0, 5),
)
def test_every_tile_once_and_shares_equal(requests, name, block_m, block_n, programs, group, heads, item_cost):
    tiling = Tiling(block_m, block_n, programs, item_cost)
    plan = schedule(tiling, heads, group, lengths_of(requests), VARIANTS[name])
    items = work_items(plan, tiling, heads)
    wanted = [(r, h, t) for r, row in enumerate(plan.records) for h in range(heads) for t in range(row[3])]
    assert sorted(item[1:] for item in items) == sorted(wanted)
    sizes = np.diff(plan.shares[:, RECORD_FIELDS])
    assert sizes.sum() == plan.first[-1] and sizes.max() - sizes.min() <= 1
    # At most two shared query tiles a program: one that an earlier share began, one that a later share ends.
    sharers: dict[tuple[int, int], set[int]] = {}
    for program, record, head, _ in items:
        sharers.setdefault((record, head), set()).add(program)
    shared = [programs_ for programs_ in sharers.values() if len(programs_) > 1]
    for program in range(programs):
        assert sum(program in programs_ for programs_ in shared) <= 2


@settings(deadline=None, max_examples=100)
@given(requests=REQUESTS, name=st.sampled_from(sorted(VARIANTS)), block_n=st.sampled_from([16, 64]))
def test_records_cover_what_the_variant_sees(requests, name, block_n):
    """No token that a mask keeps lies outside of its record's tiles, nor inside the full range of one it drops."""
    group, tiling = 3, Tiling(16, block_n, 4, 0)
    variant = VARIANTS[name]
    plan = schedule(tiling, 2, group, lengths_of(requests), variant)
    for request, q_tile, kv_tile, kv_tiles, kv_len, _, _, qo_len in plan.records.tolist():
        q_lo, q_hi = q_tile * 16 // group, min(((q_tile + 1) * 16 - 1) // group + 1, qo_len)
        at = variants.At(request, torch.arange(q_lo, q_hi)[:, None], torch.arange(kv_len), None, qo_len, kv_len)
        keep = torch.ones(q_hi - q_lo, kv_len, dtype=torch.bool)
        for part in variant.having("mask"):
            keep &= part.twin.mask(part.captured, at)
        seen = keep.any(0).nonzero().flatten()
        if len(seen):
            assert kv_tile * block_n <= int(seen[0]) and int(seen[-1]) < (kv_tile + kv_tiles) * block_n
        lo, hi, full_lo, full_hi = clamped_bounds(variant, q_lo, q_hi, qo_len, kv_len, max, min)
        assert not keep[:, :lo].any() and not keep[:, hi:].any()
        assert keep[:, full_lo:full_hi].all()


@given(total=st.integers(0, 500), programs=st.integers(1, 40))
def test_owner_is_the_share_that_holds_the_place(total, programs):
    floor, extra = divmod(total, programs)
    begins = [c * floor + min(c, extra) for c in range(programs + 1)]
    for place in range(total):
        program = owner(place, floor, extra)
        assert begins[program] <= place < begins[program + 1]


def test_schedule_is_deterministic():
    requests = [(5, 100), (0, 3), (33, 64)]
    first, second = (schedule(Tiling(16, 16, 7, 2), 2, 4, lengths_of(requests), VARIANTS["causal"]) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(not (config().triton_interpret or torch.cuda.is_available()), reason="needs Triton to run")
@settings(deadline=None, max_examples=12)
@given(
    requests=REQUESTS,
    page_size=st.sampled_from([1, 3, 16]),
    causal=st.booleans(),
    window=st.sampled_from([-1, 0, 9]),
    uniform=st.sampled_from([None, 1, 7]),
)
def test_device_planner_agrees_with_its_twin(requests, page_size, causal, window, uniform):
    from flashinfer.ops.attention.triton import launch

    if uniform:
        requests = [(uniform, kv) for _, kv in requests]
    requests = requests or [(uniform or 2, 5)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    qo, kv = (torch.tensor([r[i] for r in requests]) for i in (0, 1))
    pages = (kv + page_size - 1) // page_size
    indptrs = [torch.cat([torch.zeros(1), x.cumsum(0)]).int().to(device) for x in (qo, pages)]
    last = (kv - (pages - 1) * page_size).int().to(device)
    spec = AttentionSpec(6, 2, 32, 32, page_size, True, torch.float16, torch.float16, torch.float16, uniform)
    batch = Batch(None if uniform else indptrs[0], indptrs[1], None, last, len(requests), int(qo.sum()))
    variant = Options.of(32, causal, window, None, "NONE", None, (None, None)).variant(spec, device, None)
    plan = launch.plan(spec, batch, variant, Arena(device))
    cfg = plan.launch.kernel
    twin = schedule(
        Tiling(cfg.block_m, cfg.block_n, plan.num_programs, cfg.item_cost),
        spec.num_kv_heads,
        spec.group_size,
        Lengths(*(x.cpu().numpy().astype(np.int64) for x in (*indptrs, kv))),
        variant,
    )
    count = len(twin.records)
    assert np.array_equal(plan.tables.first.cpu().numpy()[: count + 1], twin.first)
    assert np.array_equal(plan.tables.records.cpu().numpy()[:count], twin.records)
    used = slice(0, RECORD_FIELDS + 5)
    assert np.array_equal(plan.tables.shares.cpu().numpy()[:, used], twin.shares[:, used])
