"""Ops that work token by token: a copy of the same bytes is their ceiling, an empty kernel their floor.

A new op is a line in `_OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import rms_norm, silu

import flashinfer
from bench.record import COPY, Call, Peer, Row, Sample, nothing

Tensors = dict[str, torch.Tensor]
TOKENS = (1, 64, 1024, 16384)
# Up to so many tokens a launch takes longer than the work.
FEW_TOKENS = 64
CHECKED_ROWS = 32
EPS = 1e-6
ROPE_THETA = 1e4
PAGE_SIZE = 16


@dataclass(frozen=True)
class Elementwise:
    """One op as it is measured.

    name: with its sizes. make: `(tokens, normal)` -> its tensors by name, `normal(*shape)` making random ones; those
    that begin with a dimension of `tokens` are cut to rows for the reference. run: calls the public API, which writes
    `out`, or the tensors named in `in_place`, of which the first is checked. reference: `(tensors of some rows)` -> the
    result in the dtype of these tensors. moved: names of the tensors that are read or written, each time it happens.
    terms: how many products a result sums up.
    """

    name: str
    make: Callable[[int, Callable[..., torch.Tensor]], Tensors]
    run: Callable[[Tensors], object]
    reference: Callable[[Tensors], torch.Tensor]
    moved: tuple[str, ...]
    in_place: tuple[str, ...] = ()
    terms: int = 1


@dataclass(frozen=True)
class ElementwiseShape:
    """An op on so many tokens, in `dtype`."""

    op: Elementwise
    tokens: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of every tensor moved; `meta` tensors know theirs without having them."""
        tensors = self.op.make(self.tokens, partial(torch.empty, dtype=self.dtype, device="meta"))
        return sum(tensors[name].nbytes for name in self.op.moved)

    @property
    def num_flops(self) -> int:
        """None that count: the bytes bind."""
        return 0

    def fields(self) -> dict[str, Any]:
        """The parameters, for JSON."""
        return {"op": self.op.name, "tokens": self.tokens, "dtype": str(self.dtype)}


@dataclass(frozen=True)
class ElementwiseInputs:
    """tensors: what the op works on. pristine: the same where it works in place, as it was."""

    tensors: Tensors
    pristine: Tensors
    device: torch.device


def make(shape: ElementwiseShape, generator: torch.Generator) -> ElementwiseInputs:
    """Normally distributed tensors."""
    normal = partial(torch.randn, generator=generator, device=generator.device, dtype=shape.dtype)
    tensors = shape.op.make(shape.tokens, normal)
    pristine = {name: x.clone() if name in shape.op.in_place else x for name, x in tensors.items()}
    return ElementwiseInputs(tensors, pristine, generator.device)


def call(shape: ElementwiseShape, inputs: ElementwiseInputs) -> Call:
    """The public API, which allocates nothing here."""
    op, tensors = shape.op, inputs.tensors

    def reset() -> None:
        for name in op.in_place:
            tensors[name].copy_(inputs.pristine[name])

    out = tensors[op.in_place[0] if op.in_place else "out"]
    if not op.in_place:
        out.fill_(float("nan"))
    return Call(nothing, partial(op.run, tensors), out, reset)


def samples(shape: ElementwiseShape, inputs: ElementwiseInputs, generator: torch.Generator) -> Iterator[Sample]:
    """The first, the last and random rows."""
    picked = torch.randint(shape.tokens, (CHECKED_ROWS,), generator=generator, device=inputs.device)
    rows = torch.cat([picked, picked.new_tensor([0, shape.tokens - 1])]).unique()
    exact, same_dtype = (
        shape.op.reference({name: _rows(x, rows, shape.tokens).to(dtype) for name, x in inputs.pristine.items()})
        for dtype in (torch.float64, shape.dtype)
    )
    yield Sample("rows", rows, exact, same_dtype, shape.op.terms)


def _rows(x: torch.Tensor, rows: torch.Tensor, tokens: int) -> torch.Tensor:
    return x[rows] if x.dim() > 1 and x.shape[0] == tokens else x


@contextmanager
def _open_empty(shape: ElementwiseShape, inputs: ElementwiseInputs) -> Iterator[Callable[[], object]]:
    from bench.rows import empty_kernel

    yield empty_kernel.launch


EMPTY = Peer("empty_kernel", _open_empty, None)


# ---- the table


def _norm_tensors(hidden_size: int, tokens: int, normal: Callable[..., torch.Tensor]) -> Tensors:
    names = ("input", "residual", "out")
    return {name: normal(tokens, hidden_size) for name in names} | {"weight": normal(hidden_size)}


