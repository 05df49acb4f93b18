"""The routing kernel: a program holds one token's scores, and takes the best expert as often as needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from flashinfer.ops.routing.spec import LEAST_SUM

LEAST = tl.constexpr(LEAST_SUM)


@dataclass(frozen=True)
class RoutingConfig:
    """What a compiled form depends on; of `RoutingSpec`, where not said otherwise.

    groups, size: num_groups and group_size rounded up to 2^n: expert `g * group_size + i` is in place `g * size + i`.
    block_k: top_k and num_shared, rounded up.
    """

    num_experts: int
    top_k: int
    renormalise: bool
    scale: float
    num_groups: int
    topk_groups: int
    by_logits: bool
    num_shared: int
    shared_weight: float
    groups: int
    size: int
    block_k: int


class Outputs(NamedTuple):
    """weights, ids: `[tokens, top_k + num_shared]`. replay: `[tokens, top_k]` or None; strides in elements."""

    weights: torch.Tensor
    ids: torch.Tensor
    replay: torch.Tensor | None
    stride_weights: int
    stride_ids: int
    stride_replay: int


# Scores of logits `[n]`, those masked being -inf.


@triton.jit
def softmax(x, mask):
    # A row of -inf alone has no softmax: NaN, as everywhere.
    power = tl.where(mask, tl.exp(x - tl.max(x, 0)), 0.0)
    return power / tl.sum(power, 0)


@triton.jit
def sigmoid(x, mask):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sqrt_softplus(x, mask):
    """sqrt(log(1 + exp(x))), where exp neither overflows nor is lost in the sum with 1."""
    small = tl.exp(-tl.abs(x))
    total = 1.0 + small
    # log1p: the sum's rounding is taken out of the logarithm again.
    log = tl.where(total == 1.0, small, tl.log(total) * (small / tl.where(total == 1.0, 1.0, total - 1.0)))
    return tl.sqrt(tl.maximum(x, 0.0) + log)


@triton.jit
def identity(x, mask):
    return x


SCORES = {"softmax": softmax, "sigmoid": sigmoid, "sqrt_softplus": sqrt_softplus, "identity": identity}


@triton.jit
def ordered(x):
    """int32 that rise with fp32 `x`; NaN counts as -inf, -0 as 0."""
    x = tl.where(x == x, x, float("-inf")) + 0.0
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def kept_groups(choice, cfg: tl.constexpr):
    """int32 `[groups]`, 1 where a group is one of the `topk_groups` with the largest sums of their two best experts."""
    choice = tl.where(choice == choice, choice, float("-inf"))
    table = choice.reshape(cfg.groups, cfg.size)
    best, where = tl.max(table, 1, return_indices=True)
    offs = tl.arange(0, cfg.size)
    rest = tl.where(offs[None, :] == where[:, None], float("-inf"), table)
    value = best
    if cfg.num_experts // cfg.num_groups > 1:
        value = best + tl.max(rest, 1)
    offs_group = tl.arange(0, cfg.groups)
    mine = ordered(value).to(tl.int64) * cfg.groups + (cfg.groups - 1 - offs_group)
    mine = tl.where(offs_group < cfg.num_groups, mine, -(1 << 62))
    larger = (mine[None, :] > mine[:, None]).to(tl.int32)
    return (tl.sum(larger, 1) < cfg.topk_groups).to(tl.int32)


@triton.jit
def write(out, row, weights, ids, cfg: tl.constexpr):
    """Write a token's weights and ids `[block_k]`, shared experts after them."""
    offs = tl.arange(0, cfg.block_k)
    if cfg.renormalise:
        weights = weights / (tl.sum(tl.where(offs < cfg.top_k, weights, 0.0), 0) + LEAST)
    weights *= cfg.scale
    shared = offs >= cfg.top_k
    weights = tl.where(shared, cfg.shared_weight, weights)
    ids = tl.where(shared, cfg.num_experts + offs - cfg.top_k, ids)
    mask = offs < cfg.top_k + cfg.num_shared
    begin = out.weights + row * out.stride_weights
    tl.store(begin + offs, weights.to(out.weights.dtype.element_ty), mask=mask)
    tl.store(out.ids + row * out.stride_ids + offs, ids.to(out.ids.dtype.element_ty), mask=mask)
    if out.replay is not None:
        tl.store(out.replay + row * out.stride_replay + offs, ids.to(tl.int16), mask=offs < cfg.top_k)


@triton.jit(do_not_specialize=["stride"])
def choose_kernel(out, logits, bias, stride, score_of: tl.constexpr, cfg: tl.constexpr):
    """Grid: a program for each token. logits: `[tokens, num_experts]`, rows `stride` apart; bias may be None."""
    row = tl.program_id(0).to(tl.int64)
    PLACES: tl.constexpr = cfg.groups * cfg.size
    GROUP_SIZE: tl.constexpr = cfg.num_experts // cfg.num_groups
    place = tl.arange(0, PLACES)
    group = place // cfg.size
    expert = group * GROUP_SIZE + place % cfg.size
    mask = (place % cfg.size < GROUP_SIZE) & (group < cfg.num_groups)
    x = tl.load(logits + row * stride + expert, mask=mask, other=float("-inf")).to(tl.float32)
    score = score_of(x, mask)
    if cfg.by_logits:
        choice = x
    else:
        choice = score
        if bias is not None:
            choice += tl.load(bias + expert, mask=mask, other=0.0).to(tl.float32)
        choice = tl.where(mask, choice, float("-inf"))
    # The larger key is the better expert; of equal ones the first. Places without an expert come last.
    order = ordered(choice)
    if cfg.num_groups > 1:
        kept = kept_groups(choice, cfg)
        kept = tl.broadcast_to(kept[:, None], (cfg.groups, cfg.size)).reshape(PLACES)
        order = tl.where(kept == 1, order, -(1 << 31))  # below -inf
    NONE: tl.constexpr = -(1 << 63)
    key = tl.where(mask, (order.to(tl.int64) << 32) | (PLACES - place).to(tl.int64), NONE)
    offs = tl.arange(0, cfg.block_k)
    weights = tl.full([cfg.block_k], 0.0, tl.float32)
    ids = tl.full([cfg.block_k], 0, tl.int32)
    for i in range(cfg.top_k):
        taken = key == tl.max(key, 0)
        weights = tl.where(offs == i, tl.sum(tl.where(taken, score, 0.0), 0), weights)
        ids = tl.where(offs == i, tl.sum(tl.where(taken, expert, 0), 0), ids)
        key = tl.where(taken, NONE, key)
    write(out, row, weights, ids, cfg)


@triton.jit(do_not_specialize=["stride", "stride_table"])
def lookup_kernel(out, logits, tokens, table, stride, stride_table, score_of: tl.constexpr, cfg: tl.constexpr):
    """Grid: a program for each token. Its experts are row `tokens[i]` of `table`."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, cfg.block_k)
    mask = offs < cfg.top_k
    token = tl.load(tokens + row).to(tl.int64)
    ids = tl.load(table + token * stride_table + offs, mask=mask, other=0)
    x = tl.load(logits + row * stride + ids, mask=mask, other=0.0).to(tl.float32)
    write(out, row, score_of(x, mask), ids.to(tl.int32), cfg)
