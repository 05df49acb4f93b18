"""Launches of a mixture of experts: two products between a sort and a sum; no host sync, no value read on the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import triton

from flashinfer.core import tuning
from flashinfer.core.arch import Arch
from flashinfer.core.launch import Prebound, alignment, integer_classes, pointers, token
from flashinfer.core.scratch import Scratch
from flashinfer.device.finish import PAIRED, SINGLE, Finish, finish_with
from flashinfer.ops.gemm import CHOICE as GEMM_CHOICE
from flashinfer.ops.gemm import MAP_BYTES, Epilogue, Gemm, Rows, Weights, grouped_gemm
from flashinfer.ops.moe.spec import BLOCK, Experts, MoE, MoESpec
from flashinfer.ops.moe.triton.combine import Parts, combine_kernel
from flashinfer.ops.moe.triton.configs import (
    FEW_TOKENS,
    SCAN,
    WARPS_SORT,
    Tiles,
    candidates,
    combine_config,
    few_config,
    pays_for_neighbours,
    rows_config,
    slots_of,
    sort_blocks,
    sort_config,
    tiles_of,
    tuning_key,
)
from flashinfer.ops.moe.triton.few import Input, Matrices, Output, Pairs, few_kernel
from flashinfer.ops.moe.triton.prepare import Gathered, cast_kernel, rows_kernel
from flashinfer.ops.moe.triton.sort import Sorted, count_kernel, place_kernel

E4M3 = torch.float8_e4m3fn
OP = "moe"

_count = Prebound(count_kernel)
_place = Prebound(place_kernel)
_few = Prebound(few_kernel)
_combine = Prebound(combine_kernel)
_rows = Prebound(rows_kernel)
_cast = Prebound(cast_kernel)


class Call(NamedTuple):
    """What every part of a call takes."""

    spec: MoESpec
    arch: Arch
    tensors: MoE
    scratch: Scratch

    @property
    def few(self) -> bool:
        return self.tensors.x.shape[0] <= FEW_TOKENS

    @property
    def early(self) -> bool:
        """Whether each launch may begin before the one before it has ended, and waits itself."""
        return self.few and self.arch.launches_early

    @property
    def options(self) -> dict[str, bool]:
        return {"launch_pdl": True} if self.early else {}


def bind(spec: MoESpec, arch: Arch) -> Callable[[MoE, Scratch], None]:
    """The call for one kind."""

    def run(tensors: MoE, scratch: Scratch) -> None:
        call = Call(spec, arch, tensors, scratch)
        (_run_few if call.few else _run_many)(call)

    return run


def _keyed(*integers: int) -> Hashable:
    return integer_classes(integers)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """fp8 as bytes, other tensors as they are."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x


# ---- sorting


def sort_pairs(call: Call, order: bool, tokens: bool, rows: bool) -> Sorted:
    """Pairs sorted by expert; order, tokens, rows: which of these are wanted."""
    spec, _, tensors, scratch = call
    ids = tensors.routes.ids
    cfg, num_pairs = sort_config(spec, call.early), ids.numel()
    blocks, per_block = sort_blocks(num_pairs)

    def made(size: int, wanted: bool = True) -> torch.Tensor | None:
        return scratch.empty((size,), torch.int32) if wanted else None

    counts = made(blocks * cfg.num_experts, blocks > 1)
    out = Sorted(made(spec.num_experts + 1), *(made(num_pairs, wanted) for wanted in (order, tokens, rows)))  # type: ignore[arg-type]
    key = token(cfg, ids.dtype, order, tokens, rows, blocks > 1), alignment(ids)
    first, options = tensors.routes.first_expert, {"num_warps": WARPS_SORT, **call.options}
    if counts is not None:
        _count((blocks, 1, 1), key, (counts, ids, num_pairs, per_block, first, cfg), ids.device, **options)
    arguments = (out, counts, ids, num_pairs, per_block, blocks, first, cfg)
    _place((blocks, 1, 1), key, arguments, ids.device, **options)
    return out


# ---- few tokens


def _run_few(call: Call) -> None:
    """Two launches for the products, one for the sum; one more to sort where there are many pairs.

    And one before each product to quantise its rows where their kind asks for it.
    """
    spec, _, tensors, scratch = call
    x, routes = tensors.x, tensors.routes
    num_pairs = routes.ids.numel()
    pairs = Pairs(routes.ids, None, None)
    if num_pairs > SCAN:
        by_expert = sort_pairs(call, order=True, tokens=False, rows=False)
        pairs = Pairs(routes.ids, by_expert.indptr, by_expert.order)
    hidden = scratch.empty((num_pairs, spec.intermediate_size), spec.hidden_dtype)
    _few_product(call, pairs, x, hidden)
    parts = _few_product(call, pairs, hidden, None)
    combine(call, parts, None)


