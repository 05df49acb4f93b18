"""`torch.compile(fullgraph=True)` over a Llama decoder layer of this package's ops, attention included."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import nn

import flashinfer
from tests.ops.common import captured

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, PAGES, HIDDEN, WIDTH = 4, 2, 32, 4, 24, 64, 96
COMPILERS = ["eager", "aot_eager", *(["inductor"] if ON_GPU or shutil.which("g++") else [])]
Wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper | flashinfer.BatchPrefillWithPagedKVCacheWrapper


pytestmark = pytest.mark.compiles


class Batch:
    """Requests whose last tokens, `qo_lens` of them, are new. kv_lens: with these."""

    def __init__(self, qo_lens: list[int], kv_lens: list[int]) -> None:
        pages = [-(-n // PAGE_SIZE) for n in kv_lens]
        self.qo_indptr = int32([sum(qo_lens[:i]) for i in range(len(qo_lens) + 1)])
        self.indptr = int32([sum(pages[:i]) for i in range(len(pages) + 1)])
        self.indices = torch.randperm(PAGES, device=DEVICE)[: sum(pages)].int()
        self.last = int32([(n - 1) % PAGE_SIZE + 1 for n in kv_lens])
        nnz, lens = sum(qo_lens), int32(kv_lens)
        self.where = flashinfer.get_batch_indices_positions(self.qo_indptr, lens, nnz)

    def plan(self, wrapper: Wrapper) -> None:
        table, heads = (self.indptr, self.indices, self.last), (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)
        if isinstance(wrapper, flashinfer.BatchPrefillWithPagedKVCacheWrapper):
            wrapper.plan(self.qo_indptr, *table, *heads, causal=True, q_data_type=DTYPE)
        else:
            wrapper.plan(*table, *heads, q_data_type=DTYPE)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def linear(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter((torch.randn(columns, rows, device=DEVICE) / rows**0.5).to(DTYPE), requires_grad=False)


class Layer(nn.Module):
    """A Llama decoder layer: weights, and a paged KV cache of its own."""

    def __init__(self, wrapper: Wrapper) -> None:
        super().__init__()
        self.wrapper = wrapper
        self.cache = torch.randn(PAGES, 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
        self.norms = nn.ParameterList(nn.Parameter(torch.rand(HIDDEN, device=DEVICE).to(DTYPE)) for _ in range(2))
        self.qkv = linear(HIDDEN, (NUM_QO_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
        self.o, self.down = linear(NUM_QO_HEADS * HEAD_DIM, HIDDEN), linear(WIDTH, HIDDEN)
        self.gate_up = linear(HIDDEN, 2 * WIDTH)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, where: tuple[torch.Tensor, ...], table: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flashinfer.fused_add_rmsnorm(x, residual, self.norms[0])
        qkv = (x @ self.qkv.t()).view(x.shape[0], -1, HEAD_DIM)
        q, k, v = qkv.split((NUM_QO_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
        flashinfer.apply_rope_pos_ids_inplace(q, k, where[1], rope_theta=5e5)
        flashinfer.append_paged_kv_cache(k, v, *where, self.cache, *table)
        x = self.wrapper.run(q, self.cache).flatten(1) @ self.o.t()
        flashinfer.fused_add_rmsnorm(x, residual, self.norms[1])
        return flashinfer.silu_and_mul(x @ self.gate_up.t()) @ self.down.t(), residual


def make_wrapper(kind: str) -> Wrapper:
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=DEVICE)
    if kind == "decode":
        return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)


def batches(kind: str) -> list[Batch]:
    """Of one number of rows, then of another."""
    if kind == "decode":
        return [Batch([1] * 4, lens) for lens in ([5, 1, 9, 8], [6, 17, 3, 9])] + [Batch([1] * 3, [2, 30, 4])]
    return [Batch([2, 3], [5, 3]), Batch([4, 1], [4, 19]), Batch([3, 2, 2], [20, 2, 9])]


def check(layers: list[Layer], compiled: Callable[..., list[torch.Tensor]], batch: Batch) -> None:
    """One step, compiled and not, from the same state: the same bits, inductor's own arithmetic aside."""
    nnz = batch.where[0].shape[0]
    x, residual = torch.randn(2, nnz, HIDDEN, device=DEVICE).to(DTYPE)
    caches = [layer.cache.clone() for layer in layers]
    table = (batch.indices, batch.indptr, batch.last)
    got = compiled(x.clone(), residual.clone(), batch.where, table)
    written = [layer.cache.clone() for layer in layers]
    for layer, cache in zip(layers, caches, strict=True):
        layer.cache.copy_(cache)
    expected = model(layers)(x.clone(), residual.clone(), batch.where, table)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
    for layer, cache in zip(layers, written, strict=True):
        assert torch.equal(layer.cache, cache)
    assert not torch.equal(layers[-1].cache, caches[-1])


