"""Host side of the Hopper prefill: tables, tensor maps and the launches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashinfer.core.arch import arch_of
from flashinfer.core.launch import Prebound, alignment
from flashinfer.core.workspace import Arena
from flashinfer.device.gluon import gl
from flashinfer.ops.attention.device.factors import factors_of, needs_natural_logits
from flashinfer.ops.attention.device.hooks import Hooks, hooks_of, launch_key, traits_of
from flashinfer.ops.attention.device.planner import PLANNER_BLOCK, launch_planner, planner_tables
from flashinfer.ops.attention.gluon_sm90.configs import choose, planner_config, section_tokens
from flashinfer.ops.attention.gluon_sm90.kernel import GluonConfig, Heads, Output, Tiles, prefill_kernel
from flashinfer.ops.attention.gluon_sm90.order import BINS, order_kernel
from flashinfer.ops.attention.plan import RECORD_FIELDS
from flashinfer.ops.attention.spec import AttentionSpec, Batch, Scales, Tensors
from flashinfer.ops.attention.variant import Variant

BOX_COLUMNS = 64
# 65,536 registers among 4 warpgroups of up to so many threads: what each warp starts with; the roles then trade.
MAX_REGISTERS = {2: 168, 3: 128}
_launch_order = Prebound(order_kernel)
_launch_prefill = Prebound(prefill_kernel)


@dataclass(frozen=True)
class GluonPlan:
    """What `run` needs of a plan; the tables live in the arena. key: see `Prebound`."""

    config: GluonConfig
    num_programs: int
    work: Tiles
    hooks: Hooks
    kv_indices: torch.Tensor | None
    key: Hashable


def plan(spec: AttentionSpec, batch: Batch, variant: Variant, arena: Arena) -> GluonPlan:
    """Make and sort the schedule on the device: two launches, nothing waits for them."""
    assert batch.total_rows is not None
    config = choose(spec, traits_of(variant))
    planner = planner_config(spec, config)
    hooks = hooks_of(variant)
    key = (spec, config, launch_key(variant))
    tables = planner_tables(arena, 1, batch, planner)
    launch_planner(planner, batch, tables, hooks.bounds, spec.uniform_qo_len, 1, key)
    capacity = -(-batch.total_rows // planner.block_m) + batch.batch_size
    work = Tiles(
        arena.private("work", (capacity, RECORD_FIELDS), torch.int32), arena.private("work_count", (1,), torch.int32)
    )
    uniform = spec.uniform_qo_len
    known = -1 if uniform is None else batch.batch_size * -(-uniform // planner.block_m)
    _launch_order(
        (1, 1, 1),
        (key, alignment(*tables, *work)),
        (
            tables,
            work,
            arena.private("bins", (BINS,), torch.int32),
            batch.batch_size,
            capacity,
            known,
            spec.page_size,
            section_tokens(spec, config),
            PLANNER_BLOCK,
        ),
        arena.device,
        num_warps=8,
    )
    items = capacity * spec.num_qo_heads
    num_programs = min(items, arch_of(arena.device).num_sms) if config.persistent else items
    return GluonPlan(config, num_programs, work, hooks, batch.kv_indices, (key, alignment(batch.kv_indices)))


def run(spec: AttentionSpec, plan: GluonPlan, tensors: Tensors, variant: Variant, scales: Scales) -> None:
    """One launch; writes `tensors.out` and `tensors.lse`."""
    q, k, v, out, lse = tensors
    natural = needs_natural_logits(scales)
    config = _natural(plan.config) if natural else plan.config
    factors = factors_of(scales)
    out_strides = out.stride()
    lse_stride = 0 if lse is None else lse.stride(0)
    optional = (lse is None, factors.logits_stride, factors.output_stride, scales.sinks is None)
    key = (plan.key, natural, out_strides[0] % 16, out_strides[1] % 16, lse_stride % 16, optional, alignment(*tensors))
    if not q.shape[0]:
        return
    arguments = (
        _tensor_map(q, (config.rows, 1, BOX_COLUMNS)),
        _kv_map(k, config),
        _kv_map(v, config),
        _tensor_map(out, (config.rows, 1, BOX_COLUMNS)),
        Output(out, out_strides[0], out_strides[1], lse, lse_stride),
        plan.work,
        plan.kv_indices,
        Heads(spec.num_qo_heads, spec.group_size),
        plan.hooks,
        factors,
        config,
    )
    grid = (plan.num_programs, 1, 1)
    _launch_prefill(grid, key, arguments, q.device, num_warps=4, maxnreg=MAX_REGISTERS[config.groups])


@cache
def box_layout(rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def _tensor_map(x: torch.Tensor, box: tuple[int, ...]) -> TensorDescriptor:
    """As the constructor makes it, less 10 us of checks that `support.gluon_sm90_layout` has made."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = x, list(x.shape), _strides(x)
    made.block_shape, made.layout, made.padding = list(box), box_layout(len(box)), "zero"
    return made


def _strides(x: torch.Tensor) -> list[int]:
    """Those of dimensions of size 1 mean nothing, but a tensor map wants them in multiples of 16 bytes too."""
    return [stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape[:-1], x.stride(), strict=False)] + [1]


def _kv_map(x: torch.Tensor, config: GluonConfig) -> TensorDescriptor:
    """Pages as they are; ragged tokens are one long page."""
    if x.shape[0] == 0:
        # No tensor map is that small. Nothing of it is seen: every request is without KV.
        x = x.new_zeros((1, *x.shape[1:]))
    if config.page_size == 0:
        x = x.transpose(0, 1)
    return _tensor_map(x, (1, config.box, 1, BOX_COLUMNS))


@cache
def _natural(config: GluonConfig) -> GluonConfig:
    return replace(config, natural_logits=True)
