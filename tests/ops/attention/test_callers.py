"""What callers do that must not go wrong: views as arguments, changes after plan, failed plans, odd numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flashinfer
from flashinfer.core.select import BackendSupportedError
from flashinfer.device.language import tl
from flashinfer.ops.attention.variants import Twin, sliding_window, variant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HQ, HK, D, PAGE = 4, 2, 32, 4


def workspace() -> torch.Tensor:
    return torch.empty(1 << 20, dtype=torch.uint8, device=DEVICE)


def every_second(x: torch.Tensor) -> torch.Tensor:
    """The same values as a view with stride 2; what lies between would be wrong to read."""
    wide = torch.full((2 * x.numel(),), 77, dtype=x.dtype, device=x.device)
    wide[::2] = x.flatten()
    return wide[::2]


class Batch:
    """Three requests of 9, 0 and 17 tokens in shuffled pages, with query tensors for decode and prefill."""

    def __init__(self, qo_lens: tuple[int, ...] = (1, 1, 1)) -> None:
        kv_lens = torch.tensor([9, 0, 17])
        pages = (kv_lens + PAGE - 1) // PAGE
        self.indptr = torch.cat([torch.zeros(1), pages.cumsum(0)]).int()
        self.indices = torch.randperm(int(pages.sum()) + 2)[: int(pages.sum())].int()
        self.last = torch.where(kv_lens > 0, (kv_lens - 1) % PAGE + 1, 0).int()
        self.qo_indptr = torch.tensor([0, *torch.tensor(qo_lens).cumsum(0)]).int()
        self.kv = torch.randn(int(pages.sum()) + 2, 2, PAGE, HK, D, device=DEVICE)
        self.q = torch.randn(sum(qo_lens), HQ, D, device=DEVICE)

    def arrays(self) -> list[torch.Tensor]:
        return [x.to(DEVICE) for x in (self.indptr, self.indices, self.last)]


def decode(backend: str, batch: Batch, arrays: list[torch.Tensor], **run: Any) -> Any:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), backend=backend)
    wrapper.plan(*arrays, HQ, HK, D, PAGE, q_data_type=torch.float32)
    return wrapper.run(batch.q, batch.kv, **run)


def prefill(backend: str) -> flashinfer.BatchPrefillWithPagedKVCacheWrapper:
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), backend=backend)


def plan_prefill(wrapper: Any, qo_indptr: torch.Tensor, arrays: list[torch.Tensor], **options: Any) -> None:
    wrapper.plan(qo_indptr, *arrays, HQ, HK, D, PAGE, q_data_type=torch.float32, **options)


def test_strided_index_arrays(backend: str) -> None:
    batch = Batch()
    expected = decode(backend, batch, batch.arrays())
    assert torch.equal(decode(backend, batch, [every_second(x) for x in batch.arrays()]), expected)


def test_strided_sinks_and_scales(backend: str) -> None:
    batch = Batch()
    sinks, scale = torch.randn(HQ, device=DEVICE), torch.rand(HK, device=DEVICE) + 0.5
    arrays = batch.arrays()
    expected = decode(backend, batch, arrays, sinks=sinks, k_scale=scale, v_scale=scale)
    got = decode(
        backend, batch, arrays, sinks=every_second(sinks), k_scale=every_second(scale), v_scale=every_second(scale)
    )
    assert torch.equal(got, expected)
    half = torch.full((HQ,), 0.5, device=DEVICE)
    spread = torch.tensor(0.5, device=DEVICE).expand(HQ)
    assert torch.equal(decode(backend, batch, arrays, sinks=spread), decode(backend, batch, arrays, sinks=half))


def test_sinks_join_the_denominator(backend: str) -> None:
    batch = Batch()
    sinks = torch.randn(HQ, device=DEVICE)
    out, lse = decode(backend, batch, batch.arrays(), return_lse=True)
    with_sinks, lse_sinks = decode(backend, batch, batch.arrays(), sinks=sinks, return_lse=True)
    total = torch.logaddexp(lse.double() * math.log(2), sinks.double())
    weight = torch.exp(lse.double() * math.log(2) - total)[..., None]
    torch.testing.assert_close(with_sinks.double(), torch.nan_to_num(weight) * out.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse_sinks.double(), total * math.log2(math.e), rtol=1e-5, atol=1e-5)


def test_row_that_sees_nothing_with_an_absent_sink(backend: str) -> None:
    batch = Batch()
    none = torch.full((HQ,), -math.inf, device=DEVICE)
    out, lse = decode(backend, batch, batch.arrays(), sinks=none, return_lse=True)
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all() and torch.isfinite(out).all()


@pytest.mark.parametrize("deferred", [True, False])
def test_arrays_may_change_after_plan(backend: str, deferred: bool) -> None:
    """`deferred`: on a GPU the rows are only known at run; on the CPU every array is the caller's own memory."""
    batch = Batch((3, 2, 5))
    qo_indptr = batch.qo_indptr.to(DEVICE) if deferred else batch.qo_indptr.clone()
    arrays = batch.arrays()
    wrapper = prefill(backend)
    plan_prefill(wrapper, qo_indptr, arrays)
    expected = wrapper.run(batch.q, batch.kv)
    plan_prefill(wrapper, qo_indptr, arrays)
    for x in (qo_indptr, arrays[0], arrays[2]):
        x.fill_(0)
    assert torch.equal(wrapper.run(batch.q, batch.kv), expected)


