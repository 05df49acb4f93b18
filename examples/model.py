"""A Llama or Mixtral forward pass: dense matrix multiplications by torch, everything else by FlashInfer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from attention import PagedAttention
from parallel import Ranks
from torch.nn.functional import embedding, linear

import flashinfer
from flashinfer.fused_moe import RoutingMethodType, cutlass_fused_moe, route


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes of a Llama model; the defaults are the small model of `--random-weights`.

    num_experts: 0 for Llama, else Mixtral's mixture of experts in each layer, `num_experts_per_tok` to a token.
    """

    vocab_size: int = 258
    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 4
    num_qo_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    num_experts: int = 0
    num_experts_per_tok: int = 2

    def __post_init__(self) -> None:
        if self.num_qo_heads % self.num_kv_heads:
            raise ValueError(f"num_qo_heads {self.num_qo_heads} is not a multiple of num_kv_heads {self.num_kv_heads}.")


class Layer(NamedTuple):
    """One layer's weights, `[out_features, in_features]`; q, k, v are one matrix, so are gate and up.

    router: `[num_experts, hidden_size]`; then gate_up and down have a leading dimension of experts, up before gate.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    attn_out: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    router: torch.Tensor | None = None


class Llama:
    """Llama over packed tokens.

    weights: tensors under the names of the transformers library; without `lm_head.weight` the embedding is the head.
    ranks: those that run it together; config and weights are this one's share (`Ranks.shard`) then.
    """

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], ranks: Ranks | None = None) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.embedding = weights["model.embed_tokens.weight"]
        self.lm_head = weights.get("lm_head.weight", self.embedding)
        self.final_norm = weights["model.norm.weight"]
        self.layers = [self._layer(weights, f"model.layers.{i}.") for i in range(config.num_layers)]

    @staticmethod
    def _layer(weights: dict[str, torch.Tensor], prefix: str) -> Layer:
        def stacked(block: str, *names: str) -> torch.Tensor:
            return torch.cat([weights[f"{prefix}{block}.{name}_proj.weight"] for name in names])

        if f"{prefix}mlp.gate.weight" in weights:
            gate, up = weights[prefix + "mlp.experts.gate_up_proj"].chunk(2, dim=1)
            mlp = (torch.cat([up, gate], dim=1), weights[prefix + "mlp.experts.down_proj"])
        else:
            mlp = (stacked("mlp", "gate", "up"), weights[prefix + "mlp.down_proj.weight"])
        return Layer(
            input_norm=weights[prefix + "input_layernorm.weight"],
            qkv=stacked("self_attn", "q", "k", "v"),
            attn_out=weights[prefix + "self_attn.o_proj.weight"],
            post_norm=weights[prefix + "post_attention_layernorm.weight"],
            gate_up=mlp[0],
            down=mlp[1],
            router=weights.get(prefix + "mlp.gate.weight"),
        )

    def forward(self, token_ids: torch.Tensor, attention: PagedAttention, rows: torch.Tensor) -> torch.Tensor:
        """Logits `[len(rows), vocab_size]` (fp32) of the packed tokens at `rows`.

        token_ids: `[nnz]`, the new tokens of all requests one after another. attention: planned for this step.
        """
        eps = self.config.rms_norm_eps
        # `residual` is the running sum; `x` is what goes into, and comes out of, the next block.
        residual = embedding(token_ids, self.embedding)
        x = flashinfer.rmsnorm(residual, self.layers[0].input_norm, eps)
        next_norms = [layer.input_norm for layer in self.layers[1:]] + [self.final_norm]
        for i, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            x = self._attention(i, layer, x, attention)
            self.ranks.add_norm(x, residual, layer.post_norm, eps)  # residual += x; x = norm(residual)
            x = self._mlp(layer, x)
            self.ranks.add_norm(x, residual, next_norm, eps)
        return linear(x[rows], self.lm_head).float()

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        if layer.router is None:
            return linear(flashinfer.silu_and_mul(linear(x, layer.gate_up)), layer.down)
        weights, ids = route(linear(x, layer.router), self.config.num_experts_per_tok, RoutingMethodType.Renormalize)
        return cutlass_fused_moe(x, ids, weights, layer.gate_up, layer.down, x.dtype, None)

    def _attention(self, index: int, layer: Layer, x: torch.Tensor, attention: PagedAttention) -> torch.Tensor:
        c = self.config
        heads = linear(x, layer.qkv).view(len(x), -1, c.head_dim)
        q, k, v = heads.split([c.num_qo_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        # Llama pairs dimension i with i + head_dim / 2 (interleave=False). q and k are views: no copy is made.
        flashinfer.apply_rope_pos_ids_inplace(q, k, attention.positions, rope_theta=c.rope_theta)
        return linear(attention.run(index, q, k, v).flatten(1), layer.attn_out)
