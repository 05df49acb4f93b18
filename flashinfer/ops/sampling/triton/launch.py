"""Launches: cuts of rows into programs, scratch memory, prebound kernels. No host sync; scratch lives for one call."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton

from flashinfer.core.arch import arch_of
from flashinfer.core.launch import Prebound, alignment
from flashinfer.core.scratch import Scratch
from flashinfer.ops.sampling.spec import Draws, Filters, Halves, Parameter, Samples, Seed, halves_of
from flashinfer.ops.sampling.triton.draw import draw_kernel, group_stats_kernel
from flashinfer.ops.sampling.triton.filter import filter_kernel
from flashinfer.ops.sampling.triton.min_p import min_p_kernel
from flashinfer.ops.sampling.triton.nucleus import collect_kernel, settle_kernel
from flashinfer.ops.sampling.triton.resolve import resolve_kernel
from flashinfer.ops.sampling.triton.rows import NO_RESIDUAL, STATS_WARPS, VECTOR_BYTES, Cut, Keys, Residual, cut_of
from flashinfer.ops.sampling.triton.threshold import apply_kernel, search_kernel, threshold_kernel

SCAN = 2048
# What one program reads at a time of the rows that min_p leaves to it; more spills registers on sm_120.
MIN_P_SCAN = 1024
# Statistics: programs a multiprocessor.
STATS_PROGRAMS = 16
# Open rows: what the warps of a program read at a time (half where rows begin off 16 bytes), programs a multiprocessor.
RESOLVE_SCAN = 2048
RESOLVE_WARPS = 8
RESOLVE_PROGRAMS = 8
# How large the batches are that a filter with a top_k reads of groups for the second time; see `cut_of`. Twice as much
# spills registers (Triton 3.6), top_p alone does not gain.
TOP_K_READ = 8
# Numbers that are collected of a row to find top_k's threshold among, what is read at a time for that, programs a
# multiprocessor.
FOUND = 8192
COLLECT_SCAN = 2048
COLLECT_PROGRAMS = 8
COLLECT_WARPS = 8
# The same for top_p's; into how many parts a row is cut for it, and how many lists a part has, one for each thread.
NUCLEUS_FOUND = 16384
NUCLEUS_SPLITS = 4
NUCLEUS_LISTS = 128
SEARCH_FIELDS = 8
STATE_FIELDS = 16
PART_FIELDS = 8
# Two programs of eight warps a multiprocessor. Stated, since ptxas would else spill a few bytes to fit a third.
REGISTERS = {"maxnreg": 128}
APPLY_TILE = 4096

_stats = Prebound(group_stats_kernel)
_draw = Prebound(draw_kernel)
_filter = Prebound(filter_kernel)
_min_p = Prebound(min_p_kernel)
_resolve = Prebound(resolve_kernel)
_threshold = Prebound(threshold_kernel)
_search = Prebound(search_kernel)
_collect = Prebound(collect_kernel)
_settle = Prebound(settle_kernel)
_apply = Prebound(apply_kernel)


class Random(NamedTuple):
    """The kernels' arguments for random numbers: the ints of a launch as 32-bit halves, so that their type is one."""

    keys: Keys
    seed_low: int
    seed_high: int
    offset_low: int
    offset_high: int

    @property
    def key(self) -> Hashable:
        seed, offset = self.keys.seed, self.keys.offset
        return seed is None, offset is None, self.keys.seed_stride, self.keys.offset_stride, alignment(seed, offset)


def _halves(value: Seed) -> Halves:
    if isinstance(value, Halves):
        return value
    return Halves(0, 0) if isinstance(value, torch.Tensor) else halves_of(value)


def random_of(draws: Draws) -> Random:
    """The arguments for these draws."""
    seed, offset = (x if isinstance(x, torch.Tensor) else None for x in (draws.seed, draws.offset))
    strides = (int(x is not None and x.numel() > 1) for x in (seed, offset))
    return Random(Keys(seed, offset, *strides), *_halves(draws.seed), *_halves(draws.offset))


