"""Sampling of tokens from logits and probabilities, filters, the largest numbers of rows, verification of drafts."""

from __future__ import annotations

from types import ModuleType

import torch

from flashinfer.core.arch import arch_of
from flashinfer.core.scratch import Needs
from flashinfer.core.select import Impl
from flashinfer.core.select import select as select_impl
from flashinfer.ops.sampling.elementwise import plus_offsets, scale_logits, through_page_table
from flashinfer.ops.sampling.spec import (
    Draws,
    Filters,
    Halves,
    PageTable,
    Parameter,
    RowSpec,
    Samples,
    Seed,
    Selection,
    Tree,
    halves_of,
)
from flashinfer.ops.sampling.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.sampling.triton", triton_supports),
    Impl("torch", "flashinfer.ops.sampling.written", torch_supports),
)


def _impl(rows: torch.Tensor, backend: str, k: int = 0) -> ModuleType:
    spec = RowSpec(rows.shape[-1], rows.dtype, k)
    return select_impl(IMPLS, spec, arch_of(rows.device), backend).load()


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_needs = Needs()


def scratch_for(kind: str, x: torch.Tensor, num_samples: int = 0) -> torch.Tensor | None:
    """Scratch memory for a call on a GPU; None before the first one of its kind, which finds out how much it takes."""
    return _needs.buffer((kind, x.shape, x.dtype, x.device, num_samples), x.device)


def _note(size: int, kind: str, x: torch.Tensor, num_samples: int = 0) -> None:
    _needs.note((kind, x.shape, x.dtype, x.device, num_samples), size)


def softmax_into(
    out: torch.Tensor, logits: torch.Tensor, temperature: Parameter, scratch: torch.Tensor | None, backend: str = "auto"
) -> None:
    """fp32 `softmax(logits / temperature)`; temperature 0 is its limit: the largest logits share all of it.

    scratch: of `scratch_for("softmax", logits)`.
    """
    if logits.shape[0] > 0:
        _note(_impl(logits, backend).softmax(out, _unit_stride(logits), temperature, scratch), "softmax", logits)


def softmax(logits: torch.Tensor, temperature: Parameter, backend: str = "auto") -> torch.Tensor:
    """`softmax_into` a new tensor."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    softmax_into(out, logits, temperature, None, backend)
    return out


def sample_into(
    out: Samples,
    rows: torch.Tensor,
    logits: bool,
    filters: Filters,
    draws: Draws,
    scratch: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One token for each sample, by its weight among those that pass the filters.

    out: tokens of indices' dtype, else int32; valid: False for a row of zeros or NaN, which gives some token. rows:
    probs, or logits, `[batch_size, vocab_size]`. scratch: of `scratch_for(filters.kind, ...)`.
    """
    if draws.num_samples > 0:
        size = _impl(rows, backend).sample(_unit_stride(rows), logits, filters, draws, out, scratch)
        _note(size, filters.kind, rows, draws.num_samples)


def samples_like(rows: torch.Tensor, draws_of: torch.Tensor | None, with_valid: bool) -> Samples:
    """Memory for tokens drawn from all rows, or from those of the indices `draws_of`."""
    if draws_of is None:
        tokens = torch.empty(rows.shape[0], dtype=torch.int32, device=rows.device)
    else:
        tokens = torch.empty(draws_of.shape, dtype=draws_of.dtype, device=rows.device)
    return Samples(tokens, torch.empty_like(tokens, dtype=torch.bool) if with_valid else None)


def sample(
    rows: torch.Tensor, logits: bool, filters: Filters, draws: Draws, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample_into` new tensors (tokens, valid)."""
    out = samples_like(rows, draws.indices, True)
    sample_into(out, rows, logits, filters, draws, None, backend)
    assert out.valid is not None
    return out.tokens, out.valid


def keep_into(
    out: torch.Tensor,
    x: torch.Tensor,
    kind: str,
    parameter: Parameter,
    logits: bool,
    scratch: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """What passes one filter. kind: "k", "p" or "min_p", which parameter is.

    Of probs: those that pass over their sum, 0 elsewhere; zeros stay zeros. Of logits (top_k only): those that pass,
    -inf elsewhere. scratch: of `scratch_for("keep_" + kind, ...)`.
    """
    if x.shape[0] > 0:
        size = _impl(x, backend).keep(out, _unit_stride(x), kind, parameter, logits, scratch)
        _note(size, "keep_" + kind, x)


def renormalise(probs: torch.Tensor, filters: Filters, backend: str = "auto") -> torch.Tensor:
    """`keep_into` a new tensor, of probs by the one filter."""
    parameter = {"k": filters.top_k, "p": filters.top_p, "min_p": filters.min_p}[filters.kind]
    assert parameter is not None
    out = torch.empty_like(probs, memory_format=torch.contiguous_format)
    keep_into(out, probs, filters.kind, parameter, False, None, backend)
    return out


def mask_logits(logits: torch.Tensor, top_k: Parameter, backend: str = "auto") -> torch.Tensor:
    """`keep_into` a new tensor, of logits by top_k."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    keep_into(out, logits, "k", top_k, True, None, backend)
    return out


def selected_like(x: torch.Tensor, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for (values, indices) `[rows, k]`."""
    shape = (x.shape[0], selection.k)
    return x.new_empty(shape), x.new_empty(shape, dtype=selection.index_dtype)


def select_into(
    values: torch.Tensor,
    indices: torch.Tensor,
    x: torch.Tensor,
    selection: Selection,
    scratch: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """(values of x' dtype, indices from the window's start) `[rows, k]` of each window's largest numbers, not sorted.

    A window of at most k numbers gives all of them, -1 and 0 after them. NaN counts as -inf. scratch: of
    `scratch_for("select", x, k)`.
    """
    impl = _impl(x, backend, selection.k)
    if x.shape[0] > 0:
        size = impl.select(values, indices, _unit_stride(x), selection._replace(sorted=False), scratch)
        _note(size, "select", x, selection.k)


def in_order(values: torch.Tensor, indices: torch.Tensor, tie_break: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, largest first, equal ones by index, the preferred first."""
    indices, order = indices.sort(dim=1, descending=tie_break == 2)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def select(x: torch.Tensor, selection: Selection, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """`select_into` new tensors, in order if that is wanted."""
    values, indices = selected_like(x, selection)
    select_into(values, indices, x, selection, None, backend)
    return in_order(values, indices, selection.tie_break) if selection.sorted else (values, indices)


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
    "Halves",
    "PageTable",
    "Parameter",
    "Samples",
    "Seed",
    "Selection",
    "Tree",
    "halves_of",
    "in_order",
    "keep_into",
    "mask_logits",
    "plus_offsets",
    "renormalise",
    "sample",
    "sample_into",
    "samples_like",
    "scale_logits",
    "scratch_for",
    "select",
    "select_into",
    "selected_like",
    "softmax",
    "softmax_into",
    "through_page_table",
    "verify_chain",
    "verify_tree",
]
