"""Sampling in plain torch: filters, renormalisation and inverse-transform draws, without host sync on a GPU.

Running sums are taken over 60-bit integers, not floats: they are exact, monotone and the same on every run, so a draw
never lands on a token of probability 0. A parameter (`top_k`, ...) is a Python number or a tensor `[batch_size]`.
A row without any weight (all zeros, or NaN) gives the last token and `valid` False.
"""

from __future__ import annotations

import torch

from flashinfer.ops.sampling.elementwise import scale_logits
from flashinfer.ops.sampling.spec import Draws, Filters, Halves, Parameter, Seed, Selection, Tree

WEIGHT_BITS = 60
HEAD = 1024
WORD = 0xFFFFFFFF


def _column(value: Parameter) -> Parameter:
    return value[:, None] if isinstance(value, torch.Tensor) else value


def softmax(logits: torch.Tensor, temperature: Parameter) -> torch.Tensor:
    """fp32 `softmax(logits / temperature)`; temperature 0 is its limit: the largest logits share all of it."""
    return torch.softmax(scale_logits(logits, temperature), dim=-1)


def _weights(probs: torch.Tensor) -> torch.Tensor:
    """int64 weights proportional to `probs` `[batch_size, vocab]`, a row summing to about 2^60; NaN counts as 0."""
    wide = probs.double()
    scale = 2.0**WEIGHT_BITS / wide.nansum(dim=-1, keepdim=True)
    return (wide * scale).nan_to_num_(nan=0.0).long()


def _kth_largest(x: torch.Tensor, k: Parameter) -> torch.Tensor:
    """`[batch_size, 1]`: the k-th largest of each row; k beyond the vocabulary means the smallest."""
    vocab = x.shape[-1]
    if not isinstance(k, torch.Tensor):
        return torch.topk(x, min(int(k), vocab)).values[:, -1:]
    k = k.long().clamp(1, vocab)
    largest = int(k.max()) if k.is_cpu and k.numel() > 0 else vocab
    return torch.topk(x, largest).values.gather(1, k[:, None] - 1)


def keep_top_k(x: torch.Tensor, top_k: Parameter) -> torch.Tensor:
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


def kept_by(probs: torch.Tensor, filters: Filters) -> torch.Tensor | None:
    """bool like probs: tokens that pass all filters; None if there are none."""
    keep = None
    if filters.min_p is not None:
        keep = keep_min_p(probs, filters.min_p)
    if filters.top_k is not None:
        keep = keep_top_k(probs, filters.top_k)
    if filters.top_p is not None:
        base = probs if keep is None or filters.joint else torch.where(keep, probs, 0.0)
        nucleus = keep_top_p(base, filters.top_p)
        keep = nucleus if keep is None else keep & nucleus
    return keep


def _cleaned(x: torch.Tensor, logits: bool) -> torch.Tensor:
    """Rows without NaN: such a token counts as impossible."""
    return x.masked_fill(x.isnan(), float("-inf") if logits else 0.0)


def mask_logits(logits: torch.Tensor, top_k: Parameter) -> torch.Tensor:
    """logits that are among the top_k largest, -inf elsewhere; NaN counts as -inf."""
    logits = _cleaned(logits, True)
    return logits.masked_fill(~keep_top_k(logits, top_k), float("-inf"))


def renormalise(probs: torch.Tensor, filters: Filters) -> torch.Tensor:
    """probs that pass the filters, 0 elsewhere, divided by their sum, in probs' dtype; a row of zeros stays one.

    NaN counts as 0.
    """
    probs = _cleaned(probs, False)
    keep = kept_by(probs, filters)
    assert keep is not None
    kept = torch.where(keep, probs.float(), 0.0)
    total = kept.sum(dim=-1, keepdim=True)
    return torch.where(total == 0, kept, kept / total).to(probs.dtype)


