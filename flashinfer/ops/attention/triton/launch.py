"""Host side of the Triton implementation: tables, workspace and the two launches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache

import torch

from flashinfer.core.arch import arch_of
from flashinfer.core.launch import Prebound, alignment, integer_classes
from flashinfer.core.workspace import Arena
from flashinfer.ops.attention.plan import RECORD_FIELDS, SHARE_FIELDS
from flashinfer.ops.attention.spec import AttentionSpec, Batch, Scales, Tensors
from flashinfer.ops.attention.triton.configs import Launch, block_m_for, choose
from flashinfer.ops.attention.triton.hooks import Hooks, hooks_of, launch_key, traits_of
from flashinfer.ops.attention.triton.kernel import KernelConfig, Outputs, Partials, Queries, attention_kernel
from flashinfer.ops.attention.triton.planner import Requests, ScheduleTables, planner_kernel
from flashinfer.ops.attention.triton.tiles import Factors, Pages
from flashinfer.ops.attention.variant import Variant

PLANNER_BLOCK = 1024
_launch_planner = Prebound(planner_kernel)
_launch_attention = Prebound(attention_kernel)


@dataclass(frozen=True)
class TritonPlan:
    """What `run` needs of a plan; the tables and partials live in the arena. key: see `Prebound`."""

    launch: Launch
    num_programs: int
    tables: ScheduleTables
    hooks: Hooks
    partials: Partials
    kv_indices: torch.Tensor | None
    key: Hashable


def plan(spec: AttentionSpec, batch: Batch, variant: Variant, arena: Arena) -> TritonPlan:
    """Make the schedule on the device: one launch, nothing waits for it."""
    assert batch.total_rows is not None
    arch = arch_of(arena.device)
    traits = traits_of(variant)
    launch = choose(spec, arch, traits, block_m_for(spec, arch, traits, batch.total_rows / max(1, batch.batch_size)))
    cfg = launch.kernel
    num_programs = launch.programs_per_sm * arch.num_sms
    tables = _tables(arena, num_programs, batch, cfg)
    hooks = hooks_of(variant)
    # The functions are those of the variant, and the dtypes those of the spec that `launch` was made for.
    key = (launch, launch_key(variant))
    indices = Requests(batch.qo_indptr, batch.kv_indptr, batch.last_page_len)
    uniform = spec.uniform_qo_len or 0
    _launch_planner(
        (1, 1, 1),
        (key, alignment(*indices), uniform),
        (indices, tables, hooks.bounds, batch.batch_size, batch.total_rows, num_programs, cfg, uniform, PLANNER_BLOCK),
        arena.device,
        num_warps=8,
    )
    partials = _partials(arena, num_programs, cfg)
    run_key = (key, alignment(batch.kv_indices))
    return TritonPlan(launch, num_programs, tables, hooks, partials, batch.kv_indices, run_key)


def _tables(arena: Arena, num_programs: int, batch: Batch, cfg: KernelConfig) -> ScheduleTables:
    assert batch.total_rows is not None
    capacity = -(-batch.total_rows * cfg.group // cfg.block_m) + batch.batch_size
    return ScheduleTables(
        arena.private("first", (capacity + 1,), torch.int64),
        # One record past the end may be read ahead; it is never worked on.
        arena.private("records", (capacity + 1, RECORD_FIELDS), torch.int64),
        arena.private("shares", (num_programs + 1, SHARE_FIELDS), torch.int64),
        arena.private("tile_base", (batch.batch_size + 1,), torch.int32),
    )


def _partials(arena: Arena, num_programs: int, cfg: KernelConfig) -> Partials:
    slots = 2 * num_programs
    shapes = {"o": ((slots, cfg.block_m, cfg.block_vo), torch.float32), "lse": ((slots, cfg.block_m), torch.float32)}
    scratch = arena.shared(shapes)
    return Partials(scratch["o"], scratch["lse"], arena.private("counters", (num_programs,), torch.int32, zero=True))


def run(spec: AttentionSpec, plan: TritonPlan, tensors: Tensors, variant: Variant, scales: Scales) -> None:
    """One launch; writes `tensors.out` and `tensors.lse`."""
    q, k, v, out, lse = tensors
    # The maximum of products is that of logits only under one positive factor.
    natural = scales.logits is not None or scales.sm_scale <= 0
    cfg = _natural(plan.launch.kernel) if natural else plan.launch.kernel
    q_strides, k_strides, v_strides, out_strides = q.stride(), k.stride(), v.stride(), out.stride()
    lse_stride = 0 if lse is None else lse.stride(0)
    factors = _factors(scales)
    strides = (
        integer_classes(q_strides),
        integer_classes(k_strides),
        integer_classes(v_strides),
        integer_classes(out_strides),
        lse_stride,
    )
    optional = (lse is None, factors.logits_stride, factors.output_stride, scales.sinks is None)
    key = (plan.key, natural, strides, optional, alignment(*tensors, scales.logits, scales.output, scales.sinks))
    arguments = (
        Queries(q, q_strides[0], q_strides[1]),
        Pages(k, v, plan.kv_indices, *k_strides[:3], *v_strides[:3]),
        Outputs(out, out_strides[0], out_strides[1], lse, lse_stride),
        plan.tables,
        plan.partials,
        plan.hooks,
        factors,
        cfg,
    )
    _launch_attention((plan.num_programs, 1, 1), key, arguments, q.device, num_warps=plan.launch.num_warps)


@cache
def _natural(cfg: KernelConfig) -> KernelConfig:
    return replace(cfg, natural_logits=True)


def _factors(scales: Scales) -> Factors:
    """The kernel's form; a stride of -1 stands for a factor that is not there, 0 for one value for all heads."""
    logits, output = (-1 if factor is None else int(factor.numel() > 1) for factor in (scales.logits, scales.output))
    return Factors(scales.sm_scale, scales.output_scale, scales.logits, logits, scales.output, output, scales.sinks)