def test_rows_without_a_request_are_zero(backend: str) -> None:
    batch = Batch((3, 2, 5))
    q = torch.randn(12, HQ, D, device=DEVICE)
    wrapper = prefill(backend)
    plan_prefill(wrapper, (batch.qo_indptr + 2).int(), batch.arrays())
    out, lse = wrapper.run(q, batch.kv, return_lse=True)
    assert (out[:2] == 0).all() and torch.isneginf(lse[:2]).all() and torch.isfinite(out).all()


def test_failed_plan_changes_nothing(backend: str) -> None:
    batch = Batch()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), backend=backend)
    wrapper.plan(*batch.arrays(), HQ, HK, D, PAGE, q_data_type=torch.float32)
    expected = wrapper.run(batch.q, batch.kv)
    with pytest.raises((ValueError, BackendSupportedError)):
        wrapper.plan(*batch.arrays(), HQ, HK, D, PAGE, q_data_type=torch.float32, logits_soft_cap=1.0, window_left=-5)
    assert torch.equal(wrapper.run(batch.q, batch.kv), expected)


def test_huge_window_is_no_window(backend: str) -> None:
    batch = Batch()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), backend=backend)
    wrapper.plan(*batch.arrays(), HQ, HK, D, PAGE, q_data_type=torch.float32, window_left=2**31 - 1)
    torch.testing.assert_close(wrapper.run(batch.q, batch.kv), decode(backend, batch, batch.arrays()))


def test_large_soft_cap_is_no_cap(backend: str) -> None:
    batch = Batch()
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), backend=backend)
    wrapper.plan(*batch.arrays(), HQ, HK, D, PAGE, q_data_type=torch.float32, logits_soft_cap=1e6)
    torch.testing.assert_close(wrapper.run(batch.q, batch.kv), decode(backend, batch, batch.arrays()))


def test_strided_packed_mask(backend: str) -> None:
    batch = Batch((3, 2, 5))
    bits = torch.tensor([0, 27, 27, 112])
    mask = torch.rand(112) < 0.6
    packed, _ = flashinfer.segment_packbits(mask, bits, bitorder="little")
    wrapper = prefill(backend)
    plan_prefill(wrapper, batch.qo_indptr, [batch.indptr, batch.indices, batch.last], custom_mask=mask.to(DEVICE))
    expected = wrapper.run(batch.q, batch.kv)
    plan_prefill(
        wrapper,
        batch.qo_indptr,
        [batch.indptr, batch.indices, batch.last],
        packed_custom_mask=every_second(packed.to(DEVICE)),
    )
    assert torch.equal(wrapper.run(batch.q, batch.kv), expected)


def test_users_variant_composes(backend: str) -> None:
    batch = Batch((3, 2, 5))
    ours = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), backend=backend, jit_args=sliding_window(4))
    plan_prefill(ours, batch.qo_indptr, batch.arrays(), causal=True)
    theirs = prefill(backend)
    plan_prefill(theirs, batch.qo_indptr, batch.arrays(), causal=True, window_left=4)
    assert torch.equal(ours.run(batch.q, batch.kv), theirs.run(batch.q, batch.kv))