def sample(x: torch.Tensor, logits: bool, filters: Filters, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each sample among those that pass the filters; see `flashinfer.ops.sampling.sample`."""
    x = _cleaned(x, logits)
    probs = softmax(x, 1.0) if logits else x
    keep = kept_by(probs, filters)
    if draws.indices is not None:
        probs, keep = probs[draws.indices], None if keep is None else keep[draws.indices]
    tokens, valid = inverse_transform(probs, keep, uniform(draws.num_samples, draws.seed, draws.offset, x.device))
    return tokens.to(torch.int32 if draws.indices is None else draws.indices.dtype), valid


def inverse_transform(
    probs: torch.Tensor, keep: torch.Tensor | None, draw: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
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


def _key(value: Seed, device: torch.device | str) -> torch.Tensor:
    """int64 `[1]` or `[num_samples]` with the bits of a seed or offset."""
    if isinstance(value, torch.Tensor):
        return value
    bits = (value.low & WORD | value.high << 32 if isinstance(value, Halves) else value) & (2**64 - 1)
    return torch.full((1,), bits - 2**64 if bits >> 63 else bits, dtype=torch.int64, device=device)


def uniform(
    num_samples: int, seed: Seed, offset: Seed, device: torch.device | str = "cpu", number: int = 0
) -> torch.Tensor:
    """fp64 `[num_samples]` in [0, 1): Philox4x32-10 (Salmon et al., SC 2011) at counter (offset, sample, number).

    seed, offset: ints, or int64 `[1]` or `[num_samples]`, read as unsigned.
    """
    seed, offset = _key(seed, device), _key(offset, device)
    sample = torch.arange(num_samples, device=device)
    counter = [offset & WORD, (offset >> 32) & WORD, sample, torch.full_like(sample, number)]
    key_low, key_high = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        high_0, low_0 = _multiply(0xD2511F53, counter[0])
        high_1, low_1 = _multiply(0xCD9E8D57, counter[2])
        counter = [high_1 ^ counter[1] ^ key_low, low_1, high_0 ^ counter[3] ^ key_high, low_0]
        key_low, key_high = (key_low + 0x9E3779B9) & WORD, (key_high + 0xBB67AE85) & WORD
    return ((counter[0] << 21) | (counter[1] >> 11)).double() * 2.0**-53


def select(x: torch.Tensor, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices) `[rows, k]` of the k largest numbers of each row's window; see `Selection`.

    Indices count from the window's start. A window of at most k numbers gives them in its own order, -1 and 0 after
    them. NaN counts as -inf.
    """
    k = selection.k
    if k > x.shape[1]:
        values, indices = select(x, selection._replace(k=x.shape[1]))
        missing = (0, k - x.shape[1])
        return torch.nn.functional.pad(values, missing), torch.nn.functional.pad(indices, missing, value=-1)
    column = torch.arange(x.shape[1], device=x.device).expand(x.shape)
    index = column if selection.starts is None else column + selection.starts[:, None]
    outside = torch.zeros_like(x, dtype=torch.bool)
    if selection.lengths is not None:
        outside = column >= selection.lengths[:, None]
    numbers = x.gather(1, index.clamp(max=x.shape[1] - 1)).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    if selection.tie_break == 2:
        numbers, column, outside = numbers.flip(1), column.flip(1), outside.flip(1)
    order = numbers.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, outside.gather(1, order).sort(dim=1, stable=True).indices)[:, :k]
    if not selection.sorted:
        few = (~outside).sum(1, keepdim=True) <= k
        order = torch.where(few, torch.arange(k, device=x.device), order)
    beyond = outside.gather(1, order)
    values = numbers.gather(1, order).masked_fill(beyond, 0)
    return values, column.gather(1, order).masked_fill(beyond, -1).to(selection.index_dtype)


def _unless_empty(left: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What is left of probabilities, or where rounding left nothing the `rows` themselves."""
    return torch.where((left > 0).any(dim=-1, keepdim=True), left, rows)


def verify_chain(
    draft_probs: torch.Tensor, draft_tokens: torch.Tensor, target_probs: torch.Tensor, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Speculative sampling (Leviathan et al., ICML 2023); see `flashinfer.ops.sampling.verify_chain`."""
    batch_size, num_drafts, vocab_size = draft_probs.shape
    device = draft_probs.device
    chosen = draft_tokens.long()[..., None]
    p = draft_probs.gather(2, chosen).squeeze(2).double()
    q = target_probs[:, :num_drafts].gather(2, chosen).squeeze(2).double()
    coins = [uniform(batch_size, draws.seed, draws.offset, device, 256 + i) for i in range(num_drafts)]
    yes = torch.stack(coins, 1) * p < q if num_drafts else p.bool()
    emitted = yes.long().cumprod(1).sum(1)
    row = torch.arange(batch_size, device=device)
    residual = target_probs[row, emitted].float()
    padded = torch.cat([draft_probs, draft_probs.new_zeros(batch_size, 1, vocab_size)], 1)
    left = (residual - padded[row, emitted].float()).clamp(min=0)
    last, _ = inverse_transform(
        _unless_empty(left, residual), None, uniform(batch_size, draws.seed, draws.offset, device)
    )
    position = torch.arange(num_drafts + 1, device=device)
    tokens = torch.cat([draft_tokens.long(), draft_tokens.new_full((batch_size, 1), -1).long()], 1)
    tokens = torch.where(position < emitted[:, None], tokens, -1)
    tokens[row, emitted] = last
    return tokens.to(draft_tokens.dtype), yes.sum(1).int(), emitted.int()


def verify_tree(
    tree: Tree, target_probs: torch.Tensor, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A walk from the root by the target's own probabilities; see `flashinfer.ops.sampling.verify_tree`."""
    batch_size, num_nodes = tree.tokens.shape
    device = target_probs.device
    row = torch.arange(batch_size, device=device)
    left = target_probs.float().clone()
    node = torch.zeros(batch_size, dtype=torch.long, device=device)
    depth, covered = torch.zeros_like(node), torch.zeros(batch_size, dtype=torch.double, device=device)
    coins = [uniform(batch_size, draws.seed, draws.offset, device, 256 + i) for i in range(num_nodes + 1)]
    coin = torch.stack(coins, 1)
    child = tree.first_child.long()[:, 0]
    tokens = torch.full((batch_size, num_nodes + 1), -1, dtype=torch.long, device=device)
    path = tokens.clone()
    for _ in range(num_nodes):
        there = child > node
        at = child.clamp(min=0)
        token = tree.tokens.long()[row, at]
        covered = covered + torch.where(there, target_probs[row, node, token].double(), 0.0)
        taken = there & (coin[row, depth] < covered)
        refused = there & ~taken
        left[row, node, token] = torch.where(refused, 0.0, left[row, node, token])
        tokens[row, depth] = torch.where(taken, token, tokens[row, depth])
        path[row, depth] = torch.where(taken, at, path[row, depth])
        node, depth = torch.where(taken, at, node), depth + taken
        covered = torch.where(taken, 0.0, covered)
        following = torch.where(taken, tree.first_child.long()[row, at], tree.next_sibling.long()[row, at])
        child = torch.where(there, following, child)
    last, _ = inverse_transform(
        _unless_empty(left[row, node], target_probs[row, node].float()),
        None,
        uniform(batch_size, draws.seed, draws.offset, device),
    )
    tokens[row, depth] = last
    return tokens[:, :num_nodes].to(tree.tokens.dtype), path[:, : num_nodes - 1].int(), depth.int()