def model(layers: list[Layer]) -> Callable[..., list[torch.Tensor]]:
    def forward(
        x: torch.Tensor, residual: torch.Tensor, where: tuple[torch.Tensor, ...], table: tuple[torch.Tensor, ...]
    ) -> list[torch.Tensor]:
        for layer in layers:
            x, residual = layer(x, residual, where, table)
        return [x, residual]

    return forward


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_layers_compile_without_a_break(kind: str, compiler: str) -> None:
    wrapper = make_wrapper(kind)
    layers = [Layer(wrapper) for _ in range(2)]
    compiled = torch.compile(model(layers), fullgraph=True, backend=compiler)
    for batch in batches(kind):
        batch.plan(wrapper)
        check(layers, compiled, batch)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@torch.fx.experimental._config.patch(use_duck_shape=False)  # sizes that happen to be equal once need not stay so
def test_another_plan_compiles_nothing(kind: str) -> None:
    """What a plan holds is not in the graph; sizes of tensors are, once for all."""
    wrapper = make_wrapper(kind)
    layers = [Layer(wrapper)]
    compiled = torch.compile(model(layers), fullgraph=True, backend="eager", dynamic=True)
    first, *others = batches(kind)
    first.plan(wrapper)
    check(layers, compiled, first)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in others:
            batch.plan(wrapper)
            check(layers, compiled, batch)


