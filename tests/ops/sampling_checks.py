"""What tests of sampling share: chi-square of draws, and the noise of powers on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flashinfer.ops.sampling import Draws, Filters, reference

ROUNDING = 2.0**-24
ON_GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)
# More tokens than a program holds candidates; an odd number of them; several tiles.
LARGE = 128_257 if ON_GPU else 9_001
# The interpreter takes some 20 ms for each program.
DRAWS, CALLS = (100_000, 10) if ON_GPU else (30, 1)


def fresh_seed() -> int:
    return int(torch.randint(2**62, ()))


def random_logits(rows: int, vocab: int, device: str, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, device=device) * scale


def target(probs: torch.Tensor, filters: Filters) -> torch.Tensor:
    """fp64 `[batch, vocab]`: the distribution that the filters leave of `probs`, by the torch implementation."""
    keep = reference.kept_by(probs, filters)
    kept = probs.double() if keep is None else torch.where(keep, probs.double(), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def count_draws(draw: Callable[[Draws], torch.Tensor], vocab: int, device: str) -> torch.Tensor:
    """How often each token comes in DRAWS * CALLS draws of row 1."""
    counts = torch.zeros(vocab, dtype=torch.long, device=device)
    indices = torch.ones(DRAWS, dtype=torch.int32, device=device)
    seed = fresh_seed()
    for call in range(CALLS):
        tokens = draw(Draws(seed, call, DRAWS, indices))
        counts += torch.bincount(tokens.long(), minlength=vocab)
    return counts


def assert_counts(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """Pearson's chi-square of how often each token came, rare ones put together; false alarm once in a million.

    Tokens of probability 0 must not come at all. The quantile is that of Wilson and Hilferty, 4.75 deviations up.
    """
    counts, probs = counts.double().cpu(), probs.double().cpu()
    assert not counts[probs == 0].any(), "a token of probability 0 was drawn"
    expected = probs / probs.sum() * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = max(len(counts) - 1, 1)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, limit {limit:.1f}"


def assert_distributed(samples: torch.Tensor, probs: torch.Tensor) -> None:
    """`assert_counts` of tokens."""
    counts = torch.bincount(samples.cpu().long(), minlength=probs.numel())
    assert counts.numel() == probs.numel(), "a sample is outside of the vocabulary"
    assert_counts(counts, probs)


def softmax_noise(logits: torch.Tensor, temperature: torch.Tensor | float, oracle: torch.Tensor) -> torch.Tensor:
    """What the rounding of `exp2((x - max) * (log2(e) / temperature)) / sum` may add to each fp64 probability.

    The exponent is rounded four times: the difference, the constant, the scale, the product. On a GPU the power itself
    may err by 2^-22 of its size (PTX ISA, ex2.approx). The sum's error is the mean of its terms'.
    """
    wide = logits.double()
    distance = (wide.amax(-1, keepdim=True) - wide).nan_to_num(posinf=0.0) / temperature
    relative = 4 * ROUNDING * distance + 4 * ROUNDING
    return oracle * (relative + (oracle * relative).sum(-1, keepdim=True))
