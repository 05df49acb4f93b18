"""A small continuous-batching engine: requests join and leave a running batch at every step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from attention import PackedStep, PagedAttention
from kv_pages import PagePool
from model import Llama

from flashinfer.logits_processor import LogitsPipe, LogitsProcessor, MinP, Sample, Softmax, Temperature, TopK, TopP


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


def sampling_pipe(s: Sampling) -> LogitsPipe:
    """The filters that are on, from logits to a token; fused into as few calls as there are kernels for."""
    steps: list[LogitsProcessor] = [Temperature(temperature=s.temperature)]
    if s.top_k > 0:
        steps.append(TopK(top_k=s.top_k))
    steps.append(Softmax())
    if s.top_p < 1:
        steps.append(TopP(top_p=s.top_p))
    if s.min_p > 0:
        steps.append(MinP(min_p=s.min_p))
    return LogitsPipe([*steps, Sample()])


@dataclass(frozen=True)
class Limits:
    """What the engine may hold. max_batch: requests at once. max_step_tokens: new tokens computed in one step."""

    max_batch: int = 8
    max_step_tokens: int = 128
    num_pages: int = 128
    page_size: int = 16

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {self.max_batch}.")
        if self.max_step_tokens < self.max_batch:
            raise ValueError(
                f"max_step_tokens must be at least max_batch ({self.max_batch}), since every decoding request takes "
                f"one token of it; got {self.max_step_tokens}."
            )


@dataclass
class Request:
    """One prompt and its answer.

    prompt, output: token ids. pages: its page table. num_cached: tokens whose keys and values are in the cache.
    """

    index: int
    prompt: list[int]
    max_new_tokens: int
    output: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    state: str = "waiting"

    @property
    def max_cached(self) -> int:
        """Tokens its pages must hold in the end; the last token generated is never fed back."""
        return len(self.prompt) + self.max_new_tokens - 1

    def next_tokens(self, budget: int) -> list[int]:
        """The tokens to compute now: a chunk of the prompt, or the newest token."""
        return self.output[-1:] or self.prompt[self.num_cached : self.num_cached + budget]


@dataclass
class Stats:
    """Counts of a run.

    mixed_steps: steps with both prefill and decode in them. max_running: most requests that ran at once.
    prefill_seconds: time of steps with any prefill in them. decode_only_*: tokens and time of the other steps.
    """

    steps: int = 0
    mixed_steps: int = 0
    max_running: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_only_tokens: int = 0
    decode_only_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_only_seconds


class Engine:
    """Serves requests with one model and one paged KV cache.

    Every `step` admits what fits, packs one token of each decoding request and chunks of the prefilling ones into one
    batch, runs the model over it, and appends one token to each request whose prompt is done.
    """

    def __init__(
        self,
        model: Llama,
        limits: Limits,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] = (),
        backend: str = "auto",
    ) -> None:
        self.model = model
        self.limits = limits
        self.sampling = sampling or Sampling()
        self.eos_ids = frozenset(eos_ids)
        self.pool = PagePool(limits.num_pages, limits.page_size)
        self.attention = PagedAttention(
            model.config, limits.num_pages, limits.page_size, like=model.embedding, backend=backend
        )
        self.pipe = sampling_pipe(self.sampling)
        self.generator = torch.Generator(model.embedding.device).manual_seed(self.sampling.seed)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.stats = Stats()
        self._num_submitted = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, prompt: Sequence[int], max_new_tokens: int) -> Request:
        """Queue a prompt; raises ValueError for one that could never be admitted."""
        request = Request(self._num_submitted, list(prompt), max_new_tokens)
        if not prompt or max_new_tokens < 1:
            raise ValueError(f"request {request.index}: it needs a prompt and max_new_tokens of at least 1.")
        pages = self.pool.pages_for(request.max_cached)
        if pages > self.pool.num_pages:
            raise ValueError(
                f"request {request.index}: {len(prompt)} prompt tokens and {max_new_tokens} new ones need {pages} "
                f"pages of {self.pool.page_size} tokens, the pool has {self.pool.num_pages}. Raise num_pages."
            )
        self._num_submitted += 1
        self.waiting.append(request)
        return request

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One forward pass; returns the requests that finished in it."""
        start = time.perf_counter()
        self._admit()
        batch = self._schedule()
        if not batch:
            return []
        num_decodes = sum(bool(request.output) for request, _ in batch)
        for request, tokens in batch:
            request.num_cached += len(tokens)
            self.pool.grow(request.pages, request.num_cached)
        self.attention.plan(
            PackedStep(
                num_new_tokens=[len(tokens) for _, tokens in batch],
                kv_lens=[request.num_cached for request, _ in batch],
                page_tables=[request.pages for request, _ in batch],
                num_decodes=num_decodes,
            )
        )
        finished = self._compute(batch)
        self._count(batch, num_decodes, time.perf_counter() - start)
        return finished

    def _admit(self) -> None:
        """Let waiting requests join, first come first served, while a place and their pages can be promised."""
        while self.waiting and len(self.running) < self.limits.max_batch:
            if not self.pool.promise(self.waiting[0].max_cached):
                return
            request = self.waiting.popleft()
            request.state = "prefill"
            self.running.append(request)
            self.stats.max_running = max(self.stats.max_running, len(self.running))

    def _schedule(self) -> list[tuple[Request, list[int]]]:
        """Who computes which tokens: every decoding request first, then prompts while the step's budget lasts."""
        budget = self.limits.max_step_tokens
        batch = []
        for request in sorted(self.running, key=lambda r: not r.output):  # stable: keeps the order of joining
            tokens = request.next_tokens(budget)
            if tokens:
                budget -= len(tokens)
                batch.append((request, tokens))
        return batch

    def _compute(self, batch: list[tuple[Request, list[int]]]) -> list[Request]:
        """Run the model, give each request whose prompt is done its next token, and let the finished leave."""
        token_ids, ready, rows = [], [], []
        for request, tokens in batch:
            token_ids += tokens
            if request.output or request.num_cached == len(request.prompt):
                ready.append(request)
                rows.append(len(token_ids) - 1)
        device = self.model.embedding.device
        logits = self.model.forward(
            torch.tensor(token_ids, device=device), self.attention, torch.tensor(rows, dtype=torch.long, device=device)
        )
        self.stats.generated_tokens += len(ready)
        finished = []
        # The one wait for the device in a step: the host must see the tokens to go on.
        tokens = self.model.ranks.agreed(self._sample(logits)).tolist() if ready else []
        for request, token in zip(ready, tokens, strict=True):
            request.output.append(token)
            request.state = "decode"
            if token in self.eos_ids or len(request.output) == request.max_new_tokens:
                request.state = "done"
                self.running.remove(request)
                self.pool.release(request.pages, request.max_cached)
                finished.append(request)
        return finished

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        """One token for each row of `logits` `[batch, vocab_size]`."""
        if self.sampling.temperature == 0:
            return logits.argmax(dim=-1)
        return self.pipe(logits, generator=self.generator)

    def _count(self, batch: list[tuple[Request, list[int]]], num_decodes: int, seconds: float) -> None:
        stats, num_tokens = self.stats, sum(len(tokens) for _, tokens in batch)
        stats.steps += 1
        stats.prompt_tokens += num_tokens - num_decodes
        if num_decodes == len(batch):
            stats.decode_only_tokens += num_tokens
            stats.decode_only_seconds += seconds
        else:
            stats.mixed_steps += bool(num_decodes)
            stats.prefill_seconds += seconds