def _gated_tensors(width: int, tokens: int, normal: Callable[..., torch.Tensor]) -> Tensors:
    return {"input": normal(tokens, 2 * width), "out": normal(tokens, width)}


def _rms_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, x.shape[-1:], weight, EPS)


def _silu_reference(t: Tensors) -> torch.Tensor:
    x, gate = t["input"].chunk(2, dim=-1)
    return silu(x) * gate


def torch_add(width: int) -> Elementwise:
    """None of ours: the yardstick for what a call costs the host."""
    return Elementwise(
        f"torch_add_{width}",
        partial(_norm_tensors, width),
        lambda t: torch.add(t["input"], t["residual"], out=t["out"]),
        lambda t: t["input"] + t["residual"],
        moved=("input", "residual", "out"),
    )


def rmsnorm(hidden_size: int) -> Elementwise:
    return Elementwise(
        f"rmsnorm_{hidden_size}",
        partial(_norm_tensors, hidden_size),
        lambda t: flashinfer.rmsnorm(t["input"], t["weight"], EPS, out=t["out"]),
        lambda t: _rms_reference(t["input"], t["weight"]),
        moved=("input", "weight", "out"),
        terms=hidden_size,
    )


def fused_add_rmsnorm(hidden_size: int) -> Elementwise:
    return Elementwise(
        f"fused_add_rmsnorm_{hidden_size}",
        partial(_norm_tensors, hidden_size),
        lambda t: flashinfer.fused_add_rmsnorm(t["input"], t["residual"], t["weight"], EPS),
        lambda t: _rms_reference(t["input"] + t["residual"], t["weight"]),
        moved=("input", "residual", "weight", "input", "residual"),
        in_place=("input", "residual"),
        terms=hidden_size,
    )


def silu_and_mul(width: int) -> Elementwise:
    return Elementwise(
        f"silu_and_mul_{width}",
        partial(_gated_tensors, width),
        lambda t: flashinfer.silu_and_mul(t["input"], out=t["out"]),
        _silu_reference,
        moved=("input", "out"),
    )


def _rope_tensors(heads: tuple[int, int, int], tokens: int, normal: Callable[..., torch.Tensor]) -> Tensors:
    """heads: (num_qo_heads, num_kv_heads, head_dim). cos, sin: of each token's angles, for the reference."""
    num_qo_heads, num_kv_heads, head_dim = heads
    q, k = normal(tokens, num_qo_heads, head_dim), normal(tokens, num_kv_heads, head_dim)
    pos_ids = torch.arange(tokens, device=q.device)
    frequency = ROPE_THETA ** (-torch.arange(0, head_dim, 2, device=q.device, dtype=torch.float64) / head_dim)
    angle = pos_ids.double()[:, None, None] * frequency
    return {"q": q, "k": k, "pos_ids": pos_ids, "cos": angle.cos(), "sin": angle.sin()}


def _rope_reference(t: Tensors) -> torch.Tensor:
    a, b = t["q"].chunk(2, dim=-1)
    return torch.cat([a * t["cos"] - b * t["sin"], b * t["cos"] + a * t["sin"]], dim=-1)


