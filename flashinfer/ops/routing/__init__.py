"""From the logits of a router to experts and their weights, as a torch op that writes to tensors it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashinfer.core import library
from flashinfer.core.select import Choice, Impl
from flashinfer.ops.routing.spec import LEAST_SUM, SCORES, Routing, RoutingSpec
from flashinfer.ops.routing.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.routing.triton", triton_supports),
    Impl("torch", "flashinfer.ops.routing.reference", torch_supports),
)

CHOICE = Choice(IMPLS)


def route(spec: RoutingSpec, tensors: Routing, backend: str = "auto") -> None:
    """Choose experts. "auto" is Triton on a GPU and torch on CPU tensors."""
    if tensors.logits.shape[0] > 0:
        CHOICE.call(spec, tensors.logits.device, backend)(tensors)


@library.register(
    "route(Tensor(a!) weights, Tensor(b!) ids, Tensor logits, Tensor? bias, Tensor(c!)? replay, str score, float scale,"
    " int[] rule) -> ()"
)
def choose(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    replay: torch.Tensor | None,
    score: str,
    scale: float,
    rule: Sequence[int],
) -> None:
    """The best experts of each row of `logits`, as many as `ids` has columns.

    rule: (renormalise, num_groups, topk_groups); these and the other values as in `RoutingSpec`.
    """
    renormalise, num_groups, topk_groups = rule
    spec = RoutingSpec(
        logits.shape[1],
        ids.shape[1],
        score,
        bool(renormalise),
        scale,
        num_groups,
        topk_groups,
        biased=bias is not None,
    )
    route(spec, Routing(weights, ids, logits, bias, replay))


@library.register(
    "route_by_table(Tensor(a!) weights, Tensor(b!) ids, Tensor logits, Tensor tokens, Tensor table, float shared_scale)"
    " -> ()"
)
def look_up(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    table: torch.Tensor,
    shared_scale: float,
) -> None:
    """The experts of each row's token, weighted by `sqrt(softplus(logit))`, normalised; then shared experts."""
    top_k = table.shape[1]
    spec = RoutingSpec(
        logits.shape[1],
        top_k,
        "sqrt_softplus",
        renormalise=True,
        looked_up=True,
        num_shared=ids.shape[1] - top_k,
        shared_scale=shared_scale,
    )
    route(spec, Routing(weights, ids, logits, tokens=tokens, table=table))


__all__ = ["CHOICE", "IMPLS", "LEAST_SUM", "SCORES", "Routing", "RoutingSpec", "choose", "look_up", "route"]
