"""FlashInfer's keyword arguments as one frozen record, and the composition of variants they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashinfer.core import check
from flashinfer.ops.attention.spec import AttentionSpec, Scales
from flashinfer.ops.attention.variant import Variant

POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")


@dataclass(frozen=True)
class Options:
    """Normalised options; build it with `Options.of`, which fills FlashInfer's defaults.

    window_left: tokens to the left, -1 = off. logits_soft_cap: 0 = off. sm_scale, rope_scale, rope_theta: floats.
    """

    causal: bool
    window_left: int
    logits_soft_cap: float
    pos_encoding_mode: str
    sm_scale: float
    rope_scale: float
    rope_theta: float

    @staticmethod
    def of(
        head_dim_qk: int,
        causal: bool,
        window_left: int | None,
        logits_soft_cap: float | None,
        pos_encoding_mode: str,
        sm_scale: float | None,
        rope: tuple[float | None, float | None],
    ) -> Options:
        """rope: (rope_scale, rope_theta). None means FlashInfer's default. Raises KeyError for an unknown mode."""
        check.choice("pos_encoding_mode", pos_encoding_mode, POS_ENCODING_MODES, KeyError)
        window_left = -1 if window_left is None else window_left
        if window_left < -1:
            raise ValueError(
                check.problem(
                    "window_left", window_left, "-1 (off) or the tokens to the left", "Pass -1 for no window."
                )
            )
        return Options(
            bool(causal),
            int(window_left),
            max(0.0, float(logits_soft_cap or 0.0)),
            pos_encoding_mode,
            1.0 / math.sqrt(head_dim_qk) if sm_scale is None else float(sm_scale),
            1.0 if rope[0] is None else float(rope[0]),
            1e4 if rope[1] is None else float(rope[1]),
        )

    def variant(self, spec: AttentionSpec, device: torch.device, mask: Variant | None) -> Variant:
        """The composition: rotation, soft cap, then bias, then masks; a custom mask takes causal's place."""
        from flashinfer.ops.attention import variants  # imports Triton where it is installed

        result = Variant()
        if self.pos_encoding_mode == "ROPE_LLAMA":
            result &= variants.rope(self.rope_scale, self.rope_theta, spec.head_dim_qk)
        if self.logits_soft_cap > 0:
            nvidia = device.type == "cuda" and torch.version.hip is None
            result &= variants.soft_cap(self.logits_soft_cap, fast=nvidia and spec.q_dtype.itemsize < 4)
        if self.pos_encoding_mode == "ALIBI":
            result &= variants.alibi(_slopes(spec.num_qo_heads, device))
        if mask is not None:
            result &= mask
        elif self.causal:
            result &= variants.causal()
        if self.window_left >= 0:
            # No KV is longer; a larger number would overflow where a token's index is added to it.
            result &= variants.sliding_window(min(self.window_left, 1 << 30))
        return result


_SLOPES: dict[tuple[int, torch.device], torch.Tensor] = {}


def _slopes(num_qo_heads: int, device: torch.device) -> torch.Tensor:
    # Kept for the life of the process: a CUDA graph may hold the address, and an upload from pageable memory waits.
    from flashinfer.ops.attention.variants import get_alibi_slopes

    key = (num_qo_heads, device)
    if key not in _SLOPES:
        _SLOPES[key] = get_alibi_slopes(num_qo_heads).to(device)
    return _SLOPES[key]


Scale = float | torch.Tensor | None


def scales_of(
    sm_scale: float,
    spec: AttentionSpec,
    queries: torch.Tensor,
    q: Scale,
    k: Scale,
    v: Scale,
    o: Scale = None,
    sinks: torch.Tensor | None = None,
) -> Scales:
    """One run's factors: q and k scales multiply the logits, v and o scales the output.

    Each scale is a float, a one-element tensor, or fp32 `[num_qo_heads]` (q, o) or `[num_kv_heads]` (k, v), on the
    device of `queries`.
    """
    like = ("q", queries)
    logits_float, logits = _product(spec, like, ("q_scale", q), ("k_scale", k))
    output_float, output = _product(spec, like, ("v_scale", v), ("o_scale", o))
    if sinks is not None:
        check.tensor("sinks", sinks, dtypes=(torch.float32,), like=like)
        if sinks.numel() != spec.num_qo_heads:
            raise ValueError(
                check.problem("sinks", f"{sinks.numel()} values", f"num_qo_heads = {spec.num_qo_heads}", "One a head.")
            )
        sinks = sinks.reshape(-1).contiguous()
    return Scales(sm_scale * logits_float, output_float, logits, output, sinks)


def _product(
    spec: AttentionSpec, like: tuple[str, torch.Tensor], *scales: tuple[str, Scale]
) -> tuple[float, torch.Tensor | None]:
    factor, heads = 1.0, None
    for name, scale in scales:
        if isinstance(scale, torch.Tensor):
            check.tensor(name, scale, like=like)
            per_head = scale.reshape(-1).to(torch.float32).contiguous()
            if per_head.numel() not in (1, spec.num_kv_heads, spec.num_qo_heads):
                want = f"1, num_kv_heads = {spec.num_kv_heads} or num_qo_heads = {spec.num_qo_heads} values"
                raise ValueError(check.problem(name, f"{per_head.numel()} values", want, "Pass one a head."))
            if 1 < per_head.numel() < spec.num_qo_heads:
                per_head = per_head.repeat_interleave(spec.num_qo_heads // per_head.numel())
            heads = per_head if heads is None else heads * per_head
        elif scale is not None:
            factor *= float(scale)
    return factor, heads
