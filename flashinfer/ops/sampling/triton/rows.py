"""Device functions on rows of numbers: how a row is cut into groups, keys that sort like numbers, draws, selections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)
# Keys: int32 that sort like fp32. Below every number; above every number; of -inf; of the smallest positive number.
NO_KEY = tl.constexpr(-2147483648)
TOP_KEY = tl.constexpr(2147483647)
NEG_INF_KEY = tl.constexpr(-2139095041)
POSITIVE_KEY = tl.constexpr(1)

VECTOR_BYTES = 16
GROUP = 64
MAX_GROUPS = 8192
STATS_WARPS = 4
SCAN = 8192


@dataclass(frozen=True)
class Cut:
    """How a row is cut. A tile is `depth` stripes of `cols` tokens; a group is `width` columns of all stripes.

    So a thread finds the maximum and sum of a group among its own registers: stripes lie in one thread, and `width`
    columns are one of its 16-byte loads. groups: their number rounded up to 2^n. candidates: how many tokens are kept
    at hand. batch: groups that are read again at a time.
    """

    depth: int
    cols: int
    width: int
    groups: int
    candidates: int
    batch: int
    num_warps: int

    @property
    def tile(self) -> int:
        return self.depth * self.cols

    @property
    def group(self) -> int:
        return self.depth * self.width

    @property
    def tile_groups(self) -> int:
        return self.cols // self.width


@lru_cache(maxsize=1024)
def cut_of(vocab_size: int, itemsize: int, candidates: int = 2048, group: int = GROUP, read_per_thread: int = 4) -> Cut:
    """The cut of rows of `vocab_size` numbers of `itemsize` bytes; read_per_thread: how large a batch is."""
    while triton.cdiv(vocab_size, group) > MAX_GROUPS:
        group *= 2
    width = min(VECTOR_BYTES // itemsize, group)
    depth = group // width
    cols = min(STATS_WARPS * 32 * width, max(width, triton.next_power_of_2(triton.cdiv(vocab_size, depth))))
    groups = triton.next_power_of_2(triton.cdiv(vocab_size, depth * cols) * (cols // width))
    held = min(candidates, triton.next_power_of_2(vocab_size))
    num_warps = 4 if max(groups, held) <= 1024 else 8 if groups <= 4096 and held <= 2048 else 16
    return Cut(
        depth, cols, width, groups, held, min(groups, max(1, read_per_thread * 32 * num_warps // group)), num_warps
    )


class Keys(NamedTuple):
    """Philox keys and counters: int64 tensors with their strides (0 or 1), or None for the scalars of the launch."""

    seed: torch.Tensor | None
    offset: torch.Tensor | None
    seed_stride: int
    offset_stride: int


class Residual(NamedTuple):
    """What is taken off a row before a draw, each None or: `minus[minus_rows[i]]`, and tokens that may not come.

    minus_rows: int32 `[n]`, -1 for nothing. excluded: int32 `[n, exclude_stride]`, num_excluded int32 `[n]`.
    """

    minus: torch.Tensor | None
    minus_rows: torch.Tensor | None
    minus_stride: int
    excluded: torch.Tensor | None
    num_excluded: torch.Tensor | None
    exclude_stride: int


# A tuple with None in it cannot itself be compared with None inside of a kernel (Triton 3.6).
NO_RESIDUAL = Residual(None, None, 0, None, None, 0)


@triton.jit
def sort_key(x):
    """int32 that sorts like the fp32 `x`; both zeros are one."""
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number_of(key):
    """The fp32 number that `sort_key` made a key of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def read(x, offs, vocab, LOGITS: tl.constexpr):
    """Tokens `offs` of a row as fp32, cleaned: NaN and what lies outside are -inf among logits, and 0 among probs."""
    if LOGITS:
        v = tl.load(x + offs, mask=offs < vocab, other=NEG_INF).to(tl.float32)
        return tl.where(v == v, v, NEG_INF)
    v = tl.load(x + offs, mask=offs < vocab, other=0.0).to(tl.float32)
    return tl.where(v > 0, v, 0.0)


