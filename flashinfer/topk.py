"""The largest numbers of each row, with FlashInfer's names and signatures.

Common to all functions:

- input: `[num_rows, num_columns]`, fp32, fp16 or bf16. NaN counts as -inf.
- tie_break: which of the numbers that equal the smallest one taken are: those of low or of high index; NONE leaves it
  open (low, here).
- `deterministic` and `dsa_graph_safe` are accepted and always true: equal inputs give equal results, and a call can be
  captured in a CUDA graph.

Raises ValueError for a wrong shape, dtype, device or number.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from flashinfer.core import check
from flashinfer.core.replay import replayed
from flashinfer.ops import sampling as ops

# FlashInfer's names for implementations of `top_k_varlen` that run on every GPU; "fa2" is such a name everywhere.
VARLEN_BACKENDS = {"radix_cutlass": "fa2", "radix_filter": "fa2"}


class TopKTieBreak(IntEnum):
    """Which of equal numbers are taken."""

    NONE = 0
    SMALL = 1
    LARGE = 2


def can_implement_filtered_topk() -> bool:
    """Whether rows are selected from in one pass over them and one over what is left: here always."""
    return True


def _selected(
    x: torch.Tensor,
    k: int,
    tie_break: TopKTieBreak | int,
    windows: tuple[torch.Tensor | None, torch.Tensor] | None = None,
    in_order: bool = False,
    index_dtype: torch.dtype = torch.int32,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """windows: (starts or None, lengths)."""
    starts, lengths = windows or (None, None)
    plain = x.__class__ is torch.Tensor and x.is_cuda and x.dim() == 2
    if not plain or k.__class__ is not int or k < 1:
        _check_selection(x, k, tie_break)
    selection = ops.Selection(k, int(tie_break), index_dtype=index_dtype)
    values, indices = ops.selected_like(x, selection)
    scratch = ops.scratch_for("select", x, k) if x.is_cuda else None
    _select((values, indices), x, (starts, lengths), scratch, k, int(tie_break), index_dtype, backend)
    return ops.in_order(values, indices, int(tie_break)) if in_order else (values, indices)


def _check_selection(x: torch.Tensor, k: int, tie_break: int) -> None:
    check.tensor("input", x, dtypes=check.FLOAT_DTYPES, shape=(None, None))
    check.positive("k", k)
    check.choice("tie_break", int(tie_break), [int(t) for t in TopKTieBreak])


@replayed
def _select(
    out: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    windows: tuple[torch.Tensor | None, torch.Tensor | None],
    scratch: torch.Tensor | None,
    k: int,
    tie_break: int,
    index_dtype: torch.dtype,
    backend: str,
) -> None:
    """Check and select."""
    _check_selection(x, k, tie_break)
    checked = (_rows("row_starts", windows[0], x), _rows("lengths", windows[1], x))
    ops.select_into(*out, x, ops.Selection(k, tie_break, False, *checked, index_dtype), scratch, backend)


def _rows(name: str, values: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """int32 `[num_rows]`, or None."""
    if values is None:
        return None
    check.tensor(name, values, dtypes=(torch.int32,), shape=(x.shape[0],), like=("input", x))
    check.index_range(name, values, 0, x.shape[1] + 1)
    return values.contiguous()


def top_k(
    input: torch.Tensor,
    k: int,
    sorted: bool = False,
    deterministic: bool = False,
    tie_break: TopKTieBreak | int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values of input's dtype, int64 indices) `[num_rows, k]` of the k largest numbers of each row.

    sorted: largest first, equal ones by index, the preferred first; else in no promised order. k: at most num_columns.
    """
    check.tensor("input", input, dtypes=check.FLOAT_DTYPES, shape=(None, None))
    if isinstance(k, int) and k > input.shape[1]:
        raise ValueError(check.problem("k", k, f"at most the {input.shape[1]} columns of input", "Pass a smaller k."))
    return _selected(input, k, tie_break, in_order=sorted, index_dtype=torch.int64)