def _few_product(call: Call, pairs: Pairs, x: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """The first product into `hidden`, or, without it, the second into parts `[splits, pairs, hidden_size]`."""
    spec, arch, tensors, scratch = call
    num_tokens, first = tensors.x.shape[0], hidden is not None
    scale = None
    if spec.kind == "fp8_block":
        x, scale = _arranged(call, x, None, x.shape[0], quantise=True)
    side = Input(_bytes(x), x.stride(0), scale, 0 if scale is None else scale.stride(0))

    def run(tiles: Tiles, memory: Scratch) -> torch.Tensor:
        out = hidden
        if out is None:
            out = memory.empty((tiles.splits, pairs.ids.numel(), spec.hidden_size), torch.float32)
        _launch_few(call, pairs, side, out, tiles)
        return out

    if tuning.measuring(OP, x.device):
        key, tries = tuning_key(spec, num_tokens, first), candidates(spec, arch, num_tokens, first)
        tuning.measure(key, arch, x.device, tries, lambda tiles: run(tiles, Scratch(x, None)))
    return run(tiles_of(spec, arch, num_tokens, first), scratch)


def _launch_few(call: Call, pairs: Pairs, side: Input, out: torch.Tensor, tiles: Tiles) -> None:
    """One product, the first one where `out` has no splits."""
    spec, arch, tensors, _ = call
    experts, num_tokens = tensors.experts, tensors.x.shape[0]
    first = out.dim() == 2
    weights = experts.fc1 if first else experts.fc2
    cfg = few_config(spec, arch, num_tokens, tiles, first, call.early)
    activation = (PAIRED if spec.gated else SINGLE)[spec.activation] if first else None
    scale = experts.hidden_scale if first else None
    matrices, finish = _matrices(weights), _finish(experts, first)
    output = Output(_bytes(out), scale, int(scale is not None and scale.numel() > 1))
    numbers = (side.stride, side.scale_stride, *matrices[1:4], *matrices[5:], finish.bias_stride, finish.matrix_stride)
    tensors_of = (*output[:2], side.data, side.scale, matrices.data, matrices.scale, *pairs, *_tensors(finish))
    key = (token(spec, cfg, tiles, _keyed(*numbers, output.scale_stride)), pointers(*tensors_of))
    columns = tiles.block_r // 2 if cfg.gated else tiles.block_r
    slots = slots_of(spec, num_tokens) if cfg.scan else spec.num_experts
    grid = (triton.cdiv(cfg.width, columns), slots, tiles.splits)
    arguments = (output, side, matrices, pairs, finish, pairs.ids.numel(), tensors.routes.first_expert, activation, cfg)
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **call.options}
    _few(grid, key, arguments, out.device, **options)


def _matrices(weights: Weights) -> Matrices:
    scale = None if weights.scale is None else weights.scale.view(_scale_dtype(weights))
    scale_strides = (0, 0, 0) if scale is None else scale.stride()
    return Matrices(_bytes(weights.values), *weights.values.stride(), scale, *scale_strides)


def _scale_dtype(weights: Weights) -> torch.dtype:
    return torch.uint8 if weights.kind == "mxfp4" else torch.float32


def _finish(experts: Experts, first: bool) -> Finish:
    """What is done to the sums of a product; the second one's bias is added in the sum over experts."""
    weights, bias = (experts.fc1, experts.bias1) if first else (experts.fc2, None)
    parameters = experts.activation[1:] if first else (None, None, None)
    return finish_with(bias, None, parameters, None, weights.global_scale)


def _tensors(finish: Finish) -> tuple[torch.Tensor | None, ...]:
    return tuple(x for x in finish if not isinstance(x, int))


# ---- the sum over a token's experts


def combine(call: Call, y: torch.Tensor, rows: torch.Tensor | None) -> None:
    """Write `out`. y: `[splits, pairs, hidden_size]`; rows: the row of each pair, None: rows are pairs."""
    spec, _, tensors, _ = call
    out, routes, bias = tensors.out, tensors.routes, tensors.experts.bias2
    if rows is not None:
        bias = None  # the product has added it
    cfg = combine_config(spec, y.shape[0], few=rows is None, early=call.early)
    parts = Parts(y, y.stride(0), rows, bias, 0 if bias is None else bias.stride(0))
    used = (out, y, rows, bias, routes.ids, routes.weights)
    # The stride between parts is that of all pairs: any number.
    key = (token(cfg, _keyed(parts.split_stride, parts.bias_stride)), pointers(*used))
    grid = (out.shape[0], triton.cdiv(spec.hidden_size, cfg.block), 1)
    arguments = (out, out.stride(0), parts, routes.ids, routes.weights, routes.first_expert, cfg)
    _combine(grid, key, arguments, out.device, num_warps=4, **call.options)


