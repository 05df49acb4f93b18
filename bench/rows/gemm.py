"""Grouped products, even and uneven groups, and block-scaled fp8: what torch and cuBLAS do is the figure to beat.

Uneven groups are drawn anew from the seed of the shape, so they are the same in every run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import flashinfer
from bench.record import Call, Peer, Row, Sample, nan_like, nothing
from flashinfer import gemm, grouped_mm

CHECKED_ROWS = 16
BLOCK = 128
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class GemmShape:
    """Groups of `rows` rows on average. uneven: drawn, some of them empty, as many rows in all. fp8: block-scaled."""

    groups: int
    rows: int
    n: int
    k: int
    uneven: bool = False
    fp8: bool = False

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
    def num_bytes(self) -> int:
        """Rows and the weights of groups that are not empty read once, the result written once."""
        itemsize = 1 if self.fp8 else 2
        used = sum(size > 0 for size in self.sizes)
        return itemsize * (self.total * self.k + used * self.n * self.k) + 2 * self.total * self.n

    @property
    def num_flops(self) -> int:
        return 2 * self.total * self.n * self.k

    def fields(self) -> dict[str, Any]:
        """The parameters, for JSON."""
        numbers = {"groups": self.groups, "rows": self.rows, "n": self.n, "k": self.k}
        return {**numbers, "sizes": self.sizes, "dtype": "fp8 1x128 / 128x128" if self.fp8 else "bfloat16"}


@dataclass(frozen=True)
class GemmInputs:
    """x `[total, k]`, w `[groups, n, k]`; of fp8 the fp32 scales of both; indptr and sizes of the groups."""

    x: torch.Tensor
    w: torch.Tensor
    x_scale: torch.Tensor | None
    w_scale: torch.Tensor | None
    indptr: torch.Tensor
    sizes: torch.Tensor
    out: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.x.device


def make(shape: GemmShape, generator: torch.Generator) -> GemmInputs:
    """Normal numbers; fp8 over a scale of about 30."""
    device = generator.device

    def normal(*size: int) -> torch.Tensor:
        drawn = torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16)
        return (drawn * 30).to(E4M3) if shape.fp8 else drawn

    def scales(*size: int) -> torch.Tensor | None:
        return torch.rand(*size, generator=generator, device=device) * 0.01 + 0.001 if shape.fp8 else None

    w = torch.stack([normal(shape.n, shape.k) for _ in range(shape.groups)])
    blocks = -(-shape.k // BLOCK)
    sizes = torch.tensor(shape.sizes, device=device)
    indptr = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    out = torch.empty(shape.total, shape.n, dtype=torch.bfloat16, device=device)
    x_scale, w_scale = scales(shape.total, blocks), scales(shape.groups, -(-shape.n // BLOCK), blocks)
    return GemmInputs(normal(shape.total, shape.k), w, x_scale, w_scale, indptr, sizes, nan_like(out))


# ---- the public API


def call_grouped(shape: GemmShape, i: GemmInputs) -> Call:
    """`grouped_mm_bf16`, or `group_gemm_fp8_nt_groupwise`."""
    if i.x_scale is None:
        return Call(nothing, lambda: grouped_mm.grouped_mm_bf16(i.x, i.w, i.indptr, i.out), i.out)
    arguments = (i.x, i.w, i.x_scale, i.w_scale, i.indptr)
    options: dict[str, Any] = {"scale_major_mode": "K", "out": i.out}
    return Call(nothing, lambda: gemm.group_gemm_fp8_nt_groupwise(*arguments, **options), i.out)


def call_segments(shape: GemmShape, i: GemmInputs) -> Call:
    """`SegmentGEMMWrapper.run`."""
    wrapper = flashinfer.SegmentGEMMWrapper(torch.empty(1, dtype=torch.uint8, device=i.device))
    return Call(nothing, lambda: wrapper.run(i.x, i.w, shape.groups, True, i.out, seg_indptr=i.indptr), i.out)


def call_dense_fp8(shape: GemmShape, i: GemmInputs) -> Call:
    """`gemm_fp8_nt_groupwise`; scales of one block of columns of a side by side, as torch wants them too."""
    assert i.x_scale is not None and i.w_scale is not None
    arguments = (i.x, i.w[0], i.x_scale.t().contiguous().t(), i.w_scale[0], "K")
    return Call(nothing, lambda: gemm.gemm_fp8_nt_groupwise(*arguments, out=i.out), i.out)


# ---- what it comes to


def _numbers(values: torch.Tensor, scale: torch.Tensor | None, shared: int, dtype: torch.dtype) -> torch.Tensor:
    if scale is None:
        return values.to(dtype)
    spread = scale.repeat_interleave(shared, 0)[: values.shape[0]].repeat_interleave(BLOCK, 1)
    return values.to(dtype) * spread[:, : values.shape[1]].to(dtype)


def samples(shape: GemmShape, i: GemmInputs, generator: torch.Generator) -> Iterator[Sample]:
    """Rows at the ends of groups and random ones, group by group."""
    edges = torch.cat([i.indptr[:-1], i.indptr[1:] - 1]).long().clamp(0, shape.total - 1)
    drawn = torch.randint(shape.total, (CHECKED_ROWS,), generator=generator, device=i.device)
    rows = torch.cat([drawn, edges[torch.randperm(len(edges), generator=generator, device=i.device)[:CHECKED_ROWS]]])
    groups = torch.searchsorted(i.indptr[1:].contiguous(), rows.int(), right=True)
    results = []
    for dtype in (torch.float64, torch.float32):
        parts = []
        for row, g in zip(rows.tolist(), groups.tolist(), strict=True):
            scale = None if i.x_scale is None else i.x_scale[row : row + 1]
            x = _numbers(i.x[row : row + 1], scale, 1, dtype)
            w = _numbers(i.w[g], None if i.w_scale is None else i.w_scale[g], BLOCK, dtype)
            parts.append(x @ w.T)
        results.append(torch.cat(parts))
    yield Sample("rows", rows, results[0], results[1].to(torch.bfloat16), shape.k)


# ---- peers

Open = Callable[[GemmShape, GemmInputs], Any]


@contextmanager
def open_torch_grouped(shape: GemmShape, i: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """torch's own grouped product."""
    w, ends = i.w.transpose(1, 2), i.indptr[1:].contiguous()
    yield lambda: torch._grouped_mm(i.x, w, offs=ends, out_dtype=torch.bfloat16)


