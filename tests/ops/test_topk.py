"""top_k and its transforms: values, tie rules, windows, page tables, errors; Triton on a GPU, torch on the CPU."""

from __future__ import annotations

import pytest
import torch

import flashinfer
from flashinfer.topk import TopKTieBreak, top_k, top_k_page_table_transform, top_k_ragged_transform, top_k_varlen, topk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 17, 17), (1, 5000, 64), (0, 9, 2), (4, 3001, 2048)])
def test_top_k(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    rows, columns, k = shape
    x = torch.randn(rows, columns, device=device).to(dtype)
    expected = x.topk(k).values
    values, indices = top_k(x, k, sorted=True)
    assert values.dtype == dtype and indices.dtype == torch.int64
    assert torch.equal(values, expected)
    assert torch.equal(x.gather(1, indices), values)
    values, indices = top_k(x, k)
    assert torch.equal(values.sort(descending=True).values, expected)
    assert torch.equal(x.gather(1, indices), values)
    assert torch.equal(indices.sort().values.diff() > 0, torch.ones(rows, k - 1, dtype=torch.bool, device=device))


def test_ties(device: str) -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0]], device=device)
    for tie_break, expected in ((TopKTieBreak.SMALL, [1, 2]), (TopKTieBreak.LARGE, [2, 4])):
        assert top_k(x, 2, tie_break=tie_break)[1].sort().values.tolist() == [expected]
    assert top_k(x, 4, sorted=True, tie_break=TopKTieBreak.SMALL)[1].tolist() == [[1, 2, 4, 3]]
    assert top_k(x, 4, sorted=True, tie_break=TopKTieBreak.LARGE)[1].tolist() == [[4, 2, 1, 5]]


def test_nan_and_infinities(device: str) -> None:
    x = torch.tensor([[torch.nan, -torch.inf, 1.0, torch.inf, -torch.inf]], device=device)
    values, indices = top_k(x, 2, sorted=True)
    assert values.tolist() == [[torch.inf, 1.0]] and indices.tolist() == [[3, 2]]
    assert len(set(top_k(x, 5)[1][0].tolist())) == 5


def test_ragged_transform(device: str) -> None:
    x = torch.randn(4, 300, device=device)
    lengths = torch.tensor([0, 7, 300, 290], dtype=torch.int32, device=device)
    offsets = torch.tensor([5, 100, 1000, 0], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 290, 0, 10], dtype=torch.int32, device=device)
    got = top_k_ragged_transform(x, offsets, lengths, 8, row_starts=starts)
    assert got.dtype == torch.int32
    assert (got[0] == -1).all()
    assert got[1].tolist() == [*range(100, 107), -1]
    assert set(got[2].tolist()) == set((x[2].topk(8).indices + 1000).tolist())
    assert set(got[3].tolist()) == set(x[3, 10:].topk(8).indices.tolist())


