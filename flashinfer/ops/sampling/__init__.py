"""Sampling of tokens from logits and probabilities, filters, the largest numbers of rows, verification of drafts."""

from __future__ import annotations

from types import ModuleType

import torch

from flashinfer.core.arch import arch_of
from flashinfer.core.select import Impl
from flashinfer.core.select import select as select_impl
from flashinfer.ops.sampling.elementwise import plus_offsets, scale_logits, through_page_table
from flashinfer.ops.sampling.spec import Draws, Filters, PageTable, Parameter, RowSpec, Seed, Selection, Tree
from flashinfer.ops.sampling.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.sampling.triton", triton_supports),
    Impl("torch", "flashinfer.ops.sampling.reference", torch_supports),
)


def _impl(rows: torch.Tensor, backend: str, k: int = 0) -> ModuleType:
    spec = RowSpec(rows.shape[-1], rows.dtype, k)
    return select_impl(IMPLS, spec, arch_of(rows.device), backend).load()


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def softmax(logits: torch.Tensor, temperature: Parameter, backend: str = "auto") -> torch.Tensor:
    """fp32 `softmax(logits / temperature)`; temperature 0 is its limit: the largest logits share all of it."""
    result: torch.Tensor = _impl(logits, backend).softmax(_unit_stride(logits), temperature)
    return result


def sample(
    rows: torch.Tensor, logits: bool, filters: Filters, draws: Draws, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each sample, by its weight among those that pass the filters.

    rows: probs, or logits, `[batch_size, vocab_size]`. Returns (tokens `[num_samples]` of indices' dtype, else int32;
    valid bool `[num_samples]`: False for a row of zeros or NaN, which gives some token).
    """
    if draws.num_samples == 0:
        dtype = torch.int32 if draws.indices is None else draws.indices.dtype
        return rows.new_empty(0, dtype=dtype), rows.new_empty(0, dtype=torch.bool)
    tokens, valid = _impl(rows, backend).sample(_unit_stride(rows), logits, filters, draws)
    return tokens, valid


def renormalise(probs: torch.Tensor, filters: Filters, backend: str = "auto") -> torch.Tensor:
    """probs that pass top_k, top_p or min_p (one of them) over their sum, 0 elsewhere; zeros stay zeros."""
    if probs.shape[0] == 0:
        return torch.empty_like(probs)
    result: torch.Tensor = _impl(probs, backend).renormalise(_unit_stride(probs), filters)
    return result


def mask_logits(logits: torch.Tensor, top_k: Parameter, backend: str = "auto") -> torch.Tensor:
    """logits that are among the top_k largest, -inf elsewhere."""
    if logits.shape[0] == 0:
        return torch.empty_like(logits)
    result: torch.Tensor = _impl(logits, backend).mask_logits(_unit_stride(logits), top_k)
    return result


def select(x: torch.Tensor, selection: Selection, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """(values of x' dtype, indices from the window's start) `[rows, k]` of each window's largest numbers.

    A window of at most k numbers gives all of them, -1 and 0 after them. NaN counts as -inf.
    """
    values, indices = _impl(x, backend, selection.k).select(_unit_stride(x), selection)
    return values, indices


def verify_chain(
    draft_probs: torch.Tensor,
    draft_tokens: torch.Tensor,
    target_probs: torch.Tensor,
    draws: Draws,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept drafts one after the other with probability min(1, target / draft), then draw one token more.

    That one comes from `max(target - draft, 0)` at the first refusal, from the last target row if there is none, so
    that all tokens are distributed as the target's (Leviathan et al., ICML 2023). draft_probs `[batch, n, vocab]`,
    draft_tokens `[batch, n]`, target_probs `[batch, n + 1, vocab]`, contiguous. Returns (tokens `[batch, n + 1]` with
    -1 after the drawn one; int32 `[batch]`: how many would be accepted each for itself, how many were in a row).
    """
    batch_size, length = target_probs.shape[:2]
    if batch_size == 0:
        counts = target_probs.new_empty(0, dtype=torch.int32)
        return draft_tokens.new_empty((0, length)), counts, counts.clone()
    impl = _impl(target_probs, backend)
    tokens, accepted, emitted = impl.verify_chain(draft_probs, draft_tokens, target_probs, draws)
    return tokens, accepted, emitted


def verify_tree(
    tree: Tree, target_probs: torch.Tensor, draws: Draws, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walk a draft tree from its root: to each child with its token's target probability, till none is taken.

    The token after the walk comes from the last node's target row without the children just refused: so all tokens are
    distributed as the target's. target_probs `[batch, num_nodes, vocab]`, rows summing to 1, contiguous. Returns
    (tokens `[batch, num_nodes]`: accepted, drawn, -1; nodes int32 `[batch, num_nodes - 1]`: accepted, -1; accepted
    int32 `[batch]`).
    """
    batch_size, num_nodes = target_probs.shape[:2]
    if batch_size == 0:
        count = target_probs.new_empty(0, dtype=torch.int32)
        return tree.tokens.clone(), count.new_empty((0, num_nodes - 1)), count
    tokens, nodes, accepted = _impl(target_probs, backend).verify_tree(tree, target_probs, draws)
    return tokens, nodes, accepted


__all__ = [
    "IMPLS",
    "Draws",
    "Filters",
    "PageTable",
    "Parameter",
    "Seed",
    "Selection",
    "Tree",
    "mask_logits",
    "plus_offsets",
    "renormalise",
    "sample",
    "scale_logits",
    "select",
    "softmax",
    "through_page_table",
    "verify_chain",
    "verify_tree",
]