@contextmanager
def open_bmm(shape: GemmShape, i: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """cuBLAS, for groups of equal size."""
    x, w = i.x.view(shape.groups, shape.rows, shape.k), i.w.transpose(1, 2)
    out = torch.empty(shape.groups, shape.rows, shape.n, dtype=torch.bfloat16, device=i.device)
    yield lambda: torch.bmm(x, w, out=out).view(shape.total, shape.n)


@contextmanager
def open_own_bf16(shape: GemmShape, i: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """Our grouped product of bf16 numbers of the same sizes."""
    x, w = i.x.bfloat16(), i.w.bfloat16()
    out = torch.empty_like(i.out)
    yield lambda: grouped_mm.grouped_mm_bf16(x, w, i.indptr, out)


@contextmanager
def open_scaled_blocks(shape: GemmShape, i: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """torch's block-scaled product, where it has one."""
    assert i.x_scale is not None and i.w_scale is not None
    rows, columns = i.x_scale.t().contiguous().t(), i.w_scale[0].t()
    b = i.w[0].t()
    yield lambda: torch._scaled_mm(i.x, b, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16)


@contextmanager
def open_scaled_tensor(shape: GemmShape, i: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """torch's product with one scale a tensor, which is less work."""
    one, b = torch.ones((), device=i.device), i.w[0].t()
    yield lambda: torch._scaled_mm(i.x, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


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


def label(shape: GemmShape) -> str:
    even = "_uneven" if shape.uneven else ""
    return f"{shape.groups}x{shape.rows}x{shape.n}x{shape.k}{even}"


def _grouped_rows() -> Iterator[Row]:
    for size in SIZES:
        for uneven in (False, True):
            shape = GemmShape(*size, uneven=uneven)
            peers = (TORCH_GROUPED,) if uneven else (TORCH_GROUPED, BMM)
            yield Row(f"gemm_grouped_{label(shape)}", "gemm", "cuda", shape, make, call_grouped, peers, samples)
        shape = GemmShape(*size)
        yield Row(f"gemm_segment_{label(shape)}", "gemm", "cuda", shape, make, call_segments, (BMM,), samples)


def _fp8_rows() -> Iterator[Row]:
    for m, n, k in FP8_DENSE:
        shape, peers = GemmShape(1, m, n, k, fp8=True), (SCALED_BLOCKS, SCALED_TENSOR)
        yield Row(f"gemm_fp8_{m}x{n}x{k}", "gemm", "cuda", shape, make, call_dense_fp8, peers, samples)
    for uneven in (False, True):
        shape = GemmShape(*FP8_GROUPED, uneven=uneven, fp8=True)
        name = f"gemm_fp8_grouped_{label(shape)}"
        yield Row(name, "gemm", "cuda", shape, make, call_grouped, (OWN_BF16,), samples)


ROWS: tuple[Row, ...] = (*_grouped_rows(), *_fp8_rows())
COLD_ROWS = ("gemm_grouped_64x64x1408x2048",)
