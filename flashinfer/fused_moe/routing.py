"""Routing of tokens to experts, with FlashInfer's names and signatures, and `route`, which has them all."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

from flashinfer.core import check
from flashinfer.ops import routing as ops


class RoutingMethodType(IntEnum):
    """Ways from logits to weights, by FlashInfer's numbers."""

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    TopK = 5
    SigmoidRenorm = 6
    MiniMax2 = 7
    Sigmoid = 8
    TopKSigmoid = 9
    Unspecified = 10


class Method(NamedTuple):
    """score: of a logit (`RoutingSpec`). renormalise: weights add up to 1. biased: whether a bias may be given."""

    score: str
    renormalise: bool = False
    biased: bool = False


_Type = RoutingMethodType
# A softmax over the chosen logits is a softmax over all of them, divided by what the chosen ones have of it; and a
# score that rises with its logit chooses what the logit chooses. So methods that differ in the order of steps are one.
METHODS = {
    _Type.Default: Method("softmax"),
    _Type.Renormalize: Method("softmax", renormalise=True),
    _Type.DeepSeekV3: Method("sigmoid", renormalise=True, biased=True),
    _Type.Llama4: Method("sigmoid"),
    _Type.RenormalizeNaive: Method("softmax", renormalise=True),
    _Type.TopK: Method("identity"),
    _Type.SigmoidRenorm: Method("sigmoid", renormalise=True),
    _Type.MiniMax2: Method("sigmoid", renormalise=True, biased=True),
    _Type.Sigmoid: Method("sigmoid"),
    _Type.TopKSigmoid: Method("sigmoid"),
}