def _append_tensors(heads: tuple[int, int], tokens: int, normal: Callable[..., torch.Tensor]) -> Tensors:
    """heads: (num_kv_heads, head_dim). One request; `out` is a view of the K cache, the rows of the tokens."""
    pages = -(-tokens // PAGE_SIZE)
    caches = {name: normal(pages, PAGE_SIZE, *heads) for name in ("k_cache", "v_cache")}
    caches["out"] = caches["k_cache"].flatten(0, 1)[:tokens]
    rows = {name: normal(tokens, *heads) for name in ("key", "value")}
    count = partial(torch.arange, device=rows["key"].device, dtype=torch.int32)
    where = {"batch_indices": count(tokens) * 0, "positions": count(tokens), "kv_indices": count(pages)}
    return caches | rows | where | {"kv_indptr": count(2) * pages, "kv_last_page_len": count(1) + PAGE_SIZE}


def _append(t: Tensors) -> None:
    caches = (t["k_cache"], t["v_cache"])
    where = (t["batch_indices"], t["positions"])
    table = (t["kv_indices"], t["kv_indptr"], t["kv_last_page_len"])
    flashinfer.append_paged_kv_cache(t["key"], t["value"], *where, caches, *table)


def rope_pos_ids_inplace(heads: tuple[int, int, int]) -> Elementwise:
    return Elementwise(
        f"rope_pos_ids_inplace_{'-'.join(map(str, heads))}",
        partial(_rope_tensors, heads),
        lambda t: flashinfer.apply_rope_pos_ids_inplace(t["q"], t["k"], t["pos_ids"], rope_theta=ROPE_THETA),
        _rope_reference,
        moved=("q", "k", "q", "k", "pos_ids"),
        in_place=("q", "k"),
        terms=2,
    )


def append_paged_kv_cache(heads: tuple[int, int]) -> Elementwise:
    return Elementwise(
        f"append_paged_kv_cache_{'-'.join(map(str, heads))}",
        partial(_append_tensors, heads),
        _append,
        lambda t: t["key"],
        moved=("key", "value", "key", "value", "batch_indices", "positions"),
    )


def fused_rmsnorm_silu(hidden_size: int) -> Elementwise:
    return Elementwise(
        f"fused_rmsnorm_silu_{hidden_size}",
        partial(_norm_tensors, hidden_size),
        lambda t: flashinfer.fused_rmsnorm_silu(t["input"], t["weight"], EPS, out=t["out"]),
        lambda t: silu(_rms_reference(t["input"], t["weight"])),
        moved=("input", "weight", "out"),
        terms=hidden_size,
    )


def _fp4_tensors(heads: tuple[int, int], tokens: int, normal: Callable[..., torch.Tensor]) -> Tensors:
    """heads: (num_kv_heads, head_dim). One request, whose pages lie in order; v is the same as k."""
    num_heads, head_dim = heads
    pages, out = -(-tokens // PAGE_SIZE), normal(tokens, *heads)
    random = partial(torch.randint, dtype=torch.uint8, device=out.device)
    codes = random(256, (pages * PAGE_SIZE, num_heads, head_dim // 2))
    scales = random(1, 100, (pages * PAGE_SIZE, num_heads, head_dim // 16))
    count = partial(torch.arange, device=out.device, dtype=torch.int32)
    where = {"block_tables": count(pages)[None], "seq_lens": count(1) + tokens}
    rows = {"codes": codes[:tokens], "scales": scales[:tokens], "out": out, "out_v": normal(tokens, *heads)}
    return {"all_codes": codes, "all_scales": scales, **rows, **where, "one": torch.ones(1, device=out.device)}


def _dequantize_fp4(t: Tensors) -> None:
    codes, scales = (t[name].unflatten(0, (-1, PAGE_SIZE)) for name in ("all_codes", "all_scales"))
    outs = (t["out"][None], t["out_v"][None])
    where = (t["block_tables"], t["seq_lens"], t["one"], t["one"])
    flashinfer.nvfp4_kv_dequantize_paged((codes, codes), (scales, scales), *where, *outs)


def _fp4_reference(t: Tensors) -> torch.Tensor:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=t["out"].dtype, device=t["out"].device)
    codes = t["codes"].int()
    numbers = torch.cat([values, -values])[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)]
    factors = t["scales"].to(torch.uint8).view(torch.float8_e4m3fn).to(numbers.dtype)
    return numbers * factors.repeat_interleave(16, dim=-1)


def nvfp4_kv_dequantize_paged(heads: tuple[int, int]) -> Elementwise:
    return Elementwise(
        f"nvfp4_kv_dequantize_paged_{'-'.join(map(str, heads))}",
        partial(_fp4_tensors, heads),
        _dequantize_fp4,
        _fp4_reference,
        moved=("codes", "scales", "out", "codes", "scales", "out_v"),
    )


def row(op: Elementwise, tokens: int, device: str = "cuda") -> Row:
    """bf16 on a GPU, fp32 on the CPU."""
    shape = ElementwiseShape(op, tokens, torch.bfloat16 if device == "cuda" else torch.float32)
    peers = (COPY, EMPTY) if tokens <= FEW_TOKENS else (COPY,)
    return Row(f"{op.name}_t{tokens}", "elementwise", device, shape, make, call, peers, samples)


_OPS = (
    torch_add(4096),
    rmsnorm(4096),
    rmsnorm(8192),
    fused_add_rmsnorm(4096),
    fused_add_rmsnorm(8192),
    silu_and_mul(14336),
    rope_pos_ids_inplace((32, 8, 128)),
    append_paged_kv_cache((8, 128)),
    fused_rmsnorm_silu(4096),
    nvfp4_kv_dequantize_paged((8, 128)),
)

ROWS: tuple[Row, ...] = tuple(row(op, tokens) for op in _OPS for tokens in TOKENS)
COLD_ROWS = ("rmsnorm_4096_t64",)
