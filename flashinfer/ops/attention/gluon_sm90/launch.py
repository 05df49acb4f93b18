"""Host side of the Hopper prefill: tables, tensor maps and the launches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashinfer.core.arch import arch_of
from flashinfer.core.launch import Prebound, alignment, integer_classes
from flashinfer.core.workspace import Arena
from flashinfer.device.gluon import gl
from flashinfer.ops.attention.device.arguments import Factors, Output, call_key, config_for
from flashinfer.ops.attention.device.hooks import Hooks, hooks_of, launch_key, traits_of
from flashinfer.ops.attention.device.planner import PLANNER_BLOCK, launch_planner, planner_tables
from flashinfer.ops.attention.gluon_sm90.configs import choose, planner_config, section_tokens
from flashinfer.ops.attention.gluon_sm90.kernel import MAX_REGISTERS, GluonConfig, Heads, Tiles, prefill_kernel
from flashinfer.ops.attention.gluon_sm90.order import BINS, order_kernel
from flashinfer.ops.attention.gluon_sm90.producer import BOX_COLUMNS, COPY, Cache
from flashinfer.ops.attention.plan import RECORD_FIELDS
from flashinfer.ops.attention.spec import AttentionSpec, Batch, Scales, Tensors
from flashinfer.ops.attention.variant import Variant

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
    launch_planner(planner, batch, tables, hooks.bounds, None, 1, key)
    capacity = -(-batch.total_rows // planner.block_m) + batch.batch_size
    work = Tiles(
        arena.private("work", (capacity, RECORD_FIELDS), torch.int32), arena.private("work_count", (1,), torch.int32)
    )
    _launch_order(
        (1, 1, 1),
        (key, alignment(*tables, *work)),
        (
            tables,
            work,
            arena.private("bins", (BINS,), torch.int32),
            batch.batch_size,
            capacity,
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
    q, k, v, out, _ = tensors
    if not q.shape[0]:
        return
    config = config_for(plan.config, scales)
    output, factors = Output.of(tensors), Factors.of(scales)
    keys, values = _source(k, config), _source(v, config)
    # The strides of tensor maps are not compiled in, those of gathered tensors are.
    strides = () if config.box else (integer_classes(keys[1:]), integer_classes(values[1:]))
    key = (plan.key, config.natural_logits, strides, call_key(tensors, output, factors))
    arguments = (
        _tensor_map(q, (config.rows, 1, BOX_COLUMNS.value)),
        keys,
        values,
        _tensor_map(out, (config.rows, 1, BOX_COLUMNS.value)),
        output,
        plan.work,
        plan.kv_indices,
        Heads(spec.num_qo_heads, spec.group_size),
        plan.hooks,
        factors,
        config,
    )
    _launch_prefill((plan.num_programs, 1, 1), key, arguments, q.device, num_warps=4, maxnreg=MAX_REGISTERS)


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


def _source(x: torch.Tensor, config: GluonConfig) -> TensorDescriptor | Cache:
    """K or V: pages as they are, by tensor map or to be gathered; ragged tokens are one long page."""
    if config.box == 0:
        return Cache(x, *(stride // COPY.value for stride in x.stride()[:3]))
    if x.shape[0] == 0:
        # No tensor map is that small. Nothing of it is seen: every request is without KV.
        x = x.new_zeros((1, *x.shape[1:]))
    if config.page_size == 0:
        x = x.transpose(0, 1)
    return _tensor_map(x, (1, config.box, 1, BOX_COLUMNS.value))
