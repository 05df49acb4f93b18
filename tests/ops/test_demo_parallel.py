"""The demo's engine on several ranks says what it says on one."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from tests.ops.test_demo_engine import CONFIG, NaiveLlama, demo, drain, make_prompts, random_weights
from tests.ranks import run_ranks

from engine import Engine, Limits  # isort: skip (the import above made the folder of examples known)
from model import Llama
from parallel import Ranks

NUM_NEW = 8
MODELS = {"llama": (CONFIG, 2, [5, 1, 33, 16, 7]), "mixtral": (replace(CONFIG, num_experts=6), 7, [5, 80, 1, 12, 33])}


def _tokens(rank: int, world_size: int, device: torch.device) -> dict[str, list[list[int]]]:
    """What each request of each model is answered; the cache starts as NaN."""
    said = {}
    for name, (config, seed, lengths) in MODELS.items():
        ranks = Ranks(world_size, rank)
        own, weights = ranks.shard(config, random_weights(config, seed))
        assert (own.num_qo_heads, own.num_kv_heads, own.intermediate_size) == (3, 1, 40)
        model = Llama(own, {k: w.to(device) for k, w in weights.items()}, ranks)
        engine = Engine(model, Limits(max_batch=3, max_step_tokens=40, num_pages=48, page_size=4))
        engine.attention.cache.fill_(torch.nan)
        requests = [engine.submit(prompt, NUM_NEW) for prompt in make_prompts(seed, lengths)]
        drain(engine)
        said[name] = [request.output for request in requests]
        ranks.close()
    return said


def compare(results: list[dict[str, list[list[int]]]]) -> None:
    for name, (config, seed, lengths) in MODELS.items():
        naive = NaiveLlama(random_weights(config, seed))
        want = [naive.greedy(prompt, NUM_NEW) for prompt in make_prompts(seed, lengths)]
        for rank, said in enumerate(results):
            assert said[name] == want, f"{name}, rank {rank}"


def test_two_ranks_say_what_one_says() -> None:
    compare(run_ranks(_tokens, 2))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_say_what_one_says() -> None:
    compare(run_ranks(_tokens, 2, device="cuda"))


def test_slices_make_up_the_weights() -> None:
    config = replace(CONFIG, num_experts=3)
    whole = random_weights(config, 0)
    shares = [Ranks(2, rank).shard(config, whole)[1] for rank in range(2)]
    for name, weight in whole.items():
        mine = [share[name] for share in shares]
        if weight.shape == mine[0].shape:
            assert all(x is weight for x in mine)
            continue
        (dim,) = [i for i in range(weight.dim()) if weight.shape[i] != mine[0].shape[i]]
        if name.endswith("gate_up_proj"):  # gate above up, on each rank
            mine = [torch.cat(parts, dim=dim) for parts in zip(*(x.chunk(2, dim=dim) for x in mine), strict=True)]
        assert torch.cat(mine, dim=dim).equal(weight), name
    assert Ranks().shard(config, whole)[1] is whole


def run_demo(*args: str) -> int:
    size = ["--hidden-size=32", "--intermediate-size=64", "--num-layers=2", "--head-dim=8", "--threads=2"]
    return demo.main(["--random-weights", "--device=cpu", "--max-new-tokens=4", *size, *args])


def test_the_demo_on_two_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    prompts = ["--prompt=one two three", "--prompt=four"]
    assert run_demo(*prompts) == 0
    alone = capfd.readouterr().out
    assert run_demo(*prompts, "--tensor-parallel=2") == 0
    shared = capfd.readouterr().out
    answers = re.compile(r"^\[\d\].*\n.*->.*$", re.MULTILINE)
    assert sorted(answers.findall(shared)) == sorted(answers.findall(alone)) and len(answers.findall(alone)) == 2
    assert "shared by 2 ranks" in shared


def test_heads_must_divide(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_demo("--tensor-parallel=3") == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == ["error: num_qo_heads 8 is not a multiple of --tensor-parallel 3."]
    with pytest.raises(SystemExit):
        run_demo("--tensor-parallel=0")
    assert "--tensor-parallel: got 0" in capfd.readouterr().err