def route(
    logits: torch.Tensor,
    top_k: int,
    method: RoutingMethodType = RoutingMethodType.Renormalize,
    *,
    bias: torch.Tensor | None = None,
    n_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float | None = None,
    routing_replay_out: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` best experts of each token and their weights, best first, equal ones in the order of their numbers.

    logits: `[tokens, num_experts]`, fp32, fp16 or bf16, innermost stride 1. bias: `[num_experts]`, float, added to the
    scores for the choice alone (DeepSeekV3 and MiniMax2). n_group, topk_group: experts in groups of equal size, of
    which those with the largest sums of their two best are kept (DeepSeekV3). routed_scaling_factor: multiplies the
    weights. routing_replay_out: int16 `[at least tokens, top_k]`, gets the ids. out: (weights, ids) to write to.
    Returns fp32 weights and int32 ids, both `[tokens, top_k]`. NaN counts as the least logit; its weights are NaN.
    """
    check.tensor("logits", logits, dtypes=check.FLOAT_DTYPES, shape=(None, None), inner_contiguous=True)
    rule = _method(method, bias is not None)
    groups = _groups(logits.shape[1], top_k, n_group, topk_group)
    if bias is not None:
        shape, like = (logits.shape[1],), ("logits", logits)
        check.tensor("bias", bias, dtypes=check.FLOAT_DTYPES, shape=shape, like=like, inner_contiguous=True)
    size = (logits.shape[0], top_k)
    if out is None:
        weights = torch.empty(size, dtype=torch.float32, device=logits.device)
        out = (weights, torch.empty(size, dtype=torch.int32, device=logits.device))
    _outputs(*out, logits, size)
    _replay(routing_replay_out, logits, top_k)
    scale = 1.0 if routed_scaling_factor is None else float(routed_scaling_factor)
    ops.choose(*out, logits, bias, routing_replay_out, rule.score, scale, [int(rule.renormalise), *groups])
    return out


def _method(method: RoutingMethodType, biased: bool) -> Method:
    rule = METHODS.get(method)
    if rule is None:
        names = ", ".join(known.name for known in METHODS)
        raise ValueError(check.problem("method", repr(method), f"one of {names}", "Name a way to route."))
    if biased and not rule.biased:
        fix = "Leave the bias out, or use DeepSeekV3 or MiniMax2."
        raise ValueError(check.problem("bias", "a tensor", f"None with method {RoutingMethodType(method).name}", fix))
    return rule


def _groups(num_experts: int, top_k: int, n_group: int | None, topk_group: int | None) -> tuple[int, int]:
    """(num_groups, topk_groups), (1, 1) without groups."""
    check.positive("top_k", top_k)
    num_groups, kept = n_group or 1, topk_group or 1
    check.positive("n_group", num_groups)
    check.multiple("num_experts", num_experts, "n_group", num_groups)
    if not 1 <= kept <= num_groups:
        raise ValueError(check.problem("topk_group", kept, f"1 to n_group = {num_groups}", "Keep some groups."))
    if top_k > kept * (num_experts // num_groups):
        room = f"at most {kept * (num_experts // num_groups)}, the experts of {kept} of {num_groups} groups"
        raise ValueError(check.problem("top_k", top_k, room, "Choose fewer experts, or keep more groups."))
    return (1, 1) if kept == num_groups else (num_groups, kept)


def _outputs(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, shape: tuple[int, int]) -> None:
    like = ("logits", logits)
    check.tensor("weights", weights, dtypes=check.FLOAT_DTYPES, shape=shape, like=like, inner_contiguous=True)
    check.tensor("ids", ids, dtypes=check.POSITION_DTYPES, shape=shape, like=like, inner_contiguous=True)


def _replay(replay: torch.Tensor | None, logits: torch.Tensor, top_k: int) -> None:
    if replay is None:
        return
    name = "routing_replay_out"
    like = ("logits", logits)
    check.tensor(name, replay, dtypes=(torch.int16,), shape=(None, top_k), like=like, inner_contiguous=True)
    if replay.shape[0] < logits.shape[0]:
        expected = f"at least {logits.shape[0]} rows, one a token"
        raise ValueError(check.problem(name, f"{replay.shape[0]} rows", expected, "Allocate it for the most tokens."))


def fused_topk_deepseek(
    scores: torch.Tensor,
    bias: torch.Tensor,
    n_group: int,
    topk_group: int,
    topk: int,
    routed_scaling_factor: float,
    topk_values: torch.Tensor,
    topk_indices: torch.Tensor,
    launch_with_pdl: bool = True,
    routing_replay_out: torch.Tensor | None = None,
    *,
    backend: str = "default",
) -> None:
    """`route` by DeepSeekV3 into tensors of the caller: sigmoid + bias chooses, sigmoids of the chosen weigh.

    scores: router logits `[tokens, num_experts]`. topk_values: float, topk_indices: int32 or int64, `[tokens, topk]`.
    The other arguments as in `route`; launch_with_pdl and backend are accepted and mean nothing here.
    """
    route(
        scores,
        topk,
        RoutingMethodType.DeepSeekV3,
        bias=bias,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
        routing_replay_out=routing_replay_out,
        out=(topk_values, topk_indices),
    )


def hash_topk(
    router_logits: torch.Tensor,
    input_ids: torch.Tensor,
    tid2eid: torch.Tensor,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 1.0,
    launch_with_pdl: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts by table: token t goes to the experts `tid2eid[t]`, weighted by `sqrt(softplus(logit))`, normalised.

    router_logits: float `[tokens, num_experts]`. input_ids: int32 or int64 `[tokens]`. tid2eid: int32
    `[vocab_size, topk]`, values not checked on a GPU. num_fused_shared_experts: 0 or 1; then expert `num_experts` is
    appended with weight 1 / routed_scaling_factor. Returns fp32 weights and int32 ids, `[tokens, topk + shared]`.
    """
    like = ("router_logits", router_logits)
    check.tensor("router_logits", router_logits, dtypes=check.FLOAT_DTYPES, shape=(None, None), inner_contiguous=True)
    check.tensor(
        "input_ids",
        input_ids,
        dtypes=check.POSITION_DTYPES,
        shape=router_logits.shape[:1],
        like=like,
        inner_contiguous=True,
    )
    check.tensor("tid2eid", tid2eid, dtypes=check.INDEX_DTYPES, shape=(None, None), like=like, inner_contiguous=True)
    check.choice("num_fused_shared_experts", num_fused_shared_experts, (0, 1))
    if not torch.compiler.is_compiling():
        check.index_range("tid2eid", tid2eid, 0, router_logits.shape[1])
        check.index_range("input_ids", input_ids, 0, tid2eid.shape[0])
    shape = (router_logits.shape[0], tid2eid.shape[1] + num_fused_shared_experts)
    weights = torch.empty(shape, dtype=torch.float32, device=router_logits.device)
    ids = torch.empty(shape, dtype=torch.int32, device=router_logits.device)
    ops.look_up(weights, ids, router_logits, input_ids, tid2eid, float(routed_scaling_factor))
    return weights, ids
