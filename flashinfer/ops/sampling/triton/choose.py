"""Launches of the selection of largest numbers, and of the verification of drafts."""

from __future__ import annotations

import torch
import triton

from flashinfer.core.launch import Prebound, alignment
from flashinfer.ops.sampling.spec import Draws, Selection, Tree
from flashinfer.ops.sampling.triton.launch import SCAN, Places, draw_into, random_of, tiles_of
from flashinfer.ops.sampling.triton.rows import GROUP, STATS_WARPS, Residual, cut_of
from flashinfer.ops.sampling.triton.select import select_kernel, window_max_kernel
from flashinfer.ops.sampling.triton.verify import chain_kernel, tree_kernel

MIN_GROUP = 8
MIN_CANDIDATES = 2048

_window_max = Prebound(window_max_kernel)
_select = Prebound(select_kernel)
_chain = Prebound(chain_kernel)
_tree = Prebound(tree_kernel)


def group_for(k: int, vocab_size: int) -> int:
    """Tokens of a group: so few that there are 2 k groups, and half of them hold all candidates."""
    group = GROUP
    while group > MIN_GROUP and vocab_size < 2 * k * group:
        group //= 2
    return group


def select(x: torch.Tensor, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, indices) `[rows, k]`; see the torch implementation."""
    (num_rows, vocab_size), k = x.shape, selection.k
    candidates = max(MIN_CANDIDATES, triton.next_power_of_2(2 * k))
    cut = cut_of(vocab_size, x.element_size(), candidates, group_for(k, vocab_size))
    tiles = tiles_of(vocab_size, cut)
    values, indices = x.new_empty((num_rows, k)), x.new_empty((num_rows, k), dtype=selection.index_dtype)
    if num_rows == 0:
        return values, indices
    group_max = x.new_empty((num_rows, cut.groups), dtype=torch.float32)
    starts, lengths = selection.starts, selection.lengths
    key = (x.dtype, x.stride(0), vocab_size, cut, starts is None, lengths is None, alignment(x, starts, lengths))
    select_key = (key, selection.tie_break == 2, selection.index_dtype)
    sizes = (x.stride(0), vocab_size)
    _window_max(
        (num_rows * tiles, 1, 1),
        key,
        (x, group_max, starts, lengths, *sizes, tiles, cut),
        x.device,
        num_warps=STATS_WARPS,
    )
    scratch = (
        x.new_empty((num_rows, cut.groups), dtype=torch.int32),
        x.new_empty((num_rows, cut.candidates), dtype=torch.float32),
        x.new_empty((num_rows, cut.candidates), dtype=torch.int32),
    )
    high = selection.tie_break == 2
    arguments = (x, group_max, starts, lengths, scratch, values, indices, k, *sizes, tiles * cut.tile_groups, high, cut)
    _select((num_rows, 1, 1), select_key, (*arguments, SCAN, 1024), x.device, num_warps=cut.num_warps)
    if selection.sorted:
        indices, order = indices.sort(dim=1, descending=high)
        values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        indices = indices.gather(1, order)
    return values, indices


def verify_chain(
    draft_probs: torch.Tensor, draft_tokens: torch.Tensor, target_probs: torch.Tensor, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, accepted one by one, accepted in a row); see `flashinfer.ops.sampling.verify_chain`."""
    batch_size, num_drafts, vocab_size = draft_probs.shape
    accepted, emitted, rows, minus_rows = (draft_probs.new_empty(batch_size, dtype=torch.int32) for _ in range(4))
    tokens = draft_tokens.new_empty((batch_size, num_drafts + 1))
    random = random_of(draws)
    tensors = (draft_probs, draft_tokens, target_probs)
    key = (vocab_size, random.key, *(t.dtype for t in tensors), alignment(*tensors))
    _chain(
        (batch_size, 1, 1),
        key,
        (*tensors, *random, tokens, (accepted, emitted), rows, minus_rows, vocab_size, num_drafts),
        draft_probs.device,
        num_warps=1,
    )
    residual = Residual(draft_probs, minus_rows, vocab_size, None, None, 0)
    draw_into(target_probs.flatten(0, 1), draws, Places(rows, residual, tokens, emitted))
    return tokens, accepted, emitted


def verify_tree(
    tree: Tree, target_probs: torch.Tensor, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, nodes, accepted); see `flashinfer.ops.sampling.verify_tree`."""
    batch_size, num_nodes = tree.tokens.shape
    vocab_size = target_probs.shape[2]
    depth, rows, num_excluded = (target_probs.new_empty(batch_size, dtype=torch.int32) for _ in range(3))
    nodes, excluded = (target_probs.new_empty((batch_size, num_nodes), dtype=torch.int32) for _ in range(2))
    tokens = torch.empty_like(tree.tokens)
    random = random_of(draws)
    key = (vocab_size, random.key, *(t.dtype for t in (*tree, target_probs)), alignment(*tree, target_probs))
    outputs = (tokens, nodes, depth, rows, excluded, num_excluded)
    _tree(
        (batch_size, 1, 1),
        key,
        (tuple(tree), target_probs, *random, *outputs, vocab_size, num_nodes),
        target_probs.device,
        num_warps=1,
    )
    residual = Residual(None, None, 0, excluded, num_excluded, num_nodes)
    draw_into(target_probs.flatten(0, 1), draws, Places(rows, residual, tokens, depth))
    return tokens, nodes[:, : num_nodes - 1], depth
