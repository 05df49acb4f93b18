"""Comparing the engine's tokens with transformers' own greedy generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from display import one_line
from engine import Request
from source import Source


@torch.inference_mode()
def greedy_tokens(reference: Any, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """transformers' greedy continuation of `num_tokens` tokens, not stopping at EOS.

    Also returns, per token, by how much its logit beat the second best.
    """
    reference.generation_config.eos_token_id = None
    ids = torch.tensor([prompt], device=reference.device)
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).float().topk(2, dim=-1).values
    return out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


def check(source: Source, requests: Sequence[Request], device: str) -> bool:
    """Compare every request's tokens with transformers' and print a line for each; True if all are equal."""
    print(f"\nchecking against transformers (SDPA, greedy, float32, {device})", flush=True)
    reference = source.reference().to(device)
    num_equal = 0
    for request in requests:
        want, margins = greedy_tokens(reference, request.prompt, request.max_new_tokens)
        at = next((i for i, (a, b) in enumerate(zip(request.output, want, strict=True)) if a != b), None)
        if at is None:
            num_equal += 1
            print(f"[{request.index}] equal: {len(want)} tokens after a prompt of {len(request.prompt)}", flush=True)
            continue
        ours, theirs = request.output[at], want[at]
        print(
            f"[{request.index}] DIFFERENT from new token {at} on: {ours} {source.decode([ours])!r}, transformers has "
            f"{theirs} {source.decode([theirs])!r}, whose logit led by {margins[at]:.2g}\n"
            f"    -> {one_line(source.decode(want))}",
            flush=True,
        )
    print(f"{num_equal} of {len(requests)} equal")
    return num_equal == len(requests)