def head_bias_hook(captured, x, at):  # a user's hook: Triton compiles it into the kernel
    return x + tl.load(captured[0] + at.qo_head) * tl.where(at.kv_idx % 2 == 0, 1.0, 0.0)


def head_bias_twin(captured, x, at):  # and what it means, in torch
    return x + captured[0][at.qo_head] * (at.kv_idx % 2 == 0)


def test_users_own_variant(backend: str) -> None:
    """A logits hook with a captured tensor, against the same attention written out."""
    batch = Batch((3, 2, 5))
    bias = torch.randn(HQ, device=DEVICE)
    mine = variant("head_bias", captured=(bias,), logits=head_bias_hook, twin=Twin(logits=head_bias_twin))
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), backend=backend, jit_args=mine)
    plan_prefill(wrapper, batch.qo_indptr, batch.arrays())
    out = wrapper.run(batch.q, batch.kv)
    pages = batch.indices[int(batch.indptr[2]) :].long()
    k, v = (batch.kv[pages.to(DEVICE), i].flatten(0, 1)[:17].double() for i in range(2))
    q = batch.q[5:].double()
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(HQ // HK, 1)) / math.sqrt(D)
    logits[..., ::2] += bias.double()[:, None, None]
    expected = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v.repeat_interleave(HQ // HK, 1))
    torch.testing.assert_close(out[5:].double(), expected, rtol=1e-5, atol=1e-5)


def graph_wrapper(backend: str, mask_bytes: int = 0) -> Any:
    buffers = [torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (4, 4, 16, 3)]
    masks = [
        torch.zeros(mask_bytes, dtype=torch.uint8, device=DEVICE) if mask_bytes else None,
        torch.zeros(4, dtype=torch.int32, device=DEVICE) if mask_bytes else None,
    ]
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", True, *buffers, *masks, backend=backend)


def test_mask_buffers_decide_whether_there_is_a_mask(backend: str) -> None:
    batch = Batch((3, 2, 5))
    arrays, mask = [batch.indptr, batch.indices, batch.last], torch.ones(112, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="custom_mask"):
        plan_prefill(graph_wrapper(backend), batch.qo_indptr, arrays, custom_mask=mask)
    exact = 4 + 11  # bytes of 27 and of 85 bits
    with pytest.raises(ValueError, match="custom_mask"):
        plan_prefill(graph_wrapper(backend, exact), batch.qo_indptr, arrays)
    wrapper = graph_wrapper(backend, exact)
    plan_prefill(wrapper, batch.qo_indptr, arrays, custom_mask=mask)
    plain = prefill(backend)
    plan_prefill(plain, batch.qo_indptr, arrays)
    torch.testing.assert_close(wrapper.run(batch.q, batch.kv), plain.run(batch.q, batch.kv))


def test_graph_buffers_stay_the_callers(backend: str) -> None:
    wrapper = graph_wrapper(backend)
    before = wrapper._paged_kv_indices_buf
    plan_prefill(wrapper, Batch((3, 2, 5)).qo_indptr, Batch().arrays())
    assert wrapper._paged_kv_indices_buf is before and before.numel() == 16


def test_graph_mode_keeps_the_tables_of_an_overriding_forward(backend: str) -> None:
    """After `forward(window_left=...)`, a plain plan schedules for the override that a captured run replays with."""
    batch = Batch((3, 2, 5))
    wrapper = graph_wrapper(backend)
    plan_prefill(wrapper, batch.qo_indptr, batch.arrays())
    expected = wrapper.forward(batch.q, batch.kv, causal=True, window_left=3)
    plan_prefill(wrapper, batch.qo_indptr, batch.arrays())
    session = wrapper._session
    assert session.options.window_left == 3 and session.options.causal
    assert torch.equal(wrapper.forward(batch.q, batch.kv, causal=True, window_left=3), expected)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU has prebound launches")
def test_prebound_launch_equals_the_public_route(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer.ops.attention.device import planner
    from flashinfer.ops.attention.triton import launch

    batch = Batch()
    first = decode("triton", batch, batch.arrays())  # compiles
    direct = decode("triton", batch, batch.arrays())
    for prebound in (planner._launch_planner, launch._launch_attention):
        monkeypatch.setattr(prebound, "_direct", False)
    public = decode("triton", batch, batch.arrays())
    assert torch.equal(first, direct) and torch.equal(direct, public)
