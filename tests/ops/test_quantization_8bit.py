"""fp8, int8 and fp4 with scales, held against fp64 and against searches among all codes."""

from __future__ import annotations

import itertools

import pytest
import torch

from flashinfer import quantization
from flashinfer.concat_ops import concat_mla_k
from flashinfer.ops import quantization as ops
from flashinfer.quantization import SfLayout
from tests.ops.common import IMPLEMENTATIONS, force
from tests.ops.fp8_codes import FP8, nearest, same

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODES = (*FP8, torch.int8)


@pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test on every implementation, through the public functions."""
    return force(monkeypatch, "quantization", request.param)


def largest_code(dtype: torch.dtype) -> float:
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def coded(x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 quotients, then the nearest code."""
    quotient = x.float() / scales
    if dtype == torch.int8:
        return quotient.nan_to_num(nan=0.0).double().round().clamp(-128, 127).to(torch.int8)
    return nearest(quotient, dtype)


def assert_scales(got: torch.Tensor, x: torch.Tensor, eps: float, dtype: torch.dtype, power_of_two: bool) -> None:
    """`got` `[..., groups]` for x `[..., groups, group_size]`: within a rounding of what fp64 says."""
    magnitude = x.double().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1)
    exact = magnitude.clamp(min=eps) / largest_code(dtype)
    if power_of_two:
        exact = torch.exp2(torch.log2(exact).ceil())
        assert torch.equal(got.double(), exact)
    error = (got.double() / exact - 1).abs().nan_to_num(nan=0.0)
    assert bool((error <= torch.finfo(torch.float32).eps).all())


