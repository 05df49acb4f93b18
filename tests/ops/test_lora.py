"""Adapters of experts against fp64 loops: every implementation, on the CPU through addresses in the host's memory."""

from __future__ import annotations

import pytest
import torch

from flashinfer import moe_lora
from flashinfer.testing import assert_close_to_oracle, poisoned
from tests.ops.common import DEVICE, IMPLEMENTATIONS, captured, force, skip_unless_runs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TOKENS, EXPERTS, ADAPTERS = 7, 5, 3


@pytest.fixture(params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch" and DEVICE == "cuda":
        pytest.skip("torch cannot follow addresses on a GPU")
    return force(monkeypatch, "lora", request.param)


class Problem:
    """Pairs in any order, tokens without adapters and without pairs among them."""

    def __init__(
        self, dtype: torch.dtype, rank: int = 8, hidden: int = 72, widths: tuple[int, ...] = (40, 24), pairs: int = 19
    ) -> None:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=DEVICE).to(dtype)

        index = {"device": DEVICE, "dtype": torch.int64}
        self.rank, self.widths, self.pairs = rank, widths, pairs
        self.x, self.by_pair = normal(TOKENS, hidden), normal(pairs, hidden)
        self.a = [normal(ADAPTERS, EXPERTS, rank, hidden) for _ in widths]
        self.b = [normal(ADAPTERS, EXPERTS, width, rank) for width in widths]
        self.tokens = torch.randint(0, TOKENS - 1, (pairs,), **index)
        self.experts = torch.randint(0, EXPERTS, (pairs,), **index)
        self.adapters = torch.randint(-1, ADAPTERS, (TOKENS,), **index)
        self.adapters[0] = -1
        self.weights = torch.rand(pairs, device=DEVICE)

    def table(self, banks: list[torch.Tensor]) -> torch.Tensor:
        table = torch.zeros(len(banks), EXPERTS, dtype=torch.int64, device=DEVICE)
        for s, bank in enumerate(banks):
            moe_lora.fill_w_ptr(table, bank, EXPERTS, s)
        return table

    @property
    def index(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tokens, self.experts

    def low(self, dtype: torch.dtype, by_pair: bool = False) -> torch.Tensor:
        """`[slices, pairs, rank]`, 0 without an adapter."""
        result = torch.zeros(len(self.a), self.pairs, self.rank, dtype=dtype, device=DEVICE)
        for p, (token, expert) in enumerate(zip(self.tokens.tolist(), self.experts.tolist(), strict=True)):
            adapter = int(self.adapters[token])
            for s, bank in enumerate(self.a if adapter >= 0 else ()):
                result[s, p] = bank[adapter, expert].to(dtype) @ (self.by_pair[p] if by_pair else self.x[token]).to(
                    dtype
                )
        return result

    def high(self, low: torch.Tensor, dtype: torch.dtype, finalize: bool) -> torch.Tensor:
        result = torch.zeros(TOKENS if finalize else self.pairs, sum(self.widths), dtype=dtype, device=DEVICE)
        for p, (token, expert) in enumerate(zip(self.tokens.tolist(), self.experts.tolist(), strict=True)):
            adapter = int(self.adapters[token])
            if adapter >= 0:
                row, weight = (token, self.weights[p].to(dtype)) if finalize else (p, 1.0)
                parts = [bank[adapter, expert].to(dtype) @ low[s, p].to(dtype) for s, bank in enumerate(self.b)]
                result[row] += weight * torch.cat(parts)
        return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_pair", [False, True])
def test_shrink_adds(backend: str, dtype: torch.dtype, by_pair: bool) -> None:
    skip_unless_runs(backend, dtype)
    p = Problem(dtype)
    before = torch.randn(2, p.pairs, p.rank, device=DEVICE).to(dtype)
    y, source = before.clone(), p.by_pair if by_pair else p.x
    table, stride = p.table(p.a), p.a[0].stride(0)
    moe_lora.bgmv_moe_shrink(y, source, table, *p.index, p.adapters, stride, per_pair_input=by_pair)
    exact, single = (before.to(d) + p.low(d, by_pair) for d in (torch.float64, torch.float32))
    assert_close_to_oracle(y, exact, single.to(dtype))
    without = p.adapters[p.tokens] < 0
    assert torch.equal(y[:, without], before[:, without])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("finalize", [False, True])
def test_expand_adds(backend: str, dtype: torch.dtype, finalize: bool) -> None:
    skip_unless_runs(backend, dtype)
    p = Problem(dtype)
    low = torch.randn(2, p.pairs, p.rank, device=DEVICE).to(dtype)
    y = before = torch.randn(TOKENS if finalize else p.pairs, 64, device=DEVICE)
    y = before.clone()
    begins = torch.tensor([0, 40], device=DEVICE)
    table, stride = p.table(p.b), (p.b[0].stride(0), p.b[1].stride(0))
    for s in (0, 1):  # slices of unequal widths have strides of their own
        view = (table[s : s + 1], *p.index, p.weights, p.adapters, begins[s : s + 1], [p.widths[s]], stride[s])
        moe_lora.bgmv_moe_expand(y, low[s : s + 1], *view, finalize=finalize)
    exact, single = (before.to(d) + p.high(low, d, finalize) for d in (torch.float64, torch.float32))
    assert_close_to_oracle(y, exact, single)


@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("widths", [(48,), (33, 7)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_both_at_once(backend: str, rank: int, widths: tuple[int, ...], index: torch.dtype) -> None:
    p = Problem(torch.float16, rank, 130, widths)
    p.tokens, p.experts, p.adapters = (t.to(index) for t in (p.tokens, p.experts, p.adapters))
    got = moe_lora.bgmv_moe(p.x, p.a, p.b, *p.index, p.adapters, p.weights, EXPERTS)
    exact, single = (p.high(p.low(d), d, True) for d in (torch.float64, torch.float32))
    assert_close_to_oracle(got, exact, single.half())


@pytest.mark.parametrize("one_table", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_of_gate_and_up(backend: str, dtype: torch.dtype, one_table: bool) -> None:
    """Every slot of a token by itself, unweighted; one A for both where the tables have one dimension."""
    skip_unless_runs(backend, dtype)
    p = Problem(dtype, widths=(48,) if one_table else (24, 24), pairs=3 * TOKENS)
    p.tokens = torch.arange(TOKENS, device=DEVICE).repeat_interleave(3)
    a, b = (p.table(bank) for bank in (p.a, p.b))
    tables = (a[0], b[0]) if one_table else (a, b)
    strides = (p.a[0].stride(0), p.b[0].stride(0))
    got = moe_lora.bgmv_moe_gemm1_lora_delta(
        p.x, tables[0], strides[0], tables[1], strides[1], p.experts.view(TOKENS, 3), p.adapters, p.rank, 24,
        lora_dtype=dtype, scale=0.75, out_dtype=dtype,
    )  # fmt: skip
    exact, single = (0.75 * p.high(p.low(d), d, False) for d in (torch.float64, torch.float32))
    assert got.shape == (TOKENS, 3, 48)
    assert_close_to_oracle(got.flatten(0, 1), exact, single.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_of_the_result(backend: str, dtype: torch.dtype) -> None:
    """Rows in any order; slots without one add nothing, though their weight be NaN and their expert nowhere."""
    skip_unless_runs(backend, dtype)
    p = Problem(dtype, widths=(40,), pairs=3 * TOKENS)
    p.tokens = torch.arange(TOKENS, device=DEVICE).repeat_interleave(3)
    places = torch.randperm(p.pairs + 5, device=DEVICE)[: p.pairs]
    permuted = torch.full((p.pairs + 5, 72), float("nan"), dtype=dtype, device=DEVICE)
    permuted[places] = p.by_pair
    gone = torch.arange(p.pairs, device=DEVICE) % 5 == 2
    permuted[places[gone]] = float("nan")
    p.by_pair[gone] = 0
    a, b = (p.table(bank) for bank in (p.a, p.b))
    ids = p.experts.masked_fill(gone, 2**20).view(TOKENS, 3)
    weights = p.weights.masked_fill(gone, float("nan")).view(TOKENS, 3)
    got = moe_lora.bgmv_moe_gemm2_lora_delta(
        permuted, places.masked_fill(gone, -1), a, p.a[0].stride(0), b, p.b[0].stride(0), ids, weights, p.adapters,
        p.rank, 40, lora_dtype=dtype, scale=1.5, out_dtype=dtype,
    )  # fmt: skip
    exact, single = (1.5 * p.high(p.low(d, by_pair=True), d, True) for d in (torch.float64, torch.float32))
    assert_close_to_oracle(got, exact, single.to(dtype))


def test_deltas_of_pairs_that_are_nowhere() -> None:
    p = Problem(torch.float16, widths=(40,), pairs=TOKENS)
    a, b, ids = p.table(p.a), p.table(p.b), p.experts.view(TOKENS, 1)
    got = moe_lora.bgmv_moe_gemm2_lora_delta(
        p.by_pair[:0], torch.full_like(ids.flatten(), -1), a, 1, b, 1, ids, p.weights[:, None], p.adapters, p.rank, 40
    )
    assert got.shape == (TOKENS, 40) and not got.any()


def test_errors_of_deltas() -> None:
    p = Problem(torch.float16, widths=(24, 24), pairs=TOKENS)
    a, b, ids = p.table(p.a), p.table(p.b), p.experts.view(TOKENS, 1)
    for tables, name in (((a[0], b), "w_ptr_a"), ((a, b[:1]), "w_ptr_b")):
        with pytest.raises((TypeError, ValueError), match=f"^{name}"):
            moe_lora.bgmv_moe_gemm1_lora_delta(p.x, tables[0], 1, tables[1], 1, ids, p.adapters, p.rank, 24)
    with pytest.raises(ValueError, match=r"^lora_ids"):
        moe_lora.bgmv_moe_gemm1_lora_delta(p.x, a, 1, b, 1, ids, p.adapters[:3], p.rank, 24)
    with pytest.raises(ValueError, match=r"^expanded_idx_to_permuted_idx"):
        moe_lora.bgmv_moe_gemm2_lora_delta(
            p.by_pair, ids.flatten()[:2], a[:1], 1, b[:1], 1, ids, p.weights[:, None], p.adapters, p.rank, 24
        )


def test_nothing_to_do(backend: str) -> None:
    p = Problem(torch.float16, pairs=0)
    assert (moe_lora.bgmv_moe(p.x, p.a, p.b, *p.index, p.adapters, p.weights, EXPERTS) == 0).all()
    p = Problem(torch.float16)
    p.adapters.fill_(-1)
    assert (moe_lora.bgmv_moe(p.x, p.a, p.b, *p.index, p.adapters, p.weights, EXPERTS) == 0).all()


def test_repeats_bit_for_bit(backend: str) -> None:
    p = Problem(torch.float16, pairs=60)
    first, second = (moe_lora.bgmv_moe(p.x, p.a, p.b, *p.index, p.adapters, p.weights, EXPERTS) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "lora", "triton")
    p, out = Problem(torch.bfloat16), poisoned((TOKENS, 64), torch.bfloat16, DEVICE)
    call = (p.x, p.a, p.b, p.tokens, p.experts, p.adapters, p.weights, EXPERTS)
    graph = captured(lambda: out.copy_(moe_lora.bgmv_moe(*call)))
    p.tokens.copy_(torch.randint(0, TOKENS, (p.pairs,), device=DEVICE))
    graph.replay()
    assert torch.equal(out, moe_lora.bgmv_moe(*call))


def test_errors_name_the_argument() -> None:
    p = Problem(torch.float16)
    table = p.table(p.a)
    y = torch.zeros(2, p.pairs, p.rank, device=DEVICE)
    with pytest.raises(ValueError, match=r"^x: "):
        moe_lora.bgmv_moe_shrink(y, p.x[:3], table, *p.index, p.adapters, 1)
    with pytest.raises(ValueError, match=r"^w_ptr"):
        moe_lora.bgmv_moe_shrink(y, p.x, table.int(), *p.index, p.adapters, 1)
    with pytest.raises(ValueError, match=r"^slice_id"):
        moe_lora.fill_w_ptr(table, p.a[0], EXPERTS, 2)
    with pytest.raises(ValueError, match=r"^weights"):
        moe_lora.fill_w_ptr(table, p.a[0].transpose(2, 3), EXPERTS, 0)
    with pytest.raises(ValueError, match=r"^lora_b_weights"):
        moe_lora.bgmv_moe(p.x, p.a, p.a, *p.index, p.adapters, p.weights, EXPERTS)
    if DEVICE == "cpu":
        p.experts[3] = EXPERTS
        with pytest.raises(ValueError, match=r"^expert_ids"):
            moe_lora.bgmv_moe_shrink(y, p.x, table, *p.index, p.adapters, p.a[0].stride(0))
