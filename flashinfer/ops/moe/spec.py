"""The records of a mixture of experts: what kind it is (host values), and the tensors it reads and writes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.ops.gemm import Activation, Weights

# Columns of a row that share a scale where activations are quantised (kind "fp8_block").
BLOCK = 128


class Routes(NamedTuple):
    """Where tokens go.

    ids: int32 or int64 `[tokens, top_k]`, experts by their numbers in the whole model; weights: fp32, the same shape;
    both contiguous. first_expert: number of the first expert held here; pairs of a token and an expert held elsewhere,
    or of a negative number, add nothing.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    first_expert: int = 0


class Experts(NamedTuple):
    """The experts held here: `fc2 @ activation(fc1 @ x + bias1) + bias2`.

    fc1: `[E, 2 * I, H]` with a gated activation (first half up, second half gate), else `[E, I, H]`. fc2: `[E, H, I]`.
    Both of one kind: "plain", "fp8_tensor" (global_scale: what sums are multiplied by), "fp8_block" or "mxfp4". bias1,
    bias2: `[E, 2 * I or I]` and `[E, H]`. hidden_scale: fp32 of one element or `[E]`, "fp8_tensor" only: multiplies the
    activation before it is cast to e4m3.
    """

    fc1: Weights
    fc2: Weights
    activation: Activation
    bias1: torch.Tensor | None = None
    bias2: torch.Tensor | None = None
    hidden_scale: torch.Tensor | None = None


class MoE(NamedTuple):
    """All tensors of a call, on one device: `out[t]` is the weighted sum of what its experts make of `x[t]`.

    out, x: `[tokens, H]`, innermost stride 1. x: fp16, bf16 or fp32; e4m3 for kind "fp8_tensor".
    """

    out: torch.Tensor
    x: torch.Tensor
    routes: Routes
    experts: Experts

    @property
    def spec(self) -> MoESpec:
        fc1, fc2, activation, bias1, bias2, hidden_scale = self.experts
        hidden_size = self.out.shape[1]
        return MoESpec(
            kind=fc1.kind,
            dtype=self.x.dtype,
            weight_dtype=fc1.values.dtype,
            out_dtype=self.out.dtype,
            id_dtype=self.routes.ids.dtype,
            num_experts=fc1.values.shape[0],
            top_k=self.routes.ids.shape[1],
            hidden_size=hidden_size,
            intermediate_size=fc2.values.shape[2] * (2 if fc2.kind == "mxfp4" else 1),
            activation=activation.kind,
            gated=activation.gated,
            present=tuple(x is not None for x in (bias1, bias2, hidden_scale, *activation[1:])),
            scale_rows=(_scale_rows(fc1), _scale_rows(fc2)),
        )


def _scale_rows(weights: Weights) -> int:
    return 1 if weights.scale is None or weights.scale.shape[1] == weights.values.shape[1] else BLOCK


class MoESpec(NamedTuple):
    """One kind of mixture: the cache key.

    present: which of the optional tensors there are. scale_rows: rows of fc1, and of fc2, that share a scale.
    """

    kind: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    out_dtype: torch.dtype
    id_dtype: torch.dtype
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: str
    gated: bool
    present: tuple[bool, ...]
    scale_rows: tuple[int, int]

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Of what lies between the two products; "fp8_block" quantises it where it is read."""
        return torch.float8_e4m3fn if self.kind == "fp8_tensor" else self.dtype

    @property
    def fc1_rows(self) -> int:
        return self.intermediate_size * (2 if self.gated else 1)
