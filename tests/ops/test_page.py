"""The paged KV cache against loops over tokens; the append on every implementation."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from flashinfer.core.select import BackendSupportedError
from flashinfer.ops import page as ops
from flashinfer.page import append_paged_kv_cache, get_batch_indices_positions, get_seq_lens
from flashinfer.testing import poisoned
from tests.ops.fp8_codes import FP8, nearest, same

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("NHD", "HND")


def int32(values: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both implementations; Triton through its interpreter where there is no GPU (tests/conftest.py sets it up)."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


@dataclass
class Batch:
    """Requests with pages in random order: kv lengths after the append, of which the last `appended` tokens are new."""

    kv_lens: list[int]
    appended: list[int]
    page_size: int
    spare_pages: int = 3

    def table(self, rng: random.Random) -> tuple[list[int], list[int], list[int]]:
        """(kv_indices, kv_indptr, kv_last_page_len)."""
        pages = [-(-n // self.page_size) for n in self.kv_lens]
        indices = rng.sample(range(sum(pages) + self.spare_pages), sum(pages))
        indptr = [sum(pages[:i]) for i in range(len(pages) + 1)]
        return indices, indptr, [(n - 1) % self.page_size + 1 if n else 0 for n in self.kv_lens]

    def new_tokens(self) -> list[tuple[int, int]]:
        """(request, position) of each row to append."""
        return [
            (i, n - a + j) for i, (n, a) in enumerate(zip(self.kv_lens, self.appended, strict=True)) for j in range(a)
        ]


MIXED = {"kv_lens": [5, 0, 1, 33, 7], "appended": [5, 0, 1, 2, 0]}


# --- get_seq_lens, get_batch_indices_positions -------------------------------------------------------------------


def test_get_seq_lens(device: str) -> None:
    indptr, last = int32([0, 2, 2, 3, 7], device), int32([3, 9, 1, 16], device)
    got = get_seq_lens(indptr, last, 16)
    assert got.dtype == torch.int32
    assert got.tolist() == [19, 0, 1, 64]
    assert get_seq_lens(indptr, int32([1, 0, 1, 1], device), 1).tolist() == [2, 0, 1, 4]
    assert get_seq_lens(indptr[:1], last[:0], 16).tolist() == []


@pytest.mark.parametrize("padding", [0, 4])
def test_get_batch_indices_positions(padding: int, device: str) -> None:
    batch = Batch(**MIXED, page_size=4)
    append_indptr = int32([0, *torch.tensor(batch.appended).cumsum(0).tolist()], device)
    nnz = sum(batch.appended) + padding
    expected = batch.new_tokens() + padding * [(-1, 0)]
    buffers = [poisoned((nnz,), torch.int32, device) for _ in range(2)]
    made = get_batch_indices_positions(append_indptr, int32(batch.kv_lens, device), nnz)
    filled = get_batch_indices_positions(append_indptr, int32(batch.kv_lens, device), nnz, *buffers)
    assert filled[0] is buffers[0] and filled[1] is buffers[1]
    for got in (made, filled):
        assert all(x.dtype == torch.int32 for x in got)
        assert list(zip(got[0].tolist(), got[1].tolist(), strict=True)) == expected


def test_batch_indices_positions_of_nothing(device: str) -> None:
    batch_indices, positions = get_batch_indices_positions(int32([0], device), int32([], device), 3)
    assert batch_indices.tolist() == [-1, -1, -1]
    assert positions.tolist() == [0, 0, 0]
    assert get_batch_indices_positions(int32([0, 0], device), int32([4], device), 0)[0].shape == (0,)


# --- append_paged_kv_cache ---------------------------------------------------------------------------------------


def expected_bytes(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` converted to `dtype`."""
    return x.to(dtype) if dtype not in FP8 or x.dtype == dtype else nearest(x, dtype)


