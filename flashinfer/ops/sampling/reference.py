"""Sampling in plain torch: filters, renormalisation and inverse-transform draws, without host sync on a GPU.

Running sums are taken over 60-bit integers, not floats: they are exact, monotone and the same on every run, so a draw
never lands on a token of probability 0. A parameter (`top_k`, ...) is a Python number or a tensor `[batch_size]`.
A row without any weight (all zeros, or NaN) gives the last token and `valid` False.
"""

from __future__ import annotations

import torch

Parameter = float | torch.Tensor

WEIGHT_BITS = 60
HEAD = 1024
WORD = 0xFFFFFFFF


def _column(value: Parameter) -> Parameter:
    return value[:, None] if isinstance(value, torch.Tensor) else value


def softmax(logits: torch.Tensor, temperature: Parameter) -> torch.Tensor:
    """fp32 `softmax(logits / temperature)`; temperature 0 is its limit: the largest logits share all of it."""
    x = logits.float()
    x = x - x.amax(dim=-1, keepdim=True)
    return torch.softmax(torch.where(x == 0, x, x / _column(temperature)), dim=-1)


def _weights(probs: torch.Tensor) -> torch.Tensor:
    """int64 weights proportional to `probs` `[batch_size, vocab]`, a row summing to about 2^60; NaN counts as 0."""
    wide = probs.double()
    scale = 2.0**WEIGHT_BITS / wide.nansum(dim=-1, keepdim=True)
    return (wide * scale).nan_to_num_(nan=0.0).long()


def _kth_largest(x: torch.Tensor, k: int | torch.Tensor) -> torch.Tensor:
    """`[batch_size, 1]`: the k-th largest of each row; k beyond the vocabulary means the smallest."""
    vocab = x.shape[-1]
    if not isinstance(k, torch.Tensor):
        return torch.topk(x, min(k, vocab)).values[:, -1:]
    k = k.long().clamp(1, vocab)
    largest = int(k.max()) if k.is_cpu and k.numel() > 0 else vocab
    return torch.topk(x, largest).values.gather(1, k[:, None] - 1)


def keep_top_k(x: torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor:
    """bool like x: the top_k largest of each row, and all that equal the last of them."""
    return x >= _kth_largest(x, top_k)


def _largest(weights: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The weights of each row, largest first: all, or on the CPU, where one may look, a head that holds `mass`."""
    if weights.is_cpu and weights.shape[-1] > HEAD:
        head = weights.topk(HEAD).values
        if bool((head.sum(dim=-1, keepdim=True) >= mass).all()):
            return head
    return weights.sort(dim=-1, descending=True).values


def keep_top_p(probs: torch.Tensor, top_p: Parameter) -> torch.Tensor:
    """bool like probs: the fewest most probable tokens that hold top_p of the row, and all that equal the last of them.

    The most probable token is always kept (Holtzman et al., "The Curious Case of Neural Text Degeneration").
    """
    weights = _weights(probs)
    mass = weights.sum(dim=-1, keepdim=True).double() * _column(top_p)
    ordered = _largest(weights, mass)
    needed = ordered.cumsum(dim=-1) - ordered < mass
    last = needed.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    return (weights >= ordered.gather(1, last)) | (_column(top_p) >= 1)


def keep_min_p(probs: torch.Tensor, min_p: Parameter) -> torch.Tensor:
    """bool like probs: tokens at least min_p times as probable as the most probable one."""
    wide = probs.float()
    return wide >= wide.amax(dim=-1, keepdim=True) * _column(min_p)


def mask_logits(logits: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """logits where `keep`, -inf elsewhere."""
    return logits.masked_fill(~keep, float("-inf"))


def renormalise(probs: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """probs where `keep`, 0 elsewhere, divided by their sum, in probs' dtype; a row of zeros stays one."""
    kept = torch.where(keep, probs.float(), 0.0)
    total = kept.sum(dim=-1, keepdim=True)
    return torch.where(total == 0, kept, kept / total).to(probs.dtype)


def sample(probs: torch.Tensor, keep: torch.Tensor | None, draw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row, proportionally to `probs` where `keep`, by inverse transform of `draw` `[batch_size]` in [0, 1).

    Returns (tokens int64 `[batch_size]`, valid bool `[batch_size]`).
    """
    weights = _weights(probs if keep is None else torch.where(keep, probs, 0.0))
    running = weights.cumsum(dim=-1)
    total = running[:, -1]
    target = torch.minimum((draw * total.double()).long(), total - 1)
    token = torch.searchsorted(running, target[:, None], right=True).squeeze(1)
    return token.clamp(max=probs.shape[-1] - 1), total > 0


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of `a * b`; the int64 product wraps, its bits are right."""
    product = a * b
    return (product >> 32) & WORD, product & WORD


def uniform(batch_size: int, seed: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """fp64 `[batch_size]` in [0, 1): Philox4x32-10 (Salmon et al., SC 2011) of key seed and counter (offset, row).

    seed, offset: int64 `[1]` or `[batch_size]`, read as unsigned.
    """
    row = torch.arange(batch_size, device=seed.device)
    counter = [offset & WORD, (offset >> 32) & WORD, row, torch.zeros_like(row)]
    key_low, key_high = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        high_0, low_0 = _multiply(0xD2511F53, counter[0])
        high_1, low_1 = _multiply(0xCD9E8D57, counter[2])
        counter = [high_1 ^ counter[1] ^ key_low, low_1, high_0 ^ counter[3] ^ key_high, low_0]
        key_low, key_high = (key_low + 0x9E3779B9) & WORD, (key_high + 0xBB67AE85) & WORD
    return ((counter[0] << 21) | (counter[1] >> 11)).double() * 2.0**-53