def numbers(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Rows of very different size in a wider buffer; some are zero, hold a NaN or an infinity."""
    wide = torch.randn(*shape[:-1], shape[-1] + 8, device=device)
    x = (wide * torch.exp2(torch.randint(-9, 9, (*shape[:-1], 1), device=device))).to(dtype)[..., : shape[-1]]
    if x.numel():
        x[0] = 0
        x[-1, ..., 1] = torch.nan
        x[-1, ..., 2] = torch.inf
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dst_dtype", CODES)
@pytest.mark.parametrize(("shape", "group_size"), [((5, 256), 128), ((3, 2, 48), 16), ((4, 21), 7), ((2, 640), 640)])
def test_groups(
    dtype: torch.dtype, dst_dtype: torch.dtype, shape: tuple[int, ...], group_size: int, device: str
) -> None:
    x = numbers(shape, dtype, device)
    codes, scales = quantization.per_token_group_quant_8bit(x, group_size, 1e-7, dst_dtype)
    assert codes.shape == x.shape and codes.is_contiguous() and codes.dtype == dst_dtype
    assert scales.shape == (*shape[:-1], shape[-1] // group_size) and scales.dtype == torch.float32
    grouped = x.unflatten(-1, (-1, group_size))
    assert_scales(scales, grouped, 1e-7, dst_dtype, False)
    assert same(codes, coded(grouped, scales[..., None], dst_dtype).flatten(-2))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ue8m0", [True, False])
def test_column_major_scales(aligned: bool, ue8m0: bool, device: str) -> None:
    x = numbers((7, 384), torch.float16, device)
    x[1] = 0
    x[1, 3] = 448 * 2.0**-5  # a scale that is a power of two already
    options = {"column_major_scales": True, "scale_tma_aligned": aligned, "scale_ue8m0": ue8m0}
    codes, scales = quantization.per_token_group_quant_8bit(x, 128, **options)
    assert scales.shape == (7, 3) and scales.stride() == (1, 8 if aligned else 7)
    grouped = x.unflatten(-1, (-1, 128))
    assert_scales(scales[:-1], grouped[:-1], 1e-10, FP8[0], ue8m0)
    if ue8m0:
        assert scales[1, 0] == 2.0**-5
    assert same(codes[:-1], coded(grouped, scales[..., None], FP8[0]).flatten(-2)[:-1])


@pytest.mark.parametrize("dst_dtype", CODES)
def test_per_token_and_per_tensor(dst_dtype: torch.dtype, device: str) -> None:
    x = numbers((6, 100), torch.float32, device)
    codes, scales = quantization.per_token_quant_8bit(x, dst_dtype=dst_dtype)
    assert scales.shape == (6, 1)
    assert_scales(scales, x[:, None], 1e-10, dst_dtype, False)
    assert same(codes, coded(x, scales, dst_dtype))
    x[-1] = 1.5
    codes, scale = quantization.per_tensor_quant_8bit(x, dst_dtype=dst_dtype)
    assert_scales(scale, x.flatten()[None], 1e-10, dst_dtype, False)
    assert same(codes, coded(x, scale, dst_dtype))
    given = torch.tensor([0.3], device=device)
    codes, scale = quantization.per_tensor_quant_8bit(x, given, dst_dtype)
    assert scale is given and same(codes, coded(x, given, dst_dtype))


@pytest.mark.parametrize("dst_dtype", CODES)
@pytest.mark.parametrize("output_dtype", DTYPES)
def test_dequantize(dst_dtype: torch.dtype, output_dtype: torch.dtype, device: str) -> None:
    """Every code, in strided rows, times scales: exactly the product in fp32, rounded once."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(dst_dtype).view(4, 64)
    codes = torch.cat([codes.view(torch.uint8)] * 2, dim=1).view(dst_dtype)[:, 32:96]
    scales = torch.rand(4, 2, device=device) + 0.1
    got = quantization.dequantize_8bit(codes, scales, output_dtype)
    exact = (codes.float().unflatten(1, (2, 32)) * scales[..., None]).flatten(1)
    assert got.dtype == output_dtype and same(got, exact.to(output_dtype))


@pytest.mark.parametrize("shape", [(5, 3, 64), (2, 4, 2, 80)])
def test_int8_kv(shape: tuple[int, ...], device: str) -> None:
    """There and back: half a step of the code away, however large the head."""
    x = torch.randn(*shape, device=device) * torch.exp2(torch.randint(-5, 5, (*shape[:-1], 1), device=device))
    codes, scales = quantization.int8_kv_quantize(x)
    assert codes.dtype == torch.int8 and scales.shape == shape[:-1]
    back = quantization.int8_kv_dequantize(codes, scales, torch.float32)
    assert bool(((back - x).abs() <= scales[..., None] * (0.5 + 1e-4)).all())


def fp4_problem(
    num_rows: int, width: int, group_size: int, ue8m0: bool, layout: SfLayout, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes as bytes, scales as bytes in the layout, the numbers in fp64), one block at a time."""
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = torch.randint(0, 16, (num_rows, width))
    columns = width // group_size
    bytes_ = torch.randint(100, 150, (num_rows, columns)) if ue8m0 else torch.randint(0, 127, (num_rows, columns))
    rows_of_tile, columns_of_tile = {0: (128, 4), 1: (8, 4), 2: (1, 1)}[layout]
    padded_rows, padded_columns = (
        -(-num_rows // rows_of_tile) * rows_of_tile,
        -(-columns // columns_of_tile) * columns_of_tile,
    )
    swizzled = torch.zeros(padded_rows * padded_columns, dtype=torch.uint8)
    exact = torch.zeros(num_rows, width, dtype=torch.float64)
    for i, j in itertools.product(range(num_rows), range(columns)):
        tile = (
            (i // rows_of_tile * (padded_columns // columns_of_tile) + j // columns_of_tile)
            * rows_of_tile
            * columns_of_tile
        )
        inner = {0: i % 32 * 16 + i % 128 // 32 * 4 + j % 4, 1: i % 8 * 4 + j % 4, 2: 0}[layout]
        swizzled[tile + inner] = bytes_[i, j]
        byte = bytes_[i, j].to(torch.uint8)
        scale = 2.0 ** (int(byte) - 127) if ue8m0 else float(byte.view(FP8[0]).float())
        for c in range(j * group_size, (j + 1) * group_size):
            exact[i, c] = values[codes[i, c] % 8] * (-1) ** int(codes[i, c] >= 8) * scale
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    return packed.to(device), swizzled.to(device), exact.to(device)


@pytest.mark.parametrize("layout", SfLayout)
@pytest.mark.parametrize(("group_size", "ue8m0"), [(16, False), (32, True)])
@pytest.mark.parametrize(("num_rows", "width"), [(3, 64), (130, 96)])
def test_fp4(layout: SfLayout, group_size: int, ue8m0: bool, num_rows: int, width: int, device: str) -> None:
    packed, scales, exact = fp4_problem(num_rows, width, group_size, ue8m0, layout, device)
    factor = torch.tensor([0.75], device=device)  # products with it are exact
    got = quantization.e2m1_and_ufp8sf_scale_to_float(
        packed, scales, factor, group_size, 0 if ue8m0 else 1, layout != SfLayout.layout_linear,
        layout == SfLayout.layout_8x4,
    )  # fmt: skip
    assert torch.equal(got.double(), exact * 0.75)
    if ue8m0:
        assert torch.equal(quantization.mxfp4_dequantize(packed, scales, layout).double(), exact)
    if layout == SfLayout.layout_linear and ue8m0:
        rows = scales.view(num_rows, -1)
        assert torch.equal(quantization.mxfp4_dequantize_host(packed, rows).double(), exact)
    if layout == SfLayout.layout_linear and not ue8m0:
        rows = scales.view(num_rows, -1)
        got = quantization.nvfp4_kv_dequantize(packed, rows, factor, torch.float16)
        assert torch.equal(got, (exact * 0.75).half())
    if layout == SfLayout.layout_128x4:
        linear = fp4_linear(scales, num_rows, width // group_size)
        assert torch.equal(quantization.block_scale_interleave(linear), scales)


@pytest.mark.parametrize("layout", SfLayout)
@pytest.mark.parametrize("global_scale", [None, 3.5, -0.75])
@pytest.mark.parametrize(("num_rows", "width"), [(0, 16), (1, 16), (5, 96), (130, 80)])
def test_quantise_fp4(layout: SfLayout, global_scale: float | None, num_rows: int, width: int, device: str) -> None:
    """Scales to the last bit, codes nearest to the numbers over their scale, what lies between scales untouched."""
    x = torch.randn(num_rows, width, dtype=torch.float16, device=device) * 10
    x[:1, :16] = 0.0
    factor = None if global_scale is None else torch.tensor([global_scale], device=device)
    codes = torch.full((num_rows, width // 2), 0xA5, dtype=torch.uint8, device=device)
    scales = torch.full((ops.scales_needed(num_rows, width // 16, layout),), 0xA5, dtype=torch.uint8, device=device)
    ops.quantize_fp4(codes, scales, x, factor, int(layout))
    blocks = x.float().unflatten(-1, (-1, 16))
    by = 1.0 if global_scale is None else global_scale
    wanted = (by * (blocks.abs().amax(-1) / 6)).to(FP8[0])
    got = ops.linear_scales(scales, num_rows, width // 16, layout)
    assert torch.equal(got, wanted.view(torch.uint8))
    assert (scales == 0xA5).sum() >= scales.numel() - wanted.numel()
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
    values = torch.cat([values, -values]).double()
    mine = torch.stack([codes & 15, codes >> 4], -1).view(blocks.shape).long()
    divisor = (wanted.double() / by)[..., None]
    exact = torch.where(divisor == 0, 0.0, blocks.double() / divisor)
    least = (exact[..., None] - values).abs().amin(-1)
    assert ((exact - values[mine]).abs() <= least + 1e-5).all()


def fp4_linear(swizzled: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """Scales of 128 x 4 tiles row after row."""
    tiles = -(-num_columns // 4)
    rows = []
    for i in range(num_rows):
        places = [
            (i // 128 * tiles + j // 4) * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4 for j in range(num_columns)
        ]
        rows.append(swizzled[places])
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8[0]])
@pytest.mark.parametrize(("num_heads", "dims"), [(128, (128, 64)), (3, (24, 10))])
def test_concat_mla_k(dtype: torch.dtype, num_heads: int, dims: tuple[int, int], device: str) -> None:
    k = torch.randn(4, num_heads, sum(dims) + 8, device=device).to(dtype)[..., : sum(dims)]
    k_nope = torch.randn(4, num_heads, dims[0] + 5, device=device).to(dtype)[..., : dims[0]]
    k_rope = torch.randn(4, 1, dims[1] + 3, device=device).to(dtype)[..., : dims[1]]
    assert concat_mla_k(k, k_nope, k_rope) is None
    assert same(k[..., : dims[0]], k_nope) and same(k[..., dims[0] :], k_rope.expand(-1, num_heads, -1))


def test_empty(device: str) -> None:
    x = torch.empty(0, 256, device=device)
    codes, scales = quantization.per_token_group_quant_8bit(x, 128)
    assert codes.shape == (0, 256) and scales.shape == (0, 2)
    assert quantization.dequantize_8bit(codes, scales).shape == (0, 256)
    codes, scale = quantization.per_tensor_quant_8bit(x)
    assert codes.shape == (0, 256) and scale.shape == (1,)
    packed = torch.empty(0, 32, dtype=torch.uint8, device=device)
    assert quantization.mxfp4_dequantize(packed, packed).shape == (0, 64)
    k = torch.empty(0, 2, 24, device=device)
    concat_mla_k(k, k[..., :16], k[:, :1, 16:])


def test_errors(device: str) -> None:
    x = torch.randn(4, 256, device=device)
    quantize = quantization.per_token_group_quant_8bit
    with pytest.raises(ValueError, match=r"last dimension of x: got 256 with group_size 100"):
        quantize(x, 100)
    with pytest.raises(ValueError, match=r"scale_ue8m0: got True, expected False without column_major_scales"):
        quantize(x, 128, scale_ue8m0=True)
    with pytest.raises(ValueError, match=r"dst_dtype: got torch.uint8"):
        quantize(x, 128, dst_dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"innermost stride must be 1"):
        quantize(x[:, ::2], 128)
    with pytest.raises(ValueError, match=r"x: got 3 dimensions, expected 2"):
        quantize(x[None], 128, column_major_scales=True)
    with pytest.raises(ValueError, match=r"scale: got shape \[2\]"):
        quantization.per_tensor_quant_8bit(x, torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"scales: got shape \[3, 2\]"):
        quantization.dequantize_8bit(x.to(FP8[0]), torch.ones(3, 2, device=device))
    packed = torch.zeros(4, 32, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=r"block scales: got 8 scales, expected 512"):
        quantization.mxfp4_dequantize(packed, packed[:2, :4])
    k = torch.empty(4, 2, 20, device=device)
    with pytest.raises(ValueError, match=r"k_nope: got shape \[4, 2, 16\], expected shape \[4, 2, 12\]"):
        concat_mla_k(k, k[..., :16], k[:, :1, :8])


def everything(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    codes, found = quantization.per_token_group_quant_8bit(x, 32, column_major_scales=True, scale_tma_aligned=True)
    back = quantization.dequantize_8bit(codes, found.contiguous(), torch.float32)
    whole, scale = quantization.per_tensor_quant_8bit(back, dst_dtype=torch.int8)
    concat_mla_k(k, k[..., 8:24].clone(), k[:, :1, :8].clone())
    mask = quantization.packbits(x.flatten() > 0, "little")
    return [codes, found, back, whole, scale, quantization.mxfp4_dequantize_host(packed, scales), mask, k]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_without_a_break(device: str, compiler: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the compiler cannot look into the poisoned torch.empty
    force(monkeypatch, "quantization", backend)
    torch.compiler.reset()
    packed, scales, _ = fp4_problem(2, 64, 32, True, SfLayout.layout_linear, device)
    inputs = (torch.randn(5, 64, device=device), packed, scales.view(2, 2), torch.randn(3, 2, 24, device=device))
    copies = [x.clone() for x in inputs]
    expected = everything(*inputs)
    got = torch.compile(everything, fullgraph=True, backend=compiler)(*copies)
    assert all(same(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.gpu
def test_graph_replay_and_no_host_sync() -> None:
    packed, scales, _ = fp4_problem(2, 64, 32, True, SfLayout.layout_linear, "cuda")
    inputs = (torch.randn(5, 64, device="cuda"), packed, scales.view(2, 2), torch.randn(3, 2, 24, device="cuda"))
    everything(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything(*inputs)
    inputs[0].normal_(), inputs[3].normal_()
    kept = inputs[3].clone()
    graph.replay()
    assert all(same(x, y) for x, y in zip(got, everything(*inputs[:3], kept), strict=True))


@pytest.mark.gpu
def test_past_2_31_elements() -> None:
    """Groups whose rows begin past 2^31 elements."""
    rows, stride = 70, 2**25
    x = torch.zeros(rows * stride, dtype=torch.float16, device="cuda").as_strided((rows, 256), (stride, 1)).normal_()
    codes, scales = quantization.per_token_group_quant_8bit(x, 128)
    assert same(codes, coded(x.unflatten(1, (2, 128)), scales[..., None], FP8[0]).flatten(1))
