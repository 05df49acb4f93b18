"""A Llama of random weights over bytes: real shapes where the real model is not at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from model import LlamaConfig
from source import Source

BOS, EOS = 256, 257


def random_llama(config: LlamaConfig, seed: int) -> Source:
    """A Llama of random weights over bytes; its text means nothing, its shapes are those of a real model."""
    config = replace(config, vocab_size=EOS + 1)
    return Source(
        name="random weights",
        config=config,
        weights=random_weights(config, seed),
        eos_ids=frozenset([EOS]),
        encode=lambda text: [BOS, *text.encode()],
        decode=lambda ids: bytes(i for i in ids if i < BOS).decode("utf-8", "replace"),
        reference=lambda: _transformers_llama(config, random_weights(config, seed)),
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
            yield mlp + "gate_proj", c.intermediate_size, c.hidden_size
            yield mlp + "up_proj", c.intermediate_size, c.hidden_size
            yield mlp + "down_proj", c.hidden_size, c.intermediate_size

    weights = {
        name + ".weight": torch.randn(rows, cols, generator=generator) / cols**0.5 for name, rows, cols in matrices()
    }
    weights["model.embed_tokens.weight"] = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    layer_norms = [
        f"model.layers.{i}.{name}"
        for i in range(config.num_layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    for name in ["model.norm", *layer_norms]:
        weights[name + ".weight"] = 0.5 + torch.rand(config.hidden_size, generator=generator)
    return weights


def _transformers_llama(config: LlamaConfig, weights: dict[str, torch.Tensor]) -> Any:
    import transformers

    hf_config = transformers.LlamaConfig(
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
    )
    model = transformers.LlamaForCausalLM(hf_config)
    model.load_state_dict(weights)
    return model.eval()
