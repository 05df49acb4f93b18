"""Sampling in CUDA graphs: captured calls draw fresh numbers on each replay and follow what is in their inputs."""

from __future__ import annotations

import pytest
import torch

from flashinfer import sampling
from flashinfer.logits_processor import LogitsPipe, Sample, Softmax, TensorType, TopK, TopP
from flashinfer.topk import top_k, top_k_page_table_transform, top_k_varlen
from tests.ops.common import captured
from tests.ops.sampling_checks import assert_counts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("own_generator", [False, True])
def test_the_call_of_the_vllm_sampler(own_generator: bool) -> None:
    """`top_k_top_p_sampling_from_logits` with a value for each row: a million draws over 250 replays."""
    row = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1] + [1e-9] * 995, device="cuda")
    logits = row.log().expand(4000, 1000).contiguous()
    k, p = torch.full((4000,), 4, dtype=torch.int32, device="cuda"), torch.full((4000,), 0.8, device="cuda")
    generator = torch.Generator("cuda") if own_generator else None
    tokens = torch.empty(4000, dtype=torch.int32, device="cuda")

    def call() -> None:
        tokens.copy_(sampling.top_k_top_p_sampling_from_logits(logits, k, p, generator=generator, deterministic=True))

    graph = captured(call, *filter(None, [generator]))
    counts, previous = torch.zeros(1000, dtype=torch.long, device="cuda"), None
    for _ in range(250):
        graph.replay()
        assert previous is None or not torch.equal(tokens, previous)
        previous = tokens.clone()
        counts += torch.bincount(tokens.long(), minlength=1000)
    expected = torch.zeros(1000)
    expected[:3] = torch.tensor([0.3, 0.25, 0.2])  # of 0.9 that top_k keeps, 0.72 are needed: three tokens hold 0.75
    assert_counts(counts, expected)
    logits.copy_(logits.flip(1).contiguous())
    k.fill_(1)
    graph.replay()
    assert (tokens == 999).all()


def test_offsets_in_tensors() -> None:
    """A caller's own seed and offset tensors: equal offsets repeat, others do not."""
    probs = torch.rand(500, 3000, device="cuda").softmax(-1)
    seed, offset = torch.full((1,), 7, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    tokens = torch.empty(500, dtype=torch.int32, device="cuda")
    graph = captured(lambda: tokens.copy_(sampling.sampling_from_probs(probs, seed=seed, offset=offset)))
    seen = []
    for value in (1, 2, 1):
        offset.fill_(value)
        graph.replay()
        seen.append(tokens.clone())
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], sampling.sampling_from_probs(probs, seed=7, offset=2))


def test_everything_can_be_captured() -> None:
    """Every function under one graph, replayed on new inputs."""
    probs = torch.rand(8, 20_000, device="cuda").softmax(-1)
    k, p = torch.full((8,), 9, dtype=torch.int32, device="cuda"), torch.full((8,), 0.9, device="cuda")
    drafts = torch.randint(1000, (4, 3), device="cuda")
    draft, goal = (torch.rand(4, n, 1000, device="cuda").softmax(-1) for n in (3, 4))
    links = torch.tensor([[1, -1, -1]], device="cuda").expand(4, 3).contiguous()
    pipe = LogitsPipe([TopK(), Softmax(), TopP(), Sample()], input_type=TensorType.LOGITS)
    pages = torch.arange(20_000, device="cuda", dtype=torch.int32).expand(8, -1).contiguous()
    lengths = torch.full((8,), 15_000, dtype=torch.int32, device="cuda")
    results: list[torch.Tensor] = []

    def call() -> None:
        results.clear()
        results.extend(
            [
                sampling.softmax(probs.log(), p),
                sampling.sampling_from_logits(probs.log()),
                sampling.top_p_sampling_from_probs(probs, p),
                sampling.min_p_sampling_from_probs(probs, p),
                sampling.top_k_top_p_sampling_from_probs(probs, k, p, filter_apply_order="joint"),
                sampling.top_p_renorm_probs(probs, p),
                sampling.top_k_renorm_probs(probs, k),
                sampling.top_k_mask_logits(probs, k),
                sampling.chain_speculative_sampling(draft, drafts, goal)[0],
                sampling.tree_speculative_sampling(drafts, links, links, goal[:, :3])[0],
                top_k(probs, 40)[1],
                top_k_page_table_transform(probs, pages, lengths, 16),
                pipe(probs.log(), top_k=k, top_p=p),
                top_k_varlen(probs, lengths, 16)[0],
            ]
        )

    graph = captured(call)
    probs.copy_(torch.rand(8, 20_000, device="cuda").softmax(-1))
    graph.replay()
    kept = sampling.top_k_renorm_probs(probs, k)
    assert torch.equal(results[6], kept)
    assert torch.equal(results[5], sampling.top_p_renorm_probs(probs, p))
    assert (kept.gather(1, results[12].long()[:, None]) > 0).all()
    assert torch.equal(results[10].sort().values, probs.topk(40).indices.sort().values)
    assert ((results[8][:, 0] >= 0) & (results[9][:, 0] >= 0)).all()


def test_no_host_sync() -> None:
    """None of the other functions waits for the device; the samplers' own test is in test_sampling.py."""
    probs = torch.rand(5, 30_000, device="cuda")
    lengths = torch.full((5,), 100, dtype=torch.int32, device="cuda")
    drafts = torch.randint(1000, (4, 3), device="cuda")
    draft, goal = (torch.rand(4, n, 1000, device="cuda").softmax(-1) for n in (3, 4))
    pages = torch.zeros(5, 30_000, dtype=torch.int32, device="cuda")

    def step() -> None:
        top_k(probs, 40, sorted=True)
        top_k_page_table_transform(probs, pages, lengths, 16)
        sampling.chain_speculative_sampling(draft, drafts, goal)
        sampling.tree_speculative_sampling(drafts, drafts.clamp(max=-1), drafts.clamp(max=-1), goal[:, :3])
        sampling.min_p_renorm_probs(probs, 0.1)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
