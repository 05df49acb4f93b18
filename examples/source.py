"""What the demo asks of a model, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from model import LlamaConfig


class MissingPackageError(Exception):
    """Something the demo needs is not installed; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """A model and its tokenizer.

    weights: fp32 on the CPU, transformers' names. encode: prompt -> token ids. decode: token ids -> text.
    reference: builds the same model in transformers, fp32 on the CPU.
    """

    name: str
    config: LlamaConfig
    weights: dict[str, torch.Tensor]
    eos_ids: frozenset[int]
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    reference: Callable[[], Any]