def make_cache(shape: tuple[int, ...], layout: str, form: str, dtype: torch.dtype, device: str) -> tuple:
    """(what the caller passes, K as NHD view, V as NHD view) for `shape` (pages, page_size, heads, head_dim)."""
    pages, page_size, num_heads, head_dim = shape
    inner = (page_size, num_heads) if layout == "NHD" else (num_heads, page_size)
    if form == "tensor":
        cache = torch.randn(pages, 2, *inner, head_dim, device=device).to(dtype)
        views = cache.unbind(1)
    elif form == "tuple":
        cache = views = tuple(torch.randn(pages, *inner, head_dim, device=device).to(dtype) for _ in range(2))
    else:  # strided: K and V interleaved inside of wider heads, pages with a gap
        wide = torch.randn(pages + 1, *inner, 2, head_dim + 8, device=device).to(dtype)
        cache = views = tuple(wide[1:, :, :, i, :head_dim] for i in range(2))
    nhd = tuple(view if layout == "NHD" else view.transpose(1, 2) for view in views)
    return cache, *nhd


def expected_cache(cache: torch.Tensor, rows: torch.Tensor, tokens: list, table: tuple) -> torch.Tensor:
    indices, indptr, _ = table
    cache, page_size = cache.clone(), cache.shape[1]
    stored = expected_bytes(rows, cache.dtype)
    for row, (request, position) in enumerate(tokens):
        if request >= 0:
            cache[indices[indptr[request] + position // page_size], position % page_size] = stored[row]
    return cache


def run(rows: tuple, tokens: list, cache: object, views: tuple, table: tuple, layout: str, backend: str) -> None:
    """The public function for its own choice of implementation, the op for the other."""
    key, value = rows
    device = str(key.device)
    batch_indices, positions = (int32(list(x), device) for x in zip(*tokens, strict=True))
    indices, indptr, last_page_len = (int32(x, device) for x in table)
    if backend == ("triton" if key.is_cuda else "torch"):
        append_paged_kv_cache(
            key, value, batch_indices, positions, cache, indices, indptr, last_page_len, kv_layout=layout
        )
    else:
        ops.append(
            ops.Append(key, value, *views, ops.PageTable(batch_indices, positions, indices, indptr)), backend=backend
        )


@dataclass
class Case:
    """One append; skipped: rows with a negative batch index; strided_rows: keys and values are views."""

    batch: Batch
    num_kv_heads: int = 2
    head_dim: int = 16
    layout: str = "NHD"
    form: str = "tuple"
    row_dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32
    skipped: int = 0
    strided_rows: bool = True


def check_append(case: Case, rng: random.Random, backend: str, device: str) -> None:
    table, tokens = case.batch.table(rng), case.batch.new_tokens()
    for row in rng.sample(range(len(tokens)), case.skipped):
        tokens[row] = (-rng.randint(1, 5), rng.randint(0, 1000))
    num_kv_heads, head_dim = case.num_kv_heads, case.head_dim
    shape = (len(table[0]) + case.batch.spare_pages, case.batch.page_size, num_kv_heads, head_dim)
    cache, *views = make_cache(shape, case.layout, case.form, case.cache_dtype, device)
    wide = torch.randn(2, len(tokens), num_kv_heads + 1, head_dim + 8, device=device).to(case.row_dtype)
    rows = tuple(wide[i, :, 1:, :head_dim] for i in range(2))
    if not case.strided_rows:
        rows = tuple(x.contiguous() for x in rows)
    expected = [expected_cache(view, x, tokens, table) for view, x in zip(views, rows, strict=True)]
    run(rows, tokens, cache, tuple(views), table, case.layout, backend)
    for name, got, want in zip("KV", views, expected, strict=True):
        assert same(got, want), f"{name} cache differs"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["tensor", "tuple", "strided"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_append(rng: random.Random, backend: str, device: str, page_size: int, form: str, layout: str) -> None:
    case = Case(Batch(**MIXED, page_size=page_size), layout=layout, form=form, skipped=2)
    check_append(case, rng, backend, device)


@pytest.mark.parametrize("head_dim", [8, 24, 80, 256])
@pytest.mark.parametrize("num_kv_heads", [1, 5])
def test_append_head_shapes(rng: random.Random, backend: str, device: str, num_kv_heads: int, head_dim: int) -> None:
    case = Case(Batch(**MIXED, page_size=4), num_kv_heads, head_dim, strided_rows=False)
    check_append(case, rng, backend, device)


@pytest.mark.parametrize("cache_dtype", DTYPES + FP8)
@pytest.mark.parametrize("row_dtype", [*DTYPES, "cache"])
def test_append_dtypes(
    rng: random.Random, backend: str, device: str, row_dtype: torch.dtype | str, cache_dtype: torch.dtype
) -> None:
    rows = row_dtype if isinstance(row_dtype, torch.dtype) else cache_dtype
    case = Case(Batch([9, 3], [9, 2], page_size=4), row_dtype=rows, cache_dtype=cache_dtype, form="tensor")
    if backend == "triton" and device == "cpu" and cache_dtype == torch.bfloat16 != rows:
        with pytest.raises(BackendSupportedError, match="interpreter truncates"):
            check_append(case, rng, backend, device)
        return
    check_append(case, rng, backend, device)


@pytest.mark.parametrize("cache_dtype", FP8)
def test_append_fp8_of_every_kind_of_number(backend: str, device: str, cache_dtype: torch.dtype) -> None:
    """Every fp8 value, every midpoint between two, their fp32 neighbours, saturation, subnormals, infinities, NaN."""
    values = torch.arange(128, dtype=torch.uint8).view(cache_dtype).float()
    values = values[values.isfinite()]
    middle = (values[1:] + values[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.tensor(x)) for x in (torch.inf, 0.0))
    special = torch.tensor([values[-1] * 1.0001, values[-1] * 1.5, 3e38, torch.inf, torch.nan, 1e-45, 1e-20])
    positive = torch.cat([values, middle, up, down, special])
    x = torch.cat([positive, -positive])
    x = torch.nn.functional.pad(x, (0, -x.numel() % 8)).view(-1, 1, 8).to(device)
    k, v = (torch.zeros(len(x), 1, 1, 8, device=device).to(cache_dtype) for _ in range(2))
    tokens, table = [(0, i) for i in range(len(x))], (list(range(len(x))), [0, len(x)], [1])
    run((x, -x), tokens, (k, v), (k, v), table, "NHD", backend)
    assert same(k[:, 0], expected_bytes(x, cache_dtype))
    assert same(v[:, 0], expected_bytes(-x, cache_dtype))


def test_append_of_different_head_dims(backend: str, device: str) -> None:
    """K of 24 and V of 16 components, as in head_dim_qk != head_dim_vo."""
    key, value = torch.randn(3, 2, 24, device=device), torch.randn(3, 2, 16, device=device)
    k, v = torch.zeros(4, 2, 2, 24, device=device), torch.zeros(4, 2, 2, 16, device=device)
    run((key, value), [(0, 0), (0, 1), (0, 2)], (k, v), (k, v), ([3, 1], [0, 2], [1]), "NHD", backend)
    assert torch.equal(k[3], key[:2]) and torch.equal(k[1, 0], key[2])
    assert torch.equal(v[3], value[:2]) and torch.equal(v[1, 0], value[2])
    assert k[[0, 2]].count_nonzero() == 0 and v[1, 1].count_nonzero() == 0


@pytest.mark.parametrize("form", ["tensor", "tuple"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_without_page_dimension(rng: random.Random, device: str, layout: str, form: str) -> None:
    """Caches without the token dimension have pages of one token, in both layouts alike."""
    key, value = torch.randn(2, 5, 3, 8, device=device)
    cache = torch.zeros(9, 2, 3, 8, device=device)
    where = rng.sample(range(9), 5)
    indices, indptr = int32(where, device), int32([0, 5], device)
    passed = cache if form == "tensor" else cache.unbind(1)
    tokens = int32([0, 0, 0, 0, 0], device), int32([0, 1, 2, 3, 4], device)
    append_paged_kv_cache(key, value, *tokens, passed, indices, indptr, int32([1], device), layout)
    assert torch.equal(cache[where], torch.stack([key, value], dim=1))
    assert cache.any(dim=-1).sum() == 5 * 2 * 3


def test_append_nothing(backend: str, device: str) -> None:
    """No rows; rows that are all skipped; all skipped and no pages in use."""
    k, v = torch.randn(2, 3, 4, 2, 8, device=device)
    before = k.clone(), v.clone()
    rows = torch.randn(2, 4, 2, 8, device=device)
    skip, empty = int32([-1, -1, -7, -1], device), int32([], device)
    indices, indptr = int32([1], device), int32([0, 1], device)
    cases = [
        (rows[:, :0], empty, empty, indices, indptr),
        (rows, skip, int32([0, 9, 0, 5], device), indices, indptr),
        (rows, skip, int32([0, 9, 0, 5], device), empty, int32([0, 0], device)),
    ]
    for (key, value), batch_indices, positions, pages, ptr in cases:
        ops.append(ops.Append(key, value, k, v, ops.PageTable(batch_indices, positions, pages, ptr)), backend=backend)
        append_paged_kv_cache(key, value, batch_indices, positions, (k, v), pages, ptr, int32([1], device))
        assert torch.equal(k, before[0]) and torch.equal(v, before[1])


def test_append_with_indptr_into_a_larger_table(backend: str, device: str) -> None:
    """kv_indptr need not start at 0, nor kv_indices end at its last entry."""
    key, value = torch.randn(2, 1, 2, 8, device=device)
    k, v = torch.zeros(2, 6, 4, 2, 8, device=device)
    table = ([5, 5, 3, 4, 5], [2, 4], [1])
    run((key, value), [(0, 4)], (k, v), (k, v), table, "NHD", backend)
    assert torch.equal(k[4, 0], key[0]) and torch.equal(v[4, 0], value[0])
    assert k.any(dim=-1).sum() == 2


def test_append_past_2_31_elements(backend: str, device: str) -> None:
    """Page 4 of 2^30 elements begins at element 2^32, which is 0 in 32 bits; on the CPU most of it is never touched."""
    size, dtype = 2**32 + 64, FP8[0]
    if device == "cpu":
        data = [torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype) for _ in range(2)]
    else:
        data = list(torch.zeros(2, size, dtype=torch.uint8, device=device).view(dtype))
    views = tuple(x.as_strided((5, 1, 1, 32), (2**30, 32, 32, 1)) for x in data)
    rows = tuple(torch.randint(1, 100, (1, 1, 32), dtype=torch.uint8, device=device).view(dtype) for _ in range(2))
    run(rows, [(0, 0)], views, views, ([4], [0, 1], [1]), "NHD", backend)
    for x, row in zip(data, rows, strict=True):
        x, row = x.view(torch.uint8), row.view(torch.uint8)
        assert torch.equal(x[2**32 : 2**32 + 32], row[0, 0])
        assert not x[:64].any() and not x[2**32 + 32 :].any()


@pytest.mark.gpu
def test_no_host_sync(backend: str) -> None:
    batch = Batch(**MIXED, page_size=4)
    table = [int32(x, "cuda") for x in batch.table(random.Random(0))]
    nnz = sum(batch.appended)
    append_indptr = int32([0, *torch.tensor(batch.appended).cumsum(0).tolist()], "cuda")
    cache, rows = torch.zeros(30, 2, 4, 2, 16, device="cuda"), torch.randn(2, nnz + 3, 2, 16, device="cuda")

    def step() -> None:
        lengths = get_seq_lens(table[1], table[2], batch.page_size)
        where = get_batch_indices_positions(append_indptr, lengths, nnz + 3)
        append_paged_kv_cache(*rows, *where, cache, *table)
        ops.append(ops.Append(*rows, *cache.unbind(1), ops.PageTable(*where, *table[:2])), backend=backend)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- errors ------------------------------------------------------------------------------------------------------


def arguments(device: str) -> dict:
    return {
        "append_key": torch.randn(3, 2, 8, device=device),
        "append_value": torch.randn(3, 2, 8, device=device),
        "batch_indices": int32([0, 0, 1], device),
        "positions": int32([0, 1, 2], device),
        "paged_kv_cache": torch.randn(5, 2, 4, 2, 8, device=device),
        "kv_indices": int32([4, 2], device),
        "kv_indptr": int32([0, 1, 2], device),
        "kv_last_page_len": int32([2, 3], device),
    }


def changed(device: str, **changes: object) -> None:
    append_paged_kv_cache(**{**arguments(device), **changes})


def test_append_errors(device: str) -> None:
    given = arguments(device)
    key, cache = given["append_key"], given["paged_kv_cache"]
    k, v = cache.unbind(1)
    with pytest.raises(KeyError, match=r"kv_layout: got 'NDH'"):
        changed(device, kv_layout="NDH")
    with pytest.raises(TypeError, match=r"append_key: got NoneType"):
        changed(device, append_key=None)
    with pytest.raises(ValueError, match=r"append_key: got 2 dimensions"):
        changed(device, append_key=key[0])
    with pytest.raises(ValueError, match=r"append_key: got dtype torch.int32"):
        changed(device, append_key=key.int(), append_value=key.int())
    with pytest.raises(ValueError, match=r"append_key: got dtype torch.float8_e5m2"):
        changed(device, append_key=key.to(FP8[1]), append_value=key.to(FP8[1]))
    with pytest.raises(ValueError, match=r"append_key: got strides.*innermost stride must be 1"):
        changed(device, append_key=torch.randn(3, 8, 2, device=device).transpose(1, 2))
    with pytest.raises(ValueError, match=r"append_value: got shape \[2, 2, 8\]"):
        changed(device, append_value=key[:2])
    with pytest.raises(ValueError, match=r"append_value: got dtype torch.float16"):
        changed(device, append_value=key.half())
    with pytest.raises(ValueError, match=r"append_value: got a tensor on meta while append_key is on"):
        changed(device, append_value=key.to("meta"))
    with pytest.raises(ValueError, match=r"K cache: got shape \[5, 4, 2, 8\], expected shape \[5, 4, 1, 8\]"):
        changed(device, append_key=key[:, :1], append_value=key[:, :1])
    with pytest.raises(ValueError, match=r"K cache: got a tensor on meta"):
        changed(device, paged_kv_cache=cache.to("meta"))
    with pytest.raises(ValueError, match=r"K cache: got dtype torch.int8"):
        changed(device, paged_kv_cache=cache.to(torch.int8))
    with pytest.raises(ValueError, match=r"K cache: got strides.*innermost stride must be 1"):
        changed(device, paged_kv_cache=torch.randn(5, 2, 4, 2, 16, device=device)[..., ::2])
    with pytest.raises(ValueError, match=r"V cache: got dtype torch.float16"):
        changed(device, paged_kv_cache=(k, v.half()))
    with pytest.raises(ValueError, match=r"V cache: got shape \[4, 4, 2, 8\]"):
        changed(device, paged_kv_cache=(k, v[:4]))
    with pytest.raises(ValueError, match=r"K and V caches must have identical strides"):
        changed(device, paged_kv_cache=(k, v.contiguous()))


def test_append_index_errors(device: str) -> None:
    given = arguments(device)
    for name in ("batch_indices", "positions", "kv_indices", "kv_indptr"):
        with pytest.raises(ValueError, match=rf"{name}: got dtype torch.int64, expected torch.int32"):
            changed(device, **{name: given[name].long()})
        with pytest.raises(ValueError, match=rf"{name}: got a tensor on meta while append_key is on"):
            changed(device, **{name: given[name].to("meta")})
        with pytest.raises(ValueError, match=rf"{name}: got 2 dimensions"):
            changed(device, **{name: given[name][None]})
        with pytest.raises(ValueError, match=rf"{name}: got stride 2, expected a contiguous tensor"):
            changed(device, **{name: given[name].repeat_interleave(2)[::2]})
    with pytest.raises(ValueError, match=r"positions: got shape \[2\], expected shape \[3\]"):
        changed(device, positions=given["positions"][:2])
    with pytest.raises(ValueError, match=r"kv_last_page_len: got shape \[1\], expected shape \[2\]"):
        changed(device, kv_last_page_len=given["kv_last_page_len"][:1])


def test_append_range_errors() -> None:
    """What only the host can see is checked on the host, and nothing is written then."""
    given = arguments("cpu")
    before = given["paged_kv_cache"].clone()
    cases = {
        r"batch_indices: got values from 0 to 2, expected values in \[0, 2\)": {"batch_indices": int32([0, 0, 2])},
        r"positions: got values from -1 to 2": {"positions": int32([0, -1, 2])},
        r"positions: got position 4 of request 0, expected positions inside": {"positions": int32([0, 4, 2])},
        r"kv_indices: got values from 2 to 5, expected values in \[0, 5\)": {"kv_indices": int32([5, 2])},
        r"kv_indptr: got values from 0 to 3, expected values in \[0, 3\)": {"kv_indptr": int32([0, 1, 3])},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            append_paged_kv_cache(**{**given, **change})
    assert torch.equal(given["paged_kv_cache"], before)


def test_index_function_errors(device: str) -> None:
    indptr, lens = int32([0, 2, 3], device), int32([2, 1], device)
    with pytest.raises(ValueError, match=r"kv_indptr: got dtype torch.int64"):
        get_seq_lens(indptr.long(), lens, 4)
    with pytest.raises(ValueError, match=r"kv_last_page_len: got shape \[1\]"):
        get_seq_lens(indptr, lens[:1], 4)
    with pytest.raises(ValueError, match=r"kv_last_page_len: got a tensor on meta"):
        get_seq_lens(indptr, lens.to("meta"), 4)
    with pytest.raises(ValueError, match=r"page_size: got 0"):
        get_seq_lens(indptr, lens, 0)
    with pytest.raises(ValueError, match=r"append_indptr: got dtype torch.float32"):
        get_batch_indices_positions(indptr.float(), lens, 3)
    with pytest.raises(ValueError, match=r"append_indptr: got shape \[0\]"):
        get_batch_indices_positions(indptr[:0], lens[:0], 3)
    with pytest.raises(ValueError, match=r"seq_lens: got shape \[1\], expected shape \[2\]"):
        get_batch_indices_positions(indptr, lens[:1], 3)
    with pytest.raises(ValueError, match=r"nnz: got -1"):
        get_batch_indices_positions(indptr, lens, -1)
    with pytest.raises(ValueError, match=r"batch_indices: got shape \[2\], expected shape \[3\]"):
        get_batch_indices_positions(indptr, lens, 3, batch_indices=lens)
    with pytest.raises(ValueError, match=r"positions: got dtype torch.int64"):
        get_batch_indices_positions(indptr, lens, 3, positions=indptr.long())


def test_index_function_range_errors() -> None:
    with pytest.raises(ValueError, match=r"append_indptr: got values from 0 to 3, expected values in \[0, 3\)"):
        get_batch_indices_positions(int32([0, 3]), int32([3]), 2)
    with pytest.raises(ValueError, match=r"kv_indptr: got values that do not rise from 0"):
        get_seq_lens(int32([0, 3, 1]), int32([1, 1]), 4)


def test_unknown_backend(device: str) -> None:
    key = torch.randn(1, 1, 8, device=device)
    cache = torch.zeros(1, 1, 1, 8, device=device)
    tensors = ops.Append(key, key, cache, cache, ops.PageTable(*(int32(x, device) for x in ([0], [0], [0], [0, 1]))))
    with pytest.raises(ValueError, match=r"backend: got 'cuda', expected one of 'auto', 'triton', 'torch'"):
        ops.append(tensors, backend="cuda")