# ---- many tokens


def _run_many(call: Call) -> None:
    """Sort, two grouped products, sum; rows are quantised, or gathered, between them where their kind asks for it."""
    spec, _, tensors, scratch = call
    x, routes, experts = tensors.x, tensors.routes, tensors.experts
    cast = spec.kind == "fp8_tensor"
    places = sort_pairs(call, order=cast, tokens=True, rows=True)
    num_pairs = routes.ids.numel()
    hidden = scratch.empty((num_pairs, spec.intermediate_size), torch.float32 if cast else spec.hidden_dtype)
    rows, epilogue = Rows(x, places.indptr, places.tokens), Epilogue(experts.bias1, experts.activation)
    product = Gemm(hidden, rows, experts.fc1, epilogue)
    if spec.kind == "fp8_block" or wants_neighbours(product) or pays_for_neighbours(spec, call.arch, num_pairs):
        values, scale = _arranged(call, x, places, num_pairs, quantise=spec.kind == "fp8_block")
        rows = Rows(values, places.indptr, scale=scale)
    grouped_gemm(rows, experts.fc1, epilogue, out=hidden)
    scale = None
    if cast:
        hidden = _cast_hidden(call, hidden, places)
    elif spec.kind == "fp8_block":
        hidden, scale = _arranged(call, hidden, None, num_pairs, quantise=True)
    y = scratch.empty((num_pairs, spec.hidden_size), spec.out_dtype)
    grouped_gemm(Rows(hidden, places.indptr, scale=scale), experts.fc2, Epilogue(experts.bias2), out=y)
    combine(call, y[None], places.rows)


def wants_neighbours(product: Gemm) -> bool:
    """Whether another implementation, a better one, takes the product once its gathered rows lie side by side."""
    spec, device = product.spec, product.out.device
    values = product.rows.values
    whole = values.shape[1] * values.element_size() % MAP_BYTES == 0
    beside = spec._replace(gathered=False, row_map=whole)
    return GEMM_CHOICE.module(beside, device) is not GEMM_CHOICE.module(spec, device)


def _arranged(
    call: Call, x: torch.Tensor, places: Sorted | None, num_rows: int, quantise: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of `x`, in the order of experts where places are given; quantise: as e4m3 and scales."""
    arch, scratch = call.arch, call.scratch
    width = x.shape[1]
    out = scratch.empty((num_rows, width), E4M3 if quantise else x.dtype)
    scales = scratch.empty((num_rows, triton.cdiv(width, BLOCK)), torch.float32) if quantise else None
    gathered = Gathered(None, None) if places is None else Gathered(places.tokens, places.indptr[-1:])
    cfg = rows_config(arch, quantise, call.early)
    key = (token(cfg, x.dtype, places is None, _keyed(width, x.stride(0))), alignment(x, *gathered))
    arguments = (_bytes(out), scales, _bytes(x), gathered, num_rows, width, x.stride(0), cfg)
    grid = (triton.cdiv(num_rows, cfg.rows), triton.cdiv(width, cfg.columns), 1)
    _rows(grid, key, arguments, x.device, num_warps=4, **call.options)
    return out, scales


def _cast_hidden(call: Call, hidden: torch.Tensor, places: Sorted) -> torch.Tensor:
    """fp32 activations times `hidden_scale`, in e4m3."""
    _, arch, tensors, scratch = call
    num_rows, width = hidden.shape
    ids, scale = tensors.routes.ids, tensors.experts.hidden_scale
    assert scale is not None
    out = scratch.empty((num_rows, width), E4M3)
    cfg = rows_config(arch, quantise=True, early=False)
    count = places.indptr[-1:]
    stride = int(scale.numel() > 1)
    key = (token(cfg, ids.dtype, _keyed(width, stride)), alignment(ids, scale, count))
    arguments = (_bytes(out), hidden, scale, ids, places.order, count, width, tensors.routes.first_expert, stride, cfg)
    grid = (triton.cdiv(num_rows, cfg.rows), triton.cdiv(width, cfg.columns), 1)
    _cast(grid, key, arguments, hidden.device, num_warps=4)
    return out