def test_more_wanted_than_there_are_columns(device: str) -> None:
    x = torch.randn(2, 5, device=device)
    lengths = torch.tensor([5, 3], dtype=torch.int32, device=device)
    got = top_k_ragged_transform(x, torch.zeros_like(lengths), lengths, 8)
    assert got.tolist() == [[0, 1, 2, 3, 4, -1, -1, -1], [0, 1, 2, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize("page_size", [1, 4])
def test_page_table_transform(page_size: int, device: str) -> None:
    x = torch.randn(5, 64, device=device)
    lengths = torch.tensor([0, 3, 64, 40, 8], dtype=torch.int32, device=device)
    row_to_batch = torch.tensor([0, 0, 1, 1, 0], dtype=torch.int32, device=device)
    pages = torch.randperm(200, device=device)[:160].view(2, 80).int()
    raw = torch.empty(5, 8, dtype=torch.int32, device=device)
    out = torch.empty_like(raw)
    first = torch.tensor([0, 0, 3, 0, 1], dtype=torch.int32, device=device)
    got = top_k_page_table_transform(
        x,
        pages,
        lengths,
        8,
        row_to_batch,
        page_table_row_starts=first,
        page_size=page_size,
        out=out,
        out_raw_indices=raw,
    )
    assert got is out
    for row in range(5):
        chosen = x[row, : lengths[row]].topk(min(8, int(lengths[row]))).indices.tolist()
        expected = {
            int(pages[row_to_batch[row], first[row] + token // page_size]) * page_size + token % page_size
            for token in chosen
        }
        assert set(out[row].tolist()) - {-1} == expected
        assert set(raw[row].tolist()) - {-1} == set(chosen)
    assert raw[1].tolist() == [0, 1, 2, -1, -1, -1, -1, -1]


@pytest.mark.parametrize(("next_n", "compress_ratio"), [(1, 1), (3, 1), (2, 4)])
def test_varlen(next_n: int, compress_ratio: int, device: str) -> None:
    """Rows of one sequence see one position more each; positions that are compressed count together."""
    seq_lens = torch.tensor([200, 40, 3, 1000], dtype=torch.int32, device=device)
    x = torch.randn(4 * next_n, 256, device=device)
    out = torch.empty(4 * next_n, 16, dtype=torch.int32, device=device)
    indices, values = top_k_varlen(
        x, seq_lens, 16, compress_ratio=compress_ratio, next_n=next_n, return_values=True, out_indices=out
    )
    assert indices is out and values is not None
    for row in range(4 * next_n):
        seen = (int(seq_lens[row // next_n]) - next_n + 1 + row % next_n) // compress_ratio
        seen = min(max(seen, 0), 256)
        expected = x[row, :seen].topk(min(16, seen))
        count = len(expected.indices)
        assert set(indices[row, :count].tolist()) == set(expected.indices.tolist())
        assert torch.equal(values[row, :count].sort(descending=True).values, expected.values)
        assert (indices[row, count:] == -1).all() and not values[row, count:].any()
    assert top_k_varlen(x, seq_lens, 16, next_n=next_n, backend="radix_cutlass")[1] is None


def test_aliases() -> None:
    assert topk is top_k is flashinfer.top_k


def test_errors(device: str) -> None:
    x = torch.rand(2, 6, device=device)
    lengths = torch.ones(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"k: got 7, expected at most the 6 columns"):
        top_k(x, 7)
    with pytest.raises(ValueError, match=r"k: got 0, expected an int of at least 1"):
        top_k(x, 0)
    with pytest.raises(ValueError, match=r"tie_break: got 3, expected one of 0, 1, 2"):
        top_k(x, 2, tie_break=3)
    with pytest.raises(ValueError, match=r"input: got dtype torch.float64"):
        top_k(x.double(), 2)
    with pytest.raises(ValueError, match=r"lengths: got dtype torch.int64"):
        top_k_ragged_transform(x, lengths, lengths.long(), 2)
    with pytest.raises(ValueError, match=r"offsets: got shape \[1\]"):
        top_k_ragged_transform(x, lengths[:1], lengths, 2)
    with pytest.raises(ValueError, match=r"logits: got 2 rows, expected next_n \(3\) times as many"):
        top_k_varlen(x, lengths, 2, next_n=3)
    with pytest.raises(ValueError, match=r"seq_lens: got shape \[2\]"):
        top_k_varlen(x, lengths, 2, next_n=2)
    with pytest.raises(ValueError, match=r"backend: got 'gvr'"):
        top_k_varlen(x, lengths, 2, backend="gvr")
    with pytest.raises(ValueError, match=r"src_page_table: got 1 dimensions"):
        top_k_page_table_transform(x, lengths, lengths, 2)
    with pytest.raises(ValueError, match=r"out: got shape"):
        top_k_page_table_transform(
            x, lengths[None], lengths, 2, out=torch.empty(2, 3, dtype=torch.int32, device=device)
        )
