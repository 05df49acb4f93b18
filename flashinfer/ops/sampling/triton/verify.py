"""Verification of drafts: which drafted tokens stay, and from which row the token after them is drawn."""

from __future__ import annotations

import triton
import triton.language as tl

from flashinfer.ops.sampling.triton.rows import random_words, uniform_narrow

# Draw 0 is that of the token after the accepted ones.
ACCEPT_DRAW = tl.constexpr(256)


@triton.jit
def coin(random, sample, i):
    """fp32 in [0, 1): the i-th of a request."""
    keys, seed_low, seed_high, offset_low, offset_high = random
    draw = tl.full([1], ACCEPT_DRAW, tl.int32) + i
    a, _b, _c, _d = random_words(keys, seed_low, seed_high, offset_low, offset_high, sample, draw)
    return tl.sum(uniform_narrow(a), 0)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high", "num_drafts"])
def chain_kernel(
    draft_probs,
    draft_tokens,
    target_probs,
    keys,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    tokens,
    counts,
    rows,
    minus_rows,
    vocab,
    num_drafts,
):
    """Grid: requests. Accept draft tokens one after the other, each with probability min(1, target / draft).

    tokens: `[batch, num_drafts + 1]`, gets the accepted ones, -1 after them. counts: int32 (accepted each for
    itself, accepted in a row). rows, minus_rows: of target_probs and draft_probs for the next token.
    """
    request = tl.program_id(0)
    wide = request.to(tl.int64)
    random = (keys, seed_low, seed_high, offset_low, offset_high)
    accepted = tl.full((), 0, tl.int32)
    emitted = tl.full((), 0, tl.int32)
    for i in range(num_drafts):
        token = tl.load(draft_tokens + wide * num_drafts + i).to(tl.int64)
        p = tl.load(draft_probs + (wide * num_drafts + i) * vocab + token).to(tl.float32)
        q = tl.load(target_probs + (wide * (num_drafts + 1) + i) * vocab + token).to(tl.float32)
        yes = (coin(random, request, i) * p < q).to(tl.int32)
        emitted += yes * (emitted == i).to(tl.int32)
        accepted += yes
    for i in range(num_drafts + 1):
        token = tl.full((), -1, tl.int64)
        if i < emitted:
            token = tl.load(draft_tokens + wide * num_drafts + i).to(tl.int64)
        tl.store(tokens + wide * (num_drafts + 1) + i, token.to(tokens.dtype.element_ty))
    tl.store(counts[0] + request, accepted)
    tl.store(counts[1] + request, emitted)
    tl.store(rows + request, request * (num_drafts + 1) + emitted)
    tl.store(minus_rows + request, tl.where(emitted < num_drafts, request * num_drafts + emitted, -1))


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high", "num_nodes"])
def tree_kernel(
    tree,
    target_probs,
    keys,
    seed_low,
    seed_high,
    offset_low,
    offset_high,
    tokens,
    nodes,
    num_accepted,
    rows,
    excluded,
    num_excluded,
    vocab,
    num_nodes,
):
    """Grid: requests. From the root, step to a child with the probability its token has; stop where none is taken.

    tree: (tokens, first_child, next_sibling). tokens, nodes: `[batch, num_nodes]`, get the path without the root, -1
    after it. rows: the row of target_probs for the next token; excluded: the tokens that were just refused.
    """
    request = tl.program_id(0)
    first = request.to(tl.int64) * num_nodes
    random = (keys, seed_low, seed_high, offset_low, offset_high)
    for i in range(num_nodes):
        tl.store(tokens + first + i, tl.full((), -1, tl.int64).to(tokens.dtype.element_ty))
        tl.store(nodes + first + i, -1)
    node = tl.full((), 0, tl.int32)
    depth = tl.full((), 0, tl.int32)
    refused = tl.full((), 0, tl.int32)
    child = tl.load(tree[1] + first).to(tl.int32)
    u = coin(random, request, 0)
    covered = tl.full((), 0.0, tl.float32)
    # As many looks as there are nodes, and only down to higher numbers: a malformed tree holds nothing up, and its path
    # is no longer than a tree's.
    for _step in range(num_nodes):
        if child > node:
            token = tl.load(tree[0] + first + child).to(tl.int64)
            covered += tl.load(target_probs + (first + node) * vocab + token).to(tl.float32)
            if u < covered:
                tl.store(tokens + first + depth, token.to(tokens.dtype.element_ty))
                tl.store(nodes + first + depth, child)
                node = child
                depth += 1
                refused = 0
                covered = 0.0
                u = coin(random, request, depth)
                child = tl.load(tree[1] + first + node).to(tl.int32)
            else:
                tl.store(excluded + first + refused, token.to(tl.int32))
                refused += 1
                child = tl.load(tree[2] + first + child).to(tl.int32)
    tl.store(num_accepted + request, depth)
    tl.store(rows + request, (first + node).to(tl.int32))
    tl.store(num_excluded + request, refused)
