"""Rotation with rounding to fp8, with and without pages; per-head RMSNorm with rotation; compilation and graphs."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch

from flashinfer import rope
from flashinfer.testing import assert_close_to_oracle
from tests.ops.backends import IMPLEMENTATIONS, force
from tests.ops.fp8_codes import FP8, assert_rounded, same

# Rotation in fp32 and a factor: two products and a sum of components of a few units each, and one product more.
NOISE = 8 * torch.finfo(torch.float32).eps
MAX_POSITION = 200


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test on every implementation, through the public functions."""
    return force(monkeypatch, "rope", request.param)


def table(rotary_dim: int, device: str) -> torch.Tensor:
    """fp32 cosines and sines of MAX_POSITION positions."""
    frequency = 1e4 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angle = torch.arange(MAX_POSITION, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float().to(device)


def rotated(x: torch.Tensor, cos_sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """The first components of `x` `[nnz, heads, dim]` turned by `cos_sin` `[nnz, rotary_dim]`, in x's dtype."""
    rotary_dim = cos_sin.shape[-1]
    head, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    a, b = head.chunk(2, dim=-1) if is_neox else head.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (y[:, None].to(x.dtype) for y in cos_sin.chunk(2, dim=-1))
    new = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.cat(new, dim=-1) if is_neox else torch.stack(new, dim=-1).flatten(-2)
    return torch.cat([joined, rest], dim=-1)


def parts(nnz: int, heads: tuple[int, ...], dim: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A view into a wider buffer."""
    return torch.randn(nnz, *heads, dim + 8, device=device).to(dtype)[..., :dim]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", FP8)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("num_heads", "dims"), [((4, 2), (32, 16)), ((3, None), (16, 40)), ((5, 5), (24, 0))])
def test_quantize(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    is_neox: bool,
    num_heads: tuple[int, int | None],
    dims: tuple[int, int],
    device: str,
) -> None:
    """num_heads of k None: two dimensions, as in latent attention."""
    nnz = 7
    heads = (num_heads[0],), () if num_heads[1] is None else (num_heads[1],)
    q_rope, k_rope = (parts(nnz, h, dims[0], dtype, device) for h in heads)
    q_nope, k_nope = (parts(nnz, h, dims[1], dtype, device) if dims[1] else None for h in heads)
    positions = torch.randint(0, MAX_POSITION, (nnz,), device=device)
    cache, scales = table(dims[0], device), (0.7, 3.0)
    inputs = (q_rope, k_rope, q_nope, k_nope)
    outs = rope.rope_quantize_fp8(*inputs, cache, positions, is_neox, out_dtype, *scales)
    for i, (x, out) in enumerate(zip(inputs, outs, strict=True)):
        assert out.dtype == out_dtype
        if x is None:
            assert out.shape == (nnz, *heads[i % 2], 0)
            continue
        exact = x.double().reshape(nnz, -1, x.shape[-1])
        if i < 2:
            exact = rotated(exact, cache[positions].double(), is_neox)
        assert_rounded(out, exact.reshape(out.shape) * scales[i % 2], NOISE)
    given = [torch.zeros(out.shape, dtype=out_dtype, device=device) for out in outs]
    filled = rope.mla_rope_quantize_fp8(
        *inputs,
        cache,
        positions.int(),
        is_neox,
        None,
        *scales,
        *given[:2],
        *(x if x.numel() else None for x in given[2:]),
    )
    assert filled[0] is given[0] and filled[1] is given[1]
    assert all(same(x, y) for x, y in zip(filled, outs, strict=True))


def test_quantize_saturates_and_keeps_nan(device: str) -> None:
    q = torch.full((2, 1, 16), 60000.0, dtype=torch.float16, device=device)
    q[0, 0, 3] = torch.nan
    positions = torch.zeros(2, dtype=torch.int32, device=device)
    outs = rope.rope_quantize_fp8(q, q, q, q, table(16, device), positions, quant_scale_q=-1.0, quant_scale_kv=2.0)
    for out, limit in zip(outs, (-448.0, 448.0, -448.0, 448.0), strict=True):
        value = out.float()
        assert value[0, 0, 3].isnan() and value[1].eq(limit).all()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("out_dtype", FP8)
@pytest.mark.parametrize("dims", [(32, 16), (16, 0)])
def test_append(rng: random.Random, layout: str, out_dtype: torch.dtype, dims: tuple[int, int], device: str) -> None:
    """Keys and values land where the page table says, what is skipped stays, and q is what it is without pages."""
    nnz, num_heads, page_size, width = 6, (4, 2), 4, sum(dims)
    q_rope, q_nope = (parts(nnz, (num_heads[0],), dim, torch.float16, device) for dim in dims)
    k_rope, k_nope = (parts(nnz, (num_heads[1],), dim, torch.float16, device) for dim in dims)
    v = parts(nnz, (num_heads[1],), width, torch.float16, device)
    positions = torch.randint(0, MAX_POSITION, (nnz,), device=device, dtype=torch.int32)
    inner = (page_size, num_heads[1]) if layout == "NHD" else (num_heads[1], page_size)
    caches = tuple(torch.randn(7, *inner, width, device=device).to(out_dtype) for _ in range(2))
    expected = [x.clone() if layout == "NHD" else x.clone().transpose(1, 2) for x in caches]
    pages = rng.sample(range(7), 4)
    tokens = [(0, 1), (1, 0), (-2, 5), (1, 3), (1, 4), (0, 2)]
    where = [torch.tensor(x, dtype=torch.int32, device=device) for x in zip(*tokens, strict=True)]
    indices, indptr = (torch.tensor(x, dtype=torch.int32, device=device) for x in (pages, [0, 2, 4]))
    call = partial(rope.rope_quantize_fp8, q_rope, k_rope, q_nope, k_nope, table(dims[0], device), positions)
    q_rope_out, k_rope_out, q_nope_out, k_nope_out = call(True, out_dtype, 0.5, 2.0)
    v_out = rope.rope_quantize_fp8(v, v, None, None, table(width, device), 0 * positions, True, out_dtype, 1.0, 2.0)[1]
    stored = torch.cat([k_rope_out.float(), k_nope_out.float()], dim=-1).to(out_dtype), v_out
    for want, new in zip(expected, stored, strict=True):
        for row, (request, position) in enumerate(tokens):
            if request >= 0:
                want[pages[2 * request + position // page_size], position % page_size] = new[row]
    got = rope.rope_quantize_fp8_append_paged_kv_cache(
        q_rope, k_rope, q_nope, k_nope, v, table(dims[0], device), positions, caches, indices, indptr, *where,
        True, out_dtype, 0.5, 2.0, page_size, layout,
    )  # fmt: skip
    assert same(got[0], q_rope_out) and same(got[1], q_nope_out)
    for cache, want in zip(caches, expected, strict=True):
        assert same(cache if layout == "NHD" else cache.transpose(1, 2), want)


def test_append_mla(device: str) -> None:
    nnz, dims, page_size = 4, (16, 40), 2
    q_rope, q_nope = (parts(nnz, (6,), dim, torch.float16, device) for dim in dims)
    k_rope, k_nope = (parts(nnz, (), dim, torch.float16, device) for dim in dims)
    positions = torch.tensor([5, 0, 7, 1], device=device)
    caches = [torch.randn(3, page_size, dim, device=device).to(FP8[0]) for dim in dims[::-1]]
    expected = [x.clone() for x in caches]
    where = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, -1, 0, 0], [0, 9, 1, 2])]
    indices, indptr = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([2, 0], [0, 2]))
    outs = rope.rope_quantize_fp8(q_rope, k_rope, q_nope, k_nope, table(16, device), positions)
    for want, new in zip(expected, (outs[3], outs[1]), strict=True):
        want[2, 0], want[2, 1], want[0, 0] = new[0], new[2], new[3]
    got = rope.rope_quantize_fp8_append_paged_kv_cache(
        q_rope, k_rope, q_nope, k_nope, None, table(16, device), positions, tuple(caches), indices, indptr, *where,
        page_size=page_size,
    )  # fmt: skip
    assert same(got[0], outs[0]) and same(got[1], outs[2])
    assert all(same(x, y) for x, y in zip(caches, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "num_heads"), [(64, 64, (4, 2)), (40, 16, (3, 1)), (24, 24, (9, 9))]
)
def test_qk_norm(
    dtype: torch.dtype, is_neox: bool, head_dim: int, rotary_dim: int, num_heads: tuple[int, int], device: str
) -> None:
    nnz, eps = 6, 1e-5
    fused = torch.randn(nnz, sum(num_heads), head_dim + 8, device=device).to(dtype)[..., :head_dim]
    q, k = fused.split(list(num_heads), dim=1)
    weights = [(torch.randn(head_dim, device=device) / 4 + 1).to(dtype) for _ in range(2)]
    cache = table(rotary_dim, device)
    positions = torch.randint(0, MAX_POSITION, (nnz,), device=device)
    results = {}
    for wide in (torch.float64, dtype):
        for name, x, weight in zip("qk", (q, k), weights, strict=True):
            x = x.to(wide)
            # The fused op rounds once, at the end: so does its twin in fp32, and only then.
            inner = x.double() if wide == torch.float64 else x.float()
            normed = inner * torch.rsqrt(inner.square().mean(-1, keepdim=True) + eps) * weight.to(inner.dtype)
            results[name, wide] = rotated(normed, cache[positions].to(inner.dtype), is_neox).to(wide)
    assert rope.qk_rmsnorm_rope_inplace(q, k, *weights, positions, cache, eps, is_neox) is None
    for name, got in zip("qk", (q, k), strict=True):
        assert_close_to_oracle(got.clone(), results[name, torch.float64], results[name, dtype], name)


def test_errors(device: str) -> None:
    q, k = parts(3, (4,), 16, torch.float16, device), parts(3, (2,), 16, torch.float16, device)
    positions, cache = torch.arange(3, device=device), table(16, device)
    call = rope.rope_quantize_fp8
    with pytest.raises(ValueError, match=r"k_rope: got shape \[2, 2, 16\]"):
        call(q, k[:2], None, None, cache, positions)
    with pytest.raises(ValueError, match=r"q_nope: got shape \[2, 4, 16\], expected shape \[3, 4, any\]"):
        call(q, k, q[:2], None, cache, positions)
    with pytest.raises(ValueError, match=r"cos_sin_cache: got shape \[200, 8\], expected shape \[any, 16\]"):
        call(q, k, None, None, table(8, device), positions)
    with pytest.raises(ValueError, match=r"quantize_dtype: got torch.int8"):
        call(q, k, None, None, cache, positions, quantize_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"q_rope_out: got dtype torch.float8_e5m2"):
        call(q, k, None, None, cache, positions, True, FP8[0], q_rope_out=torch.empty_like(q).to(FP8[1]))
    append = rope.rope_quantize_fp8_append_paged_kv_cache
    caches = tuple(torch.zeros(2, 4, 2, 16, device=device).to(FP8[0]) for _ in range(2))
    where = [torch.zeros(n, dtype=torch.int32, device=device) for n in (1, 2, 3, 3)]
    with pytest.raises(TypeError, match=r"v: got NoneType"):
        append(q, k, None, None, None, cache, positions, caches, *where, page_size=4)
    with pytest.raises(ValueError, match=r"v: got a tensor, expected None"):
        append(q, k[:, 0], None, None, k, cache, positions, caches, *where, page_size=4)
    with pytest.raises(ValueError, match=r"K cache: got shape \[2, 4, 2, 16\], expected shape \[any, 8, 2, 16\]"):
        append(q, k, None, None, k, cache, positions, caches, *where, page_size=8)
    with pytest.raises(ValueError, match=r"q_weight: got shape \[8\], expected shape \[16\]"):
        rope.qk_rmsnorm_rope_inplace(q, k, cache[0, :8], cache[0], positions, cache)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"positions: got values from 0 to 200"):
            call(q, k, None, None, cache, torch.tensor([0, 200, 1]))


def everything(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor) -> list[torch.Tensor]:
    """Every kind of call, results of one in the next."""
    indptr, offsets = positions.new_tensor([0, 2, 5]), positions.new_tensor([4, 9])
    q, k = rope.apply_rope(q, k, indptr, offsets, interleave=True)
    rope.apply_rope_pos_ids_inplace(q, k, positions, rotary_dim=8)
    q, k = rope.apply_llama31_rope_pos_ids(q, k, positions)
    q_flat, k_flat = q.flatten(1), k.flatten(1)
    rope.apply_rope_with_cos_sin_cache_inplace(positions, q_flat, k_flat, q.shape[2], cache, False)
    q, k = rope.apply_rope_with_cos_sin_cache(positions, q_flat, k_flat, q.shape[2], cache)
    q, k = q.view(5, -1, 16), k.view(5, -1, 16)
    rope.qk_rmsnorm_rope_inplace(q, k, cache[3], cache[5], positions, cache)
    return [q, k, *rope.rope_quantize_fp8(q, k, q, None, cache, positions)]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_without_a_break(device: str, compiler: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler cannot look into the poisoned torch.empty
    force(monkeypatch, "rope", backend)
    torch.compiler.reset()
    inputs = [parts(5, (n,), 16, torch.float16, device) for n in (4, 2)]
    inputs += [torch.arange(5, device=device), table(16, device)]
    before = [x.clone() for x in inputs]
    expected = everything(*inputs)
    got = torch.compile(everything, fullgraph=True, backend=compiler)(*before)
    assert all(same(x, y) for x, y in zip(got, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.gpu
def test_graph_replay() -> None:
    """A captured call works on what its tensors hold at the replay; so does one captured before any other call."""
    q, k = (parts(5, (n,), 16, torch.float16, "cuda") for n in (4, 2))
    positions = torch.arange(5, device="cuda")

    def step(q: torch.Tensor, k: torch.Tensor, theta: float) -> None:
        rope.apply_rope_pos_ids_inplace(q, k, positions, rope_theta=theta)

    step(q.clone(), k.clone(), 1e4)  # compiles; the frequencies of another theta are then made in the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(q, k, 12345.0)
    q.normal_(), k.normal_(), positions.add_(100)
    expected = q.clone(), k.clone()
    step(*expected, 12345.0)
    graph.replay()
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


@pytest.mark.gpu
def test_no_host_sync() -> None:
    inputs = [parts(5, (n,), 16, torch.float16, "cuda") for n in (4, 2)]
    inputs += [torch.arange(5, device="cuda"), table(16, "cuda")]
    indptr = torch.tensor([0, 2, 5], device="cuda")
    rope.apply_rope(*inputs[:2], indptr, indptr[:2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        rope.apply_rope(*inputs[:2], indptr, indptr[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_thousands_of_rows_past_2_31_elements(backend: str) -> None:
    """A strided q whose last rows begin past 2^31 elements; odd numbers of tokens."""
    nnz, stride = 4097, 2**19 + 64
    storage = torch.zeros(nnz * stride, dtype=torch.float16, device="cuda")
    q = storage.as_strided((nnz, 2, 16), (stride, 16, 1)).normal_()
    k, positions = q.clone(), torch.randint(0, 1 << 17, (nnz,), device="cuda")
    rope.apply_rope_pos_ids_inplace(q, k, positions)
    assert torch.equal(q, k) and storage.count_nonzero() <= nnz * 32
