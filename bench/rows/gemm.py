"""Grouped products, even and uneven groups, and block-scaled fp8: what torch and cuBLAS do is the figure to beat.

Uneven groups are drawn anew from the seed of the shape, so they are the same in every run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import flashinfer
from bench.record import Call, Peer, Row, Sample, nan_like, nothing
from flashinfer import gemm, grouped_mm
from flashinfer.ops.gemm import Activation, Epilogue, Rows, Weights, grouped_gemm

CHECKED_ROWS = 16
BLOCK = 128
E4M3 = torch.float8_e4m3fn
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Bytes of a number of the rows and of one of the weights, by kind; scales of fp4 are counted.
BYTES = {"plain": (2.0, 2.0), "fp8_block": (1.0, 1.0), "mxfp4": (2.0, 17 / 32)}


@dataclass(frozen=True)
class GemmShape:
    """Groups of `rows` rows on average.

    uneven: drawn, some of them empty, as many rows in all. kind: of the weights, see `ops.gemm.Weights`: "plain" bf16,
    "fp8_block" on both sides, "mxfp4" with bf16 rows. gated: swiglu of pairs, the result n / 2 wide.
    """

    groups: int
    rows: int
    n: int
    k: int
    uneven: bool = False
    kind: str = "plain"
    gated: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each group: even, or of exponentially distributed weights, every eighth group empty."""
        if not self.uneven:
            return (self.rows,) * self.groups
        rng = random.Random(self.groups * 1_000_003 + self.rows)
        weights = [0.0 if g % 8 == 3 else rng.expovariate(1.0) for g in range(self.groups)]
        total = self.groups * self.rows
        sizes = [int(total * w / sum(weights)) for w in weights]
        sizes[0] += total - sum(sizes)
        return tuple(sizes)

    @property
    def total(self) -> int:
        return self.groups * self.rows

    @property
    def out_cols(self) -> int:
        return self.n // 2 if self.gated else self.n

    @property
    def num_bytes(self) -> int:
        """Rows and the weights of groups that are not empty read once, the result written once."""
        per_row, per_weight = BYTES[self.kind]
        used = sum(size > 0 for size in self.sizes)
        return int(per_row * self.total * self.k + per_weight * used * self.n * self.k) + 2 * self.total * self.out_cols

    @property
    def num_flops(self) -> int:
        return 2 * self.total * self.n * self.k

    def fields(self) -> dict[str, Any]:
        """The parameters, for JSON."""
        numbers = {"groups": self.groups, "rows": self.rows, "n": self.n, "k": self.k, "gated": self.gated}
        return {**numbers, "sizes": self.sizes, "dtype": self.kind}


@dataclass(frozen=True)
class GemmInputs:
    """Both sides, and `out [total, out_cols]`."""

    rows: Rows
    weights: Weights
    out: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.out.device

    @property
    def indptr(self) -> torch.Tensor:
        assert self.rows.indptr is not None
        return self.rows.indptr


