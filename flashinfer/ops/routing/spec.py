"""The records of routing: how experts are chosen (host values), and the tensors read and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

SCORES = ("softmax", "sigmoid", "sqrt_softplus", "identity")
# Added to a sum of scores before dividing by it, as in DeepSeek's model code: scores may all be 0.
LEAST_SUM = 1e-20


@dataclass(frozen=True)
class RoutingSpec:
    """One way from logits to experts.

    score: of a logit, one of SCORES; softmax is over all experts. renormalise: whether the weights of a token's experts
    are divided by their sum. scale: multiplies the weights. num_groups, topk_groups: experts in groups of equal size,
    of which those with the largest sums of their two best are kept; (1, 1) without groups. biased: whether a bias is
    added to the scores for the choice alone. looked_up: the experts come from a table of tokens. num_shared: experts
    that every token goes to, appended with weight 1 / shared_scale.
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    biased: bool = False
    looked_up: bool = False
    num_shared: int = 0
    shared_scale: float = 1.0

    @property
    def group_size(self) -> int:
        return self.num_experts // self.num_groups

    @property
    def by_logits(self) -> bool:
        """Whether the logits themselves are compared: every score rises with its logit, and far apart they are equal.

        (Sigmoids of logits above 17 are all 1 in fp32.)
        """
        return not self.biased and self.num_groups == 1


class Routing(NamedTuple):
    """The tensors of a call, on one device.

    weights: float `[tokens, top_k + num_shared]`. ids: int32 or int64, of the same shape. logits: float `[tokens,
    num_experts]`. These three have innermost stride 1. bias: float `[num_experts]`. replay: int16 `[at least tokens,
    top_k]`, gets the ids again. tokens: int32 or int64 `[tokens]`, rows of table: int32 `[vocab_size, top_k]`.
    """

    weights: torch.Tensor
    ids: torch.Tensor
    logits: torch.Tensor
    bias: torch.Tensor | None = None
    replay: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    table: torch.Tensor | None = None
