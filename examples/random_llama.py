"""A Llama or Mixtral of random weights over bytes: real shapes where the real model is not at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from model import LlamaConfig
from source import Source

BOS, EOS = 256, 257


def random_llama(config: LlamaConfig, seed: int) -> Source:
    """A model of random weights over bytes; its text means nothing, its shapes are those of a real model."""
    config = replace(config, vocab_size=EOS + 1)
    return Source(
        name="random weights",
        config=config,
        weights=random_weights(config, seed),
        eos_ids=frozenset([EOS]),
        encode=lambda text: [BOS, *text.encode()],
        decode=lambda ids: bytes(i for i in ids if i < BOS).decode("utf-8", "replace"),
        reference=lambda: _transformers_model(config, random_weights(config, seed)),
    )


def random_weights(config: LlamaConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit size.

    Then logits are spread like a unit normal, and the two best are almost never within fp32 rounding of each other.
    The head is not tied to the embedding: tied, a random model only repeats its last token.
    """
    generator = torch.Generator().manual_seed(seed)

    def matrices() -> Iterator[tuple[str, int, int]]:
        c = config
        q_size, kv_size = c.num_qo_heads * c.head_dim, c.num_kv_heads * c.head_dim
        yield "lm_head", c.vocab_size, c.hidden_size
        for i in range(c.num_layers):
            attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
            yield attn + "q_proj", q_size, c.hidden_size
            yield attn + "k_proj", kv_size, c.hidden_size
            yield attn + "v_proj", kv_size, c.hidden_size
            yield attn + "o_proj", c.hidden_size, q_size
            if c.num_experts:
                yield mlp + "gate", c.num_experts, c.hidden_size
            else:
                yield mlp + "gate_proj", c.intermediate_size, c.hidden_size
                yield mlp + "up_proj", c.intermediate_size, c.hidden_size
                yield mlp + "down_proj", c.hidden_size, c.intermediate_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    weights = {name + ".weight": normal(rows, cols) for name, rows, cols in matrices()}
    for i in range(config.num_layers if config.num_experts else 0):
        experts, size = f"model.layers.{i}.mlp.experts.", config.intermediate_size
        weights[experts + "gate_up_proj"] = normal(config.num_experts, 2 * size, config.hidden_size)
        weights[experts + "down_proj"] = normal(config.num_experts, config.hidden_size, size)
    weights["model.embed_tokens.weight"] = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    layer_norms = [
        f"model.layers.{i}.{name}"
        for i in range(config.num_layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    for name in ["model.norm", *layer_norms]:
        weights[name + ".weight"] = 0.5 + torch.rand(config.hidden_size, generator=generator)
    return weights


def _transformers_model(config: LlamaConfig, weights: dict[str, torch.Tensor]) -> Any:
    import transformers

    name = "Mixtral" if config.num_experts else "Llama"
    experts = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    hf_config = getattr(transformers, f"{name}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_qo_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        bos_token_id=BOS,
        eos_token_id=EOS,
        **(experts if config.num_experts else {}),
    )
    model = getattr(transformers, f"{name}ForCausalLM")(hf_config)
    model.load_state_dict(weights)
    return model.eval()