def waits_itself(device: torch.device) -> dict[str, bool]:
    """Options of a kernel launched while the one whose results it waits for still runs; none before sm_90."""
    return {"launch_pdl": True} if arch_of(device).launches_early else {}


def splits_of(rows: int, tiles: int, programs: int) -> tuple[int, int]:
    """(splits of a row, tiles of a split), so that there are about `programs` in all and no split is empty."""
    wanted = max(1, min(tiles, -(-programs // rows)))
    per_split = -(-tiles // wanted)
    return -(-tiles // per_split), per_split


def tiles_of(vocab_size: int, cut: Cut) -> int:
    return -(-vocab_size // cut.tile)


class Stats(NamedTuple):
    """Statistics of groups, fp32 `[entries, cut.groups]` or None, and how many groups a row has."""

    group_max: torch.Tensor | None
    group_sum: torch.Tensor | None
    group_tail: torch.Tensor | None
    num_groups: int

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self[:3]


def group_stats(
    x: torch.Tensor,
    logits: bool,
    wanted: tuple[bool, ...],
    scratch: Scratch,
    rows: torch.Tensor | None = None,
    residual: Residual = NO_RESIDUAL,
) -> Stats:
    """Statistics of each row of `x`, or of the rows `rows`; wanted: maxima, sums, of probs also tails."""
    entries, vocab_size = x.shape[0] if rows is None else rows.shape[0], x.shape[1]
    cut = cut_of(vocab_size, x.element_size())
    tiles = tiles_of(vocab_size, cut)
    splits, per_split = splits_of(entries, tiles, STATS_PROGRAMS * arch_of(x.device).num_sms)
    shape = (entries, cut.groups)
    tensors = [scratch.empty(shape, torch.float32) if want else None for want in wanted]
    high, total, tail = (*tensors, None, None)[:3]
    parts = tuple(residual)
    pointers = [p for p in parts if not isinstance(p, int)]
    key = (
        x.dtype,
        x.stride(0),
        vocab_size,
        logits,
        wanted,
        cut,
        alignment(x, rows, *pointers),
        kinds_of(rows, *parts),
    )
    _stats(
        (entries * splits, 1, 1),
        key,
        (x, rows, residual, high, total, tail, x.stride(0), vocab_size, splits, per_split, logits, cut),
        x.device,
        num_warps=STATS_WARPS,
        **(REGISTERS if residual is NO_RESIDUAL else {}),
    )
    return Stats(high, total, tail, tiles * cut.tile_groups)


def kinds_of(*arguments: torch.Tensor | int | None) -> Hashable:
    """What Triton specialises these for."""
    return tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in arguments)


class Places(NamedTuple):
    """Where draws come from and go to.

    rows: `[n]`, the row each is of; None: its number. residual: what is taken off that row. tokens: `[n]`, or
    `[n, length]` with place int32 `[n]`: which of its row gets the token.
    """

    rows: torch.Tensor | None
    residual: Residual
    tokens: torch.Tensor
    place: torch.Tensor | None


def _draw_all(x: torch.Tensor, logits: bool, draws: Draws, out: Samples, scratch: Scratch) -> None:
    """One token for each sample by its weight alone."""
    per_sample = draws.indices is None or draws.num_samples <= x.shape[0]
    stats = group_stats(x, logits, (logits, True), scratch, draws.indices if per_sample else None)
    places = Places(draws.indices, NO_RESIDUAL, out.tokens, None)
    _launch_draw(x, logits, draws, stats, per_sample, places, out.valid)


def draw_into(x: torch.Tensor, draws: Draws, places: Places) -> None:
    """One token for each sample by its weight among probs `x`, less the residual."""
    stats = group_stats(x, False, (False, True), Scratch(x, None), places.rows, places.residual)
    _launch_draw(x, False, draws, stats, True, places, None)


def _launch_draw(
    x: torch.Tensor,
    logits: bool,
    draws: Draws,
    stats: Stats,
    per_sample: bool,
    places: Places,
    valid: torch.Tensor | None,
) -> None:
    early = waits_itself(x.device)
    cut, random = cut_of(x.shape[1], x.element_size()), random_of(draws)
    rows, residual, tokens, place = places
    parts = tuple(residual)
    pointers = [p for p in parts if not isinstance(p, int)]
    key = (x.dtype, x.stride(0), x.shape[1], logits, per_sample, cut, random.key, tokens.dtype, valid is None)
    key = (*key, alignment(x, rows, place, *pointers), kinds_of(rows, place, *parts))
    _draw(
        (draws.num_samples, 1, 1),
        key,
        (
            *(x, rows, residual, stats.group_max, stats.group_sum, *random, tokens, place, tokens.stride(0)),
            *(_bytes(valid), x.stride(0), x.shape[1], stats.num_groups),
            *(per_sample, logits, cut, bool(early)),
        ),
        x.device,
        num_warps=cut.num_warps,
        **early,
    )


def pointer_and_value(parameter: Parameter | None, off: float, largest: int | None = None) -> tuple[object, float]:
    """(tensor, `off`) or (None, number): whole numbers at most `largest`, so that they are of one type."""
    if isinstance(parameter, torch.Tensor):
        return parameter, off
    number = off if parameter is None else parameter
    return None, int(min(number, largest)) if largest is not None else float(number)


def slots_of(scratch: Scratch, cut: Cut, n: int) -> tuple[torch.Tensor, ...]:
    """Where `gather` puts groups, and candidates' numbers and tokens."""
    return (
        scratch.empty((n, cut.groups), torch.int32),
        scratch.empty((n, cut.candidates), torch.float32),
        scratch.empty((n, cut.candidates), torch.int32),
    )


def sample(
    x: torch.Tensor, logits: bool, filters: Filters, draws: Draws, out: Samples, buffer: torch.Tensor | None
) -> int:
    """One token for each sample among those that pass the filters; see `flashinfer.ops.sampling.sample_into`."""
    scratch = Scratch(x, buffer)
    if filters.kind == "":
        _draw_all(x, logits, draws, out, scratch)
    else:
        _draw_filtered(x, logits, filters, draws, out, scratch)
    return scratch.needed


def _draw_filtered(
    x: torch.Tensor, logits: bool, filters: Filters, draws: Draws, out: Samples, scratch: Scratch
) -> None:
    """One token for each sample among those that pass the filters."""
    early, kind, rows = waits_itself(x.device), filters.kind, draws.indices
    per_sample = rows is None or draws.num_samples <= x.shape[0]
    wanted = (True, True, kind == "p" and not logits)
    stats = group_stats(x, logits, wanted, scratch, rows if per_sample else None)
    if kind == "min_p":
        _launch_min_p(x, filters, draws, stats, per_sample, out, scratch)
        return
    num_samples, vocab_size = draws.num_samples, x.shape[1]
    cut = cut_of(vocab_size, x.element_size(), **({} if kind == "p" else {"read_per_thread": TOP_K_READ}))
    floats, ints = (scratch.empty((num_samples, STATE_FIELDS), t) for t in (torch.float32, torch.int32))
    random, tokens = random_of(draws), out.tokens
    top_k = pointer_and_value(filters.top_k, vocab_size, vocab_size)
    top_p = pointer_and_value(filters.top_p, 1.0)
    key = (x.dtype, x.stride(0), vocab_size, logits, cut, random.key, tokens.dtype, alignment(x, rows))
    filter_key = (key, kind, per_sample, out.valid is None, kinds_of(rows, top_k[0], top_p[0]))  # type: ignore
    _filter(
        (num_samples, 1, 1),
        (*filter_key, alignment(top_k[0], top_p[0])),  # type: ignore
        (
            *(x, rows, *stats.tensors, *random, *top_k, *top_p),
            *((*slots_of(scratch, cut, num_samples), floats, ints), tokens, _bytes(out.valid)),
            *(x.stride(0), vocab_size, stats.num_groups, kind, per_sample, logits, cut, bool(early)),
        ),
        x.device,
        num_warps=cut.num_warps,
        **REGISTERS,
        **early,
    )
    _launch_resolve(x, logits, kind, draws, out, (floats, ints), scratch)


def _launch_min_p(
    x: torch.Tensor, filters: Filters, draws: Draws, stats: Stats, per_sample: bool, out: Samples, scratch: Scratch
) -> None:
    early = waits_itself(x.device)
    cut, random, rows = cut_of(x.shape[1], x.element_size()), random_of(draws), draws.indices
    min_p = pointer_and_value(filters.min_p, 0.0)
    key = (x.dtype, x.stride(0), x.shape[1], cut, random.key, out.tokens.dtype, per_sample, out.valid is None)
    _min_p(
        (draws.num_samples, 1, 1),
        (*key, kinds_of(rows, min_p[0]), alignment(x, rows, min_p[0])),  # type: ignore
        (
            *(x, rows, *stats.tensors[:2], *random, *min_p, slots_of(scratch, cut, draws.num_samples)),
            *(
                out.tokens,
                _bytes(out.valid),
                x.stride(0),
                x.shape[1],
                stats.num_groups,
                per_sample,
                cut,
                MIN_P_SCAN,
                bool(early),
            ),
        ),
        x.device,
        num_warps=cut.num_warps,
        **REGISTERS,
        **early,
    )


def _bytes(flags: torch.Tensor | None) -> torch.Tensor | None:
    return None if flags is None else flags.view(torch.int8)


def _launch_resolve(
    x: torch.Tensor,
    logits: bool,
    kind: str,
    draws: Draws,
    out: Samples,
    state: tuple[torch.Tensor, ...],
    scratch: Scratch,
) -> None:
    """Draw for the rows that are left open; most rows are not, so open ones are cut finely."""
    num_samples, vocab_size, rows, tokens = draws.num_samples, x.shape[1], draws.indices, out.tokens
    early, random = waits_itself(x.device), random_of(draws)
    scan = RESOLVE_SCAN if x.stride(0) * x.element_size() % VECTOR_BYTES == 0 else RESOLVE_SCAN // 2
    splits, per_split = splits_of(
        num_samples, triton.cdiv(vocab_size, scan), RESOLVE_PROGRAMS * arch_of(x.device).num_sms
    )
    partial = scratch.empty((num_samples, splits, PART_FIELDS), torch.float32)
    found = None if kind == "p" else scratch.empty((num_samples, FOUND), torch.float32)
    block = triton.next_power_of_2(splits)
    key = (x.dtype, x.stride(0), vocab_size, logits, random.key, tokens.dtype, alignment(x, rows), scan)
    _resolve(
        (num_samples * splits, 1, 1),
        (key, kind, block, None if rows is None else rows.dtype),
        (
            *(x, rows, *random, state, partial, found, tokens, x.stride(0), vocab_size, splits, per_split),
            *(kind, block, FOUND, logits, scan, bool(early)),
        ),
        x.device,
        num_warps=RESOLVE_WARPS,
        **REGISTERS,
        **early,
    )


class Thresholds(NamedTuple):
    """For each row the key from which on numbers are kept (int32), and their weight (fp32)."""

    floors: torch.Tensor
    weights: torch.Tensor


def _apply_thresholds(out: torch.Tensor, x: torch.Tensor, found: Thresholds, logits: bool) -> None:
    num_rows, vocab_size = x.shape
    tiles = triton.cdiv(vocab_size, APPLY_TILE)
    key = (x.dtype, x.stride(0), vocab_size, logits, alignment(x, out))
    arguments = (x, out, *found, x.stride(0), vocab_size, tiles, logits, APPLY_TILE)
    _apply((num_rows * tiles, 1, 1), key, arguments, x.device, num_warps=8)


def _thresholds(x: torch.Tensor, kind: str, parameter: Parameter, logits: bool, scratch: Scratch) -> Thresholds:
    """kind: "k", "p" or "min_p", which `parameter` is."""
    top_k = kind == "k"
    num_rows, vocab_size = x.shape
    cut = cut_of(vocab_size, x.element_size())
    stats = group_stats(x, logits, (True, not logits), scratch)
    found = Thresholds(scratch.empty((num_rows,), torch.int32), scratch.empty((num_rows,), torch.float32))
    slots = slots_of(scratch, cut, num_rows)
    search = None
    if kind != "min_p":
        search = scratch.empty((num_rows, SEARCH_FIELDS), torch.int32), scratch.empty((num_rows,), torch.float32)
    pointer, value = pointer_and_value(parameter, vocab_size if top_k else 1.0, vocab_size if top_k else None)
    key = (x.dtype, x.stride(0), vocab_size, logits, cut, alignment(x))
    _threshold(
        (num_rows, 1, 1),
        (key, kind, kinds_of(pointer), alignment(pointer)),  # type: ignore
        (
            *(x, stats.group_max, stats.group_sum, pointer, value, slots, *found, search),
            *(x.stride(0), vocab_size, stats.num_groups, kind, logits, cut, SCAN),
        ),
        x.device,
        num_warps=cut.num_warps,
        **REGISTERS,
    )
    if search is not None and top_k:
        _find_kth(x, search, found, logits, scratch)
    if search is not None and not top_k:
        _find_nucleus(x, search, found, scratch)
    return found


def _find_kth(
    x: torch.Tensor, search: tuple[torch.Tensor, torch.Tensor], found: Thresholds, logits: bool, scratch: Scratch
) -> None:
    """top_k's thresholds of open rows."""
    num_rows, vocab_size = x.shape
    # What is counted as well as weighed takes more registers.
    scan = COLLECT_SCAN // 2
    splits, per_split = splits_of(num_rows, triton.cdiv(vocab_size, scan), COLLECT_PROGRAMS * arch_of(x.device).num_sms)
    partial = scratch.empty((num_rows, splits, PART_FIELDS), torch.float32)
    collected = scratch.empty((num_rows, FOUND), torch.float32)
    form = (triton.next_power_of_2(splits), FOUND, logits, scan)
    _search(
        (num_rows * splits, 1, 1),
        (x.dtype, x.stride(0), vocab_size, form, alignment(x)),
        (x, *found, search, partial, collected, x.stride(0), vocab_size, splits, per_split, *form),
        x.device,
        num_warps=COLLECT_WARPS,
        **REGISTERS,
    )


def _find_nucleus(
    x: torch.Tensor, search: tuple[torch.Tensor, torch.Tensor], found: Thresholds, scratch: Scratch
) -> None:
    """top_p's thresholds of open rows of probs."""
    num_rows, vocab_size = x.shape
    # Finer parts would leave each list so little room that chance may fill it.
    splits, per_split = splits_of(1, triton.cdiv(vocab_size, SCAN), NUCLEUS_SPLITS)
    block = triton.next_power_of_2(splits)
    collected = scratch.empty((num_rows, NUCLEUS_FOUND), torch.float32)
    sums = scratch.empty((num_rows, 3, block, NUCLEUS_LISTS), torch.float32)
    key = (x.dtype, x.stride(0), vocab_size, block, alignment(x))
    sizes, form = (x.stride(0), vocab_size, splits), (block, NUCLEUS_FOUND, NUCLEUS_LISTS, SCAN)
    arguments: tuple[object, ...] = (x, search, collected, sums, *sizes, per_split, *form)
    _collect((num_rows * splits, 1, 1), key, arguments, x.device, num_warps=NUCLEUS_LISTS // 32)
    arguments = (x, *found, search, collected, sums, *sizes, *form)
    _settle((num_rows, 1, 1), key, arguments, x.device, num_warps=16, **REGISTERS)


def keep(
    out: torch.Tensor, x: torch.Tensor, kind: str, parameter: Parameter, logits: bool, buffer: torch.Tensor | None
) -> int:
    """What passes one filter, of logits or of probs; see `flashinfer.ops.sampling.keep_into`."""
    scratch = Scratch(x, buffer)
    _apply_thresholds(out, x, _thresholds(x, kind, parameter, logits, scratch), logits)
    return scratch.needed