@triton.jit
def read_residual(x, residual, entry, offs, vocab, LOGITS: tl.constexpr):
    """`read`, with the residual taken off: `max(x - minus, 0)`, 0 for excluded tokens."""
    v = read(x, offs, vocab, LOGITS)
    if residual.minus is not None:
        row = tl.load(residual.minus_rows + entry).to(tl.int64)
        other = residual.minus + tl.maximum(row, 0) * residual.minus_stride
        end = tl.where(row >= 0, vocab, 0)
        v -= tl.load(other + offs, mask=offs < end, other=0.0).to(tl.float32)
        v = tl.where(v > 0, v, 0.0)
    if residual.excluded is not None:
        for i in range(tl.load(residual.num_excluded + entry)):
            v = tl.where(offs == tl.load(residual.excluded + entry * residual.exclude_stride + i), 0.0, v)
    return v


@triton.jit
def weight_of(x, shift, LOGITS: tl.constexpr):
    """What a token weighs: its probability, or `exp(x - shift)`; shift: the row's largest logit."""
    if LOGITS:
        return tl.where(x == NEG_INF, 0.0, tl.exp2((x - shift) * LOG2E))
    return x


@triton.jit
def group_offsets(group, cut: tl.constexpr):
    """Tokens `[n, cut.group]` of groups `[n]`."""
    element = tl.arange(0, cut.group)
    inside = (element // cut.width) * cut.cols + element % cut.width
    first = (group // cut.tile_groups) * cut.tile + (group % cut.tile_groups) * cut.width
    return first[:, None] + inside[None, :]


@triton.jit
def random_words(keys, seed_low, seed_high, offset_low, offset_high, sample, draw):
    """Four uint32 words: Philox4x32-10 of the sample's key, at counter (offset, sample, draw). draw: int32 tensor."""
    zero = draw * 0
    if keys.seed is None:
        seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    else:
        seed = tl.load(keys.seed + sample * keys.seed_stride)
    if keys.offset is not None:
        offset = tl.load(keys.offset + sample * keys.offset_stride)
        offset_low = (offset & 0xFFFFFFFF).to(tl.int32)
        offset_high = (offset >> 32).to(tl.int32)
    return tl.philox(seed, zero + offset_low, zero + offset_high, zero + sample, draw)


@triton.jit
def uniform_wide(a, b):
    """fp64 in [0, 1) of 53 random bits, as the torch implementation takes them."""
    return ((a.to(tl.uint64) << 21) | (b >> 11).to(tl.uint64)).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def uniform_narrow(c):
    """fp32 in [0, 1) of 24 random bits."""
    return (c >> 8).to(tl.float32) * 5.9604644775390625e-8


@triton.jit
def pick(weight, index, u):
    """The first index whose running sum passes u times the sum; never one of weight 0 while another has weight."""
    running = tl.cumsum(weight, 0)
    first = tl.min(tl.where((running > u * tl.sum(weight, 0)) & (weight > 0), index, TOP_KEY), 0)
    last = tl.max(tl.where(weight > 0, index, 0), 0)
    return tl.where(first == TOP_KEY, last, first)


@triton.jit
def group_weights(group_max, group_sum, offs, mask, LOGITS: tl.constexpr):
    """(fp64 weight of each group, the row's largest logit or 0)."""
    total = tl.load(group_sum + offs, mask=mask, other=0.0)
    shift = 0.0
    if LOGITS:
        high = tl.load(group_max + offs, mask=mask, other=NEG_INF)
        shift = tl.max(high, 0)
        total = tl.where(high == NEG_INF, 0.0, total * tl.exp2((high - shift) * LOG2E))
    return total.to(tl.float64), shift


@triton.jit
def kth_largest_key(key, k, low, high):
    """The largest t in [low, high) with at least k keys at or above it, else one that keeps all: at most 33 rounds.

    May stop early at a t between two keys that keeps the same k.
    """
    # No key lies outside of [smallest, largest], so neither need t. Without any key `low` keeps all.
    smallest = tl.min(tl.where(key == NO_KEY, TOP_KEY, key), 0)
    low = tl.where(smallest == TOP_KEY, low, tl.maximum(low, smallest)).to(tl.int64)
    high = tl.minimum(high.to(tl.int64), tl.max(key, 0).to(tl.int64) + 1)
    at_low = tl.sum((key >= low.to(tl.int32)).to(tl.int32), 0)
    while (high - low > 1) & (at_low > k):
        middle = (low + high) >> 1
        count = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0)
        if count >= k:
            low = middle
            at_low = count
        else:
            high = middle
    return low.to(tl.int32)