def top_k_page_table_transform(
    input: torch.Tensor,
    src_page_table: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    row_to_batch: torch.Tensor | None = None,
    deterministic: bool = False,
    tie_break: TopKTieBreak | int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
    row_starts: torch.Tensor | None = None,
    page_table_row_starts: torch.Tensor | None = None,
    *,
    page_size: int = 1,
    out: torch.Tensor | None = None,
    out_raw_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """int32 `[num_rows, k]`: where in the cache the k largest of each row's first `lengths` scores lie.

    Score j of a row is of token j: of entry `j // page_size` of its request's page table `src_page_table[request]`
    (int32), slot `j % page_size`; out gets `entry * page_size + slot`. A row of at most k scores gives all its tokens
    in order; -1 after them. row_to_batch: int32 `[num_rows]`, the request of each row, default its number. row_starts:
    int32 `[num_rows]`, the column of the first score. page_table_row_starts: int32 `[num_rows]`, the first entry of a
    row in its page table. out_raw_indices: int32 `[num_rows, k]`, gets j.
    """
    _, raw = _selected(input, k, tie_break, (row_starts, lengths))
    num_rows = input.shape[0]
    like = ("input", input)
    check.tensor("src_page_table", src_page_table, dtypes=(torch.int32,), shape=(None, None), like=like)
    check.positive("page_size", page_size)
    for name, x in (("row_to_batch", row_to_batch), ("page_table_row_starts", page_table_row_starts)):
        if x is not None:
            check.tensor(name, x, dtypes=(torch.int32, torch.int64), shape=(num_rows,), like=like)
    outputs = {"out": out, "out_raw_indices": out_raw_indices}
    for name, x in outputs.items():
        if x is not None:
            check.tensor(name, x, dtypes=(torch.int32,), shape=(num_rows, k), like=like)
    found = ops.through_page_table(raw, ops.PageTable(src_page_table, row_to_batch, page_table_row_starts, page_size))
    if out_raw_indices is not None:
        out_raw_indices.copy_(raw)
    return found if out is None else out.copy_(found)


def top_k_ragged_transform(
    input: torch.Tensor,
    offsets: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    deterministic: bool = False,
    tie_break: TopKTieBreak | int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
    row_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """int32 `[num_rows, k]`: indices of the k largest of each row's first `lengths` scores, plus the row's offset.

    offsets, lengths: int32 `[num_rows]`. A row of at most k scores gives all of them in order; -1 after them.
    row_starts: int32 `[num_rows]`, the column of the first score.
    """
    _, raw = _selected(input, k, tie_break, (row_starts, lengths))
    check.tensor("offsets", offsets, dtypes=(torch.int32,), shape=(input.shape[0],), like=("input", input))
    return ops.plus_offsets(raw, offsets)


def top_k_varlen(
    logits: torch.Tensor,
    seq_lens: torch.Tensor,
    top_k: int,
    pre_idx: torch.Tensor | None = None,
    compress_ratio: int = 1,
    next_n: int = 1,
    return_values: bool = False,
    out_indices: torch.Tensor | None = None,
    out_values: torch.Tensor | None = None,
    backend: str = "auto",
    load_balance: bool = True,
    workspace: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(int32 indices, values or None) `[num_rows, top_k]` of the largest logits of each row's part of a sequence.

    logits `[num_rows, max_seq_len]`; seq_lens int32 `[num_rows // next_n]`. Row r is position `r % next_n` of the last
    next_n of sequence `r // next_n`: it sees `(seq_len - next_n + 1 + r % next_n) // compress_ratio` logits. One with
    at most top_k gives all of them in order, -1 (and values 0) after them. out_indices int32, out_values of logits'
    dtype: get the results. pre_idx, load_balance and workspace are accepted and ignored: they change no result.
    backend: "auto", "torch", "triton", or FlashInfer's "radix_cutlass" and "radix_filter": Triton on a GPU, else torch.
    """
    check.tensor("logits", logits, dtypes=check.FLOAT_DTYPES, shape=(None, None))
    for name, number in (("next_n", next_n), ("compress_ratio", compress_ratio)):
        check.positive(name, number)
    num_rows, columns = logits.shape
    if num_rows % next_n:
        raise ValueError(
            check.problem("logits", f"{num_rows} rows", f"next_n ({next_n}) times as many", "Correct next_n.")
        )
    like = ("logits", logits)
    check.tensor("seq_lens", seq_lens, dtypes=(torch.int32,), shape=(num_rows // next_n,), like=like)
    shape = (num_rows, top_k)
    for name, out, dtype in (("out_indices", out_indices, torch.int32), ("out_values", out_values, logits.dtype)):
        if out is not None:
            check.tensor(name, out, dtypes=(dtype,), shape=shape, like=like)
    position = torch.arange(1 - next_n, 1, dtype=torch.int32, device=logits.device)
    seen = (seq_lens[:, None] + position).div(compress_ratio, rounding_mode="floor").clamp(0, columns).flatten()
    windows = (None, seen.int())
    values, indices = _selected(
        logits, top_k, TopKTieBreak.NONE, windows, backend=VARLEN_BACKENDS.get(backend, backend)
    )
    indices = indices if out_indices is None else out_indices.copy_(indices)
    if not return_values:
        return indices, None
    return indices, values if out_values is None else out_values.copy_(values)


topk = top_k