def make(shape: GemmShape, generator: torch.Generator) -> GemmInputs:
    """Normal numbers, fp8 over a scale of about 30; codes and scales of fp4 drawn evenly."""
    device = generator.device

    def normal(*size: int) -> torch.Tensor:
        drawn = torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16)
        return (drawn * 30).to(E4M3) if shape.kind == "fp8_block" else drawn

    def drawn(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator, device=device, dtype=torch.uint8)

    blocks = -(-shape.k // BLOCK)
    x_scale = w_scale = None
    if shape.kind == "fp8_block":
        x_scale = torch.rand(shape.total, blocks, generator=generator, device=device) * 0.01 + 0.001
        w_size = (shape.groups, -(-shape.n // BLOCK), blocks)
        w_scale = torch.rand(*w_size, generator=generator, device=device) * 0.01 + 0.001
    if shape.kind == "mxfp4":
        w = drawn(0, 256, shape.groups, shape.n, shape.k // 2)
        w_scale = drawn(122, 128, shape.groups, shape.n, shape.k // 32)
    else:
        w = torch.stack([normal(shape.n, shape.k) for _ in range(shape.groups)])
    sizes = torch.tensor(shape.sizes, device=device)
    indptr = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    out = torch.empty(shape.total, shape.out_cols, dtype=torch.bfloat16, device=device)
    rows = Rows(normal(shape.total, shape.k), indptr, scale=x_scale)
    return GemmInputs(rows, Weights(w, scale=w_scale, kind=shape.kind), nan_like(out))


# ---- what is called


def call_grouped(shape: GemmShape, i: GemmInputs) -> Call:
    """`grouped_mm_bf16`, or `group_gemm_fp8_nt_groupwise`."""
    x, w = i.rows.values, i.weights.values
    if shape.kind == "plain":
        return Call(nothing, lambda: grouped_mm.grouped_mm_bf16(x, w, i.indptr, i.out), i.out)
    arguments = (x, w, i.rows.scale, i.weights.scale, i.indptr)
    options: dict[str, Any] = {"scale_major_mode": "K", "out": i.out}
    return Call(nothing, lambda: gemm.group_gemm_fp8_nt_groupwise(*arguments, **options), i.out)


def call_op(shape: GemmShape, i: GemmInputs, backend: str = "auto") -> Call:
    """The op behind the public functions, which has activations and 4-bit weights too."""
    epilogue = Epilogue(None, Activation("swiglu") if shape.gated else None)
    run = partial(grouped_gemm, i.rows, i.weights, epilogue, out=i.out, backend=backend)
    return Call(nothing, run, i.out)


def call_segments(shape: GemmShape, i: GemmInputs) -> Call:
    """`SegmentGEMMWrapper.run`."""
    wrapper = flashinfer.SegmentGEMMWrapper(torch.empty(1, dtype=torch.uint8, device=i.device))
    x, w = i.rows.values, i.weights.values
    return Call(nothing, lambda: wrapper.run(x, w, shape.groups, True, i.out, seg_indptr=i.indptr), i.out)


def call_dense_fp8(shape: GemmShape, i: GemmInputs) -> Call:
    """`gemm_fp8_nt_groupwise`; scales of one block of columns of a side by side, as torch wants them too."""
    assert i.rows.scale is not None and i.weights.scale is not None
    scales = i.rows.scale.t().contiguous().t(), i.weights.scale[0]
    arguments = (i.rows.values, i.weights.values[0], *scales, "K")
    return Call(nothing, lambda: gemm.gemm_fp8_nt_groupwise(*arguments, out=i.out), i.out)


# ---- what it comes to


def _spread(scale: torch.Tensor, shared_rows: int, shared: int, like: torch.Tensor) -> torch.Tensor:
    """A scale for every number of `like`."""
    rows = scale.repeat_interleave(shared_rows, 0)[: like.shape[0]]
    return rows.repeat_interleave(shared, 1)[:, : like.shape[1]].to(like.dtype)


def _row(i: GemmInputs, row: int, dtype: torch.dtype) -> torch.Tensor:
    x = i.rows.values[row : row + 1].to(dtype)
    return x if i.rows.scale is None else x * _spread(i.rows.scale[row : row + 1], 1, BLOCK, x)


def _matrix(i: GemmInputs, group: int, dtype: torch.dtype) -> torch.Tensor:
    values, scale = i.weights.values[group], i.weights.scale
    if i.weights.kind == "mxfp4":
        assert scale is not None
        table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=dtype, device=values.device)
        numbers = table[torch.stack([values & 15, values >> 4], -1).flatten(1).long()]
        return numbers * _spread(torch.exp2(scale[group].to(dtype) - 127), 1, 32, numbers)
    numbers = values.to(dtype)
    return numbers if scale is None else numbers * _spread(scale[group], BLOCK, BLOCK, numbers)


def samples(shape: GemmShape, i: GemmInputs, generator: torch.Generator) -> Iterator[Sample]:
    """Rows at the ends of groups and random ones."""
    edges = torch.cat([i.indptr[:-1], i.indptr[1:] - 1]).long().clamp(0, shape.total - 1)
    drawn = torch.randint(shape.total, (CHECKED_ROWS,), generator=generator, device=i.device)
    rows = torch.cat([drawn, edges[torch.randperm(len(edges), generator=generator, device=i.device)[:CHECKED_ROWS]]])
    groups = torch.searchsorted(i.indptr[1:].contiguous(), rows.int(), right=True)
    results = []
    for dtype in (torch.float64, torch.float32):
        parts = []
        for row, g in zip(rows.tolist(), groups.tolist(), strict=True):
            y = _row(i, row, dtype) @ _matrix(i, g, dtype).T
            if shape.gated:
                up, gate = y.chunk(2, -1)
                y = torch.nn.functional.silu(gate) * up
            parts.append(y)
        results.append(torch.cat(parts))
    yield Sample("rows", rows, results[0], results[1].to(torch.bfloat16), shape.k)


# ---- peers


@contextmanager
def open_torch_grouped(shape: GemmShape, i: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """torch's own grouped product."""
    x, w, ends = i.rows.values, i.weights.values.transpose(1, 2), i.indptr[1:].contiguous()
    yield lambda: torch._grouped_mm(x, w, offs=ends, out_dtype=torch.bfloat16)


@contextmanager
def open_bmm(shape: GemmShape, i: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """cuBLAS, for groups of equal size."""
    x, w = i.rows.values.view(shape.groups, shape.rows, shape.k), i.weights.values.transpose(1, 2)
    out = torch.empty(shape.groups, shape.rows, shape.n, dtype=torch.bfloat16, device=i.device)
    yield lambda: torch.bmm(x, w, out=out).view(shape.total, shape.n)


@contextmanager
def open_own_bf16(shape: GemmShape, i: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """Our grouped product of bf16 numbers of the same sizes."""
    same = GemmShape(shape.groups, shape.rows, shape.n, shape.k, shape.uneven, gated=shape.gated)
    inputs = make(same, torch.Generator(i.device).manual_seed(0))
    run = call_op(same, inputs).run
    yield lambda: (run(), inputs.out)[1]


@contextmanager
def open_scaled_blocks(shape: GemmShape, i: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """torch's block-scaled product, where it has one."""
    assert i.rows.scale is not None and i.weights.scale is not None
    scales = {"scale_a": i.rows.scale.t().contiguous().t(), "scale_b": i.weights.scale[0].t()}
    x, w = i.rows.values, i.weights.values[0].t()
    yield lambda: torch._scaled_mm(x, w, **scales, out_dtype=torch.bfloat16)


@contextmanager
def open_scaled_tensor(shape: GemmShape, i: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """torch's product with one scale a tensor, which is less work."""
    one, x, w = torch.ones((), device=i.device), i.rows.values, i.weights.values[0].t()
    yield lambda: torch._scaled_mm(x, w, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _same(result: torch.Tensor) -> torch.Tensor:
    return result


TORCH_GROUPED = Peer("torch_grouped_mm", open_torch_grouped, _same)
BMM = Peer("cublas_bmm", open_bmm, _same)
OWN_BF16 = Peer("own_grouped_bf16", open_own_bf16, None)
SCALED_BLOCKS = Peer("torch_scaled_mm_blocks", open_scaled_blocks, _same)
SCALED_TENSOR = Peer("torch_scaled_mm_tensor", open_scaled_tensor, None)

# groups, rows a group, n, k: of `anchors.md`
SIZES = ((8, 512, 14336, 4096), (64, 64, 1408, 2048), (128, 128, 1536, 4096), (64, 16, 1408, 2048))
FP8_DENSE = ((4096, 4096, 4096), (8192, 8192, 8192), (64, 7168, 2048), (128, 7168, 2048))
FP8_GROUPED = (8, 512, 4096, 7168)


# gpt-oss and Mixtral in decoding, 4-bit weights.
FP4_GROUPED = ((32, 4, 5760, 2880), (8, 16, 28672, 4096), (8, 512, 28672, 4096))


def label(shape: GemmShape) -> str:
    extra = "_gated" * shape.gated + "_uneven" * shape.uneven
    return f"{shape.groups}x{shape.rows}x{shape.n}x{shape.k}{extra}"


def _row_of(kind: str, shape: GemmShape, call: Callable[..., Call], *peers: Peer) -> Row:
    return Row(f"gemm_{kind}_{label(shape)}", "gemm", "cuda", shape, make, call, peers, samples, graphs=True)


def _rows() -> Iterator[Row]:
    for size in SIZES:
        even = GemmShape(*size)
        yield _row_of("grouped", even, call_grouped, TORCH_GROUPED, BMM)
        yield _row_of("grouped", GemmShape(*size, uneven=True), call_grouped, TORCH_GROUPED)
        yield _row_of("segment", even, call_segments, BMM)
    for m, n, k in FP8_DENSE:
        shape = GemmShape(1, m, n, k, kind="fp8_block")
        yield _row_of("fp8", shape, call_dense_fp8, SCALED_BLOCKS, SCALED_TENSOR)
    for uneven in (False, True):
        shape = GemmShape(*FP8_GROUPED, uneven=uneven, kind="fp8_block")
        yield _row_of("fp8_grouped", shape, call_grouped, OWN_BF16)
    for size in FP4_GROUPED:
        yield _row_of("mxfp4_grouped", GemmShape(*size, kind="mxfp4", gated=True), call_op, OWN_BF16)


ROWS: tuple[Row, ...] = tuple(_rows())
COLD_ROWS = ("gemm_grouped_64x64x1408x2048",)
