"""The schedule of attention, on ints: the numpy twin of the device planner (`device/planner.py`).

Work is counted in KV tiles. A *record* is one query tile of one request, `block_m` packed rows (queries times heads of
a group) against the KV tiles its variant's bounds leave; every record stands once for each KV head. The records of all
requests, laid end to end (record, then head, then KV tile), are cut into equal contiguous shares, one a program
(stream-K: Osama et al., arXiv 2301.03598). At most two of a program's tiles are shared with others. To begin and end a
query tile costs time too: each counts as `item_cost` KV tiles more, laid before its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flashinfer.ops.attention.variant import Variant, clamped_bounds

Ints = npt.NDArray[np.int64]

# Columns of a record: request, query tile in the request, first KV tile, KV tiles, kv_len, first entry of the page
# table (first token if ragged), first query row, qo_len.
RECORD_FIELDS = 8
# Columns of a share: the fields of its first record, then where it begins, where that record begins, the record's
# number, cost of a share (floor), how many shares have one more.
SHARE_FIELDS = 16


@dataclass(frozen=True)
class Tiling:
    """How a problem is cut: `block_m` packed rows, `block_n` tokens, `num_programs` equal shares.

    item_cost: what a query tile costs besides its KV tiles, in KV tiles.
    """

    block_m: int
    block_n: int
    num_programs: int
    item_cost: int


class Lengths(NamedTuple):
    """Host index arrays of a batch, int64: qo_indptr, kv_indptr (pages) `[batch + 1]`, kv_len `[batch]` in tokens."""

    qo_indptr: Ints
    kv_indptr: Ints
    kv_len: Ints


class Schedule(NamedTuple):
    """first `[records + 1]`: cost before each record; records `[records, 8]`; shares `[programs + 1, 16]`; int64."""

    first: Ints
    records: Ints
    shares: Ints


def schedule(tiling: Tiling, num_kv_heads: int, group_size: int, lengths: Lengths, variant: Variant) -> Schedule:
    """Records and shares of a batch; agrees with the device planner in every integer."""
    qo_len = np.diff(lengths.qo_indptr)
    q_tiles = -(-qo_len * group_size // tiling.block_m)
    request = np.repeat(np.arange(len(qo_len)), q_tiles)
    q_tile = np.arange(len(request)) - np.repeat(np.cumsum(q_tiles) - q_tiles, q_tiles)
    rows, kv_len = qo_len[request], lengths.kv_len[request]
    q_lo = q_tile * tiling.block_m // group_size
    q_hi = np.minimum(((q_tile + 1) * tiling.block_m - 1) // group_size + 1, rows)
    lo, hi, _, _ = clamped_bounds(variant, q_lo, q_hi, rows, kv_len, np.maximum, np.minimum)
    kv_tile = np.where(hi > lo, lo // tiling.block_n, 0)
    # A record that sees nothing still costs one tile: its zeros have to be written.
    kv_tiles = np.where(hi > lo, -(-hi // tiling.block_n) - kv_tile, 1)
    first = np.concatenate([[0], np.cumsum((kv_tiles + tiling.item_cost) * num_kv_heads)])
    fields = (request, q_tile, kv_tile, kv_tiles, kv_len, lengths.kv_indptr[request], lengths.qo_indptr[request], rows)
    records = np.stack(fields, axis=1)
    return Schedule(first, records, _shares(first, records, tiling))


def _shares(first: Ints, records: Ints, tiling: Tiling) -> Ints:
    """The cut into equal shares; row c speaks of program c's first tile, the last row of the end."""
    total, num_records = int(first[-1]), len(first) - 1
    floor, extra = divmod(total, tiling.num_programs)
    program = np.arange(tiling.num_programs + 1)
    begin = program * floor + np.minimum(program, extra)
    record = np.clip(np.searchsorted(first[:-1], begin, side="right") - 1, 0, max(num_records - 1, 0))
    table = np.zeros((tiling.num_programs + 1, SHARE_FIELDS), dtype=np.int64)
    if num_records:
        table[:, :RECORD_FIELDS] = records[record]
    columns = (begin, first[record], record, np.full_like(begin, floor), np.full_like(begin, extra))
    table[:, RECORD_FIELDS : RECORD_FIELDS + len(columns)] = np.stack(columns, axis=1)
    return table


def owner(place: int, floor: int, extra: int) -> int:
    """The program whose share holds `place`, in closed form: `extra` shares of floor + 1, then shares of floor."""
    larger = extra * (floor + 1)
    return place // (floor + 1) if place < larger else extra + (place - larger) // max(floor, 1)