def test_options_of_the_plan_are_not_in_the_graph() -> None:
    wrapper, (batch, *_) = make_wrapper("prefill"), batches("prefill")
    q = torch.randn(5, NUM_QO_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
    cache = torch.randn(PAGES, 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
    compiled = torch.compile(lambda q: wrapper.run(q, cache), fullgraph=True, backend="eager")
    table = (batch.qo_indptr, batch.indptr, batch.indices, batch.last, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)
    results = []
    for options in ({"causal": True}, {"causal": False}, {"window_left": 1}, {"sm_scale": 1.0}):
        wrapper.plan(*table, q_data_type=DTYPE, **options)
        with torch._dynamo.config.patch(error_on_recompile=bool(results)):
            results.append(compiled(q))
        assert torch.equal(results[-1], wrapper.run(q, cache))
    assert not any(torch.equal(x, y) for i, x in enumerate(results) for y in results[:i])


def test_everything_a_run_takes() -> None:
    """Scales of both kinds, sinks, lse, out=, rows of no request."""
    wrapper, (batch, *_) = make_wrapper("prefill"), batches("prefill")
    batch.plan(wrapper)
    q = torch.randn(9, NUM_QO_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)  # 4 rows more than there are queries
    cache = torch.randn(PAGES, 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
    scale, sinks = torch.rand(NUM_QO_HEADS, device=DEVICE), torch.randn(NUM_QO_HEADS, device=DEVICE)
    if not ON_GPU:
        q = q[:5]  # a plan from the host knows its rows

    def runs(q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> list[torch.Tensor]:
        wrapper.run(q, cache, out=out, lse=lse, return_lse=True)
        pair = wrapper.run_return_lse(q, cache, q_scale=scale, k_scale=0.5, v_scale=2.0, sinks=sinks)
        return [wrapper.run(q, (cache[:, 0], cache[:, 1])), *pair, out, lse]

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(q), torch.ones(q.shape[:2], device=DEVICE)

    got = torch.compile(runs, fullgraph=True, backend="aot_eager")(q, *outputs())
    for ours, theirs in zip(got, runs(q, *outputs()), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_single_requests(compiler: str) -> None:
    q = torch.randn(6, NUM_QO_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
    k, v = torch.randn(2, 17, NUM_KV_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
    mask = torch.rand(6, 17, device=DEVICE) < 0.7

    def runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
        prefill, decode = flashinfer.single_prefill_with_kv_cache, flashinfer.single_decode_with_kv_cache
        masked = prefill(q, k, v, custom_mask=mask, return_lse=True)
        capped = prefill(q, k, v, causal=True, logits_soft_cap=5.0, pos_encoding_mode="ALIBI")
        turned = prefill(q, k.transpose(0, 1), v.transpose(0, 1), kv_layout="HND", pos_encoding_mode="ROPE_LLAMA")
        return [*masked, capped, turned, decode(q[0], k, v, window_left=4, k_scale=0.5)]

    got = torch.compile(runs, fullgraph=True, backend=compiler)(q, k, v)
    for ours, theirs in zip(got, runs(q, k, v), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_merging_of_states(compiler: str) -> None:
    """A cascade: parts of the keys attended one by one, merged in each of the ways."""
    mask = torch.tensor([True, False, True, True, False, True], device=DEVICE)

    def merges(v: torch.Tensor, s: torch.Tensor, out: torch.Tensor, out_s: torch.Tensor) -> list[torch.Tensor]:
        v_ab, s_ab = flashinfer.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
        flashinfer.merge_state_in_place(out, out_s, v[:, 2], s[:, 2], mask)
        flashinfer.merge_state_in_place(v_ab, s_ab, out, out_s)
        return [*flashinfer.merge_states(v, s), v_ab, s_ab, out, out_s]

    compiled = torch.compile(merges, fullgraph=True, backend=compiler, dynamic=True)
    for num_states in (3, 5):
        v = torch.randn(6, num_states, NUM_QO_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
        s = torch.randn(6, num_states, NUM_QO_HEADS, device=DEVICE)
        states = [(v, s, v[:, -1].clone(), s[:, -1].clone()) for _ in range(2)]
        for ours, theirs in zip(compiled(*states[0]), merges(*states[1]), strict=True):
            assert torch.equal(ours, theirs)


def test_errors_name_what_is_wrong() -> None:
    wrapper = make_wrapper("decode")
    q = torch.randn(4, NUM_QO_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
    cache = torch.randn(PAGES, 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, device=DEVICE).to(DTYPE)
    compiled = torch.compile(wrapper.run, fullgraph=True, backend="eager", dynamic=True)
    with pytest.raises(RuntimeError, match="before plan"):
        wrapper.run(q, cache)
    batches("decode")[0].plan(wrapper)
    assert torch.equal(compiled(q, cache), wrapper.run(q, cache))
    with pytest.raises(ValueError, match=r"q: got 3 rows, expected 4"):
        compiled(q[:3], cache)


def test_a_graph_may_outlive_its_wrapper() -> None:
    wrapper = make_wrapper("decode")
    number = wrapper._number
    q, kv = torch.randn(4, 4, 8), torch.randn(3, 4, 2, 8)
    del wrapper
    gc.collect()
    with pytest.raises(RuntimeError, match="does not exist any more"):
        torch.ops.flashinfer.attention_run([q.clone()], [q, kv, kv], [None] * 5, [1.0] * 4, [True], number)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graph_replays_after_another_plan(compiled: bool) -> None:
    """A captured layer runs what was planned last, compiled or not."""
    buffers = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in (5, PAGES, 4)]
    wrapper = flashinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        torch.empty(1 << 24, dtype=torch.uint8, device="cuda"), *buffers
    )
    layers = [Layer(wrapper)]
    step = model(layers)
    if compiled:
        step = torch.compile(step, fullgraph=True, backend="eager")
    first, second = batches("decode")[:2]
    x, residual = torch.randn(2, 4, HIDDEN, device="cuda").to(DTYPE)
    where = tuple(y.clone() for y in first.where)
    table = tuple(torch.zeros_like(buffer) for buffer in (buffers[1], buffers[0], buffers[2]))

    def prepare(batch: Batch) -> None:
        batch.plan(wrapper)
        for held, given in zip((*where, *table), (*batch.where, batch.indices, batch.indptr, batch.last), strict=True):
            held[: given.numel()].copy_(given)

    prepare(first)
    results: list[torch.Tensor] = []
    graph = captured(lambda: results.__setitem__(slice(None), step(x, residual, where, table)))
    for batch in (second, first):
        prepare(batch)
        fresh = torch.randn(2, 4, HIDDEN, device="cuda").to(DTYPE)
        x.copy_(fresh[0]), residual.copy_(fresh[1])
        cache = layers[0].cache.clone()
        graph.replay()
        written = layers[0].cache.clone()
        layers[0].cache.copy_(cache)
        expected = model(layers)(fresh[0].clone(), fresh[1].clone(), where, table)
        assert torch.equal(layers[0].cache, written)
        for ours, theirs in zip(results, expected, strict=True):
            assert torch.equal(ours, theirs)
