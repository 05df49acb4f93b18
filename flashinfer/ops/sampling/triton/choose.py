"""Launches of the selection of largest numbers, and of the verification of drafts."""

from __future__ import annotations

import torch
import triton

from flashinfer.core.arch import arch_of
from flashinfer.core.launch import Prebound, alignment
from flashinfer.core.scratch import Scratch
from flashinfer.ops.sampling.spec import Draws, Selection, Tree
from flashinfer.ops.sampling.triton.launch import (
    COLLECT_SCAN,
    COLLECT_WARPS,
    REGISTERS,
    SCAN,
    Places,
    draw_into,
    random_of,
    slots_of,
    splits_of,
    tiles_of,
)
from flashinfer.ops.sampling.triton.rows import GROUP, STATS_WARPS, Residual, cut_of
from flashinfer.ops.sampling.triton.select import candidates_kernel, choose_kernel, select_kernel, window_max_kernel
from flashinfer.ops.sampling.triton.verify import chain_kernel, tree_kernel

MIN_GROUP = 8
MIN_CANDIDATES = 2048
BLOCK = 1024
# Of few rows, programs a multiprocessor that look for candidates.
SELECT_PROGRAMS = 2

_window_max = Prebound(window_max_kernel)
_select = Prebound(select_kernel)
_candidates = Prebound(candidates_kernel)
_choose = Prebound(choose_kernel)
_chain = Prebound(chain_kernel)
_tree = Prebound(tree_kernel)


def group_for(k: int, vocab_size: int) -> int:
    """Tokens of a group: so few that there are 2 k groups, and half of them hold all candidates."""
    group = GROUP
    while group > MIN_GROUP and vocab_size < 2 * k * group:
        group //= 2
    return group


def select(
    values: torch.Tensor,
    indices: torch.Tensor,
    x: torch.Tensor,
    selection: Selection,
    buffer: torch.Tensor | None,
) -> int:
    """Write `[rows, k]` of each; several programs a row where there are few rows. Returns the scratch it took."""
    (num_rows, vocab_size), k = x.shape, selection.k
    scratch = Scratch(x, buffer)
    candidates = max(MIN_CANDIDATES, triton.next_power_of_2(2 * k))
    cut = cut_of(vocab_size, x.element_size(), candidates, group_for(k, vocab_size))
    tiles = tiles_of(vocab_size, cut)
    group_max = scratch.empty((num_rows, cut.groups), torch.float32)
    window = (selection.starts, selection.lengths)
    high, sizes = selection.tie_break == 2, (x.stride(0), vocab_size)
    key = (x.dtype, x.stride(0), vocab_size, cut, *(w is None for w in window), alignment(x, *window))
    out_key = (key, high, selection.index_dtype, alignment(values, indices))
    _window_max(
        (num_rows * tiles, 1, 1),
        key,
        (x, group_max, *window, *sizes, tiles, cut),
        x.device,
        num_warps=STATS_WARPS,
    )
    num_groups = tiles * cut.tile_groups
    # A window may begin anywhere: then each number has an address of its own, which take registers.
    scan = COLLECT_SCAN if selection.starts is None else COLLECT_SCAN // 2
    splits, per_split = splits_of(num_rows, triton.cdiv(vocab_size, scan), SELECT_PROGRAMS * arch_of(x.device).num_sms)
    if num_rows >= arch_of(x.device).num_sms or splits == 1:
        arguments = (x, group_max, *window, slots_of(scratch, cut, num_rows), values, indices, k, *sizes, num_groups)
        form = (high, cut, SCAN, BLOCK)
        _select((num_rows, 1, 1), out_key, (*arguments, *form), x.device, num_warps=cut.num_warps)
        return scratch.needed
    parts = (
        scratch.empty((num_rows, splits, cut.candidates), torch.float32),
        scratch.empty((num_rows, splits, cut.candidates), torch.int32),
        scratch.empty((num_rows, splits), torch.int32),
        scratch.empty((num_rows, 2), torch.int32),
    )
    _candidates(
        (num_rows * splits, 1, 1),
        key,
        (x, group_max, *window, parts, k, *sizes, num_groups, splits, per_split, cut, scan),
        x.device,
        num_warps=COLLECT_WARPS,
        **REGISTERS,
    )
    arguments = (x, *window, parts, values, indices, k, *sizes, splits, high, cut, SCAN, BLOCK)
    _choose((num_rows, 1, 1), out_key, arguments, x.device, num_warps=16, **REGISTERS)
    return scratch.needed


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
