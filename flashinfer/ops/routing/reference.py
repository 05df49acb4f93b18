"""Routing in plain torch: scores in fp32, a stable sort, weights of the chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from flashinfer.core.arch import Arch
from flashinfer.ops.routing.spec import LEAST_SUM, Routing, RoutingSpec

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda x: functional.softplus(x).sqrt(),
    "identity": lambda x: x,
}


def bind(spec: RoutingSpec, arch: Arch) -> Callable[[Routing], None]:
    """The call `(tensors)` for one kind."""
    return partial(run, spec)


@torch.no_grad()
def run(spec: RoutingSpec, tensors: Routing) -> None:
    """Write weights and ids: of the chosen experts in falling order, equal ones in the order of their numbers.

    Groups: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2. NaN counts as the least.
    """
    logits = tensors.logits.float()
    scores = SCORES[spec.score](logits)
    if tensors.tokens is not None and tensors.table is not None:
        ids = tensors.table[tensors.tokens.long()].long()
    else:
        ids = _chosen(spec, logits, scores, tensors.bias)
    weights = scores.gather(-1, ids)
    if spec.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST_SUM)
    weights = weights * spec.scale
    if tensors.replay is not None:
        tensors.replay[: len(ids)].copy_(ids)
    tensors.ids[:, : spec.top_k].copy_(ids)
    tensors.weights[:, : spec.top_k].copy_(weights)
    if spec.num_shared:
        tensors.ids[:, spec.top_k :].copy_(torch.arange(spec.num_shared) + spec.num_experts)
        tensors.weights[:, spec.top_k :].fill_(1 / spec.shared_scale)


def _chosen(spec: RoutingSpec, logits: torch.Tensor, scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """int64 `[tokens, top_k]`."""
    choice = logits if spec.by_logits else scores
    if bias is not None:
        choice = choice + bias.float()
    choice = choice.masked_fill(choice.isnan(), -torch.inf)
    # Experts of dropped groups come after all others, even those of -inf: so they are sorted by two keys.
    order = choice.argsort(dim=-1, descending=True, stable=True)
    if spec.num_groups > 1:
        kept = _kept_groups(spec, choice).repeat_interleave(spec.group_size, dim=-1)
        order = order.gather(-1, kept.gather(-1, order).int().argsort(dim=-1, descending=True, stable=True))
    return order[:, : spec.top_k]


def _kept_groups(spec: RoutingSpec, choice: torch.Tensor) -> torch.Tensor:
    """bool `[tokens, num_groups]`: those with the largest sums of their two best experts."""
    groups = choice.unflatten(-1, (spec.num_groups, -1))
    value = groups.topk(min(2, spec.group_size), dim=-1).values.sum(-1)
    best = value.argsort(dim=-1, descending=True, stable=True)[:, : spec.topk_groups]
    return torch.zeros_like(value, dtype=torch.bool).scatter_(-1, best, True)
