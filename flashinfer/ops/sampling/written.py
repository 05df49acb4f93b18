"""The torch implementation, with results written to tensors it is given; it takes no scratch memory."""

from __future__ import annotations

import torch

from flashinfer.ops.sampling import reference
from flashinfer.ops.sampling.reference import verify_chain, verify_tree
from flashinfer.ops.sampling.spec import Draws, Filters, Parameter, Samples, Selection


def softmax(out: torch.Tensor, logits: torch.Tensor, temperature: Parameter, buffer: torch.Tensor | None) -> int:
    """See `reference.softmax`."""
    out.copy_(reference.softmax(logits, temperature))
    return 0


def sample(
    x: torch.Tensor, logits: bool, filters: Filters, draws: Draws, out: Samples, buffer: torch.Tensor | None
) -> int:
    """See `reference.sample`."""
    tokens, valid = reference.sample(x, logits, filters, draws)
    out.tokens.copy_(tokens)
    if out.valid is not None:
        out.valid.copy_(valid)
    return 0


def keep(
    out: torch.Tensor, x: torch.Tensor, kind: str, parameter: Parameter, logits: bool, buffer: torch.Tensor | None
) -> int:
    """See `reference.mask_logits` and `reference.renormalise`."""
    filters = {"k": Filters(parameter), "p": Filters(top_p=parameter), "min_p": Filters(min_p=parameter)}[kind]
    out.copy_(reference.mask_logits(x, parameter) if logits else reference.renormalise(x, filters))
    return 0


def select(
    values: torch.Tensor,
    indices: torch.Tensor,
    x: torch.Tensor,
    selection: Selection,
    buffer: torch.Tensor | None,
) -> int:
    """See `reference.select`."""
    largest, found = reference.select(x, selection)
    values.copy_(largest)
    indices.copy_(found)
    return 0


__all__ = ["keep", "sample", "select", "softmax", "verify_chain", "verify_tree"]
