"""Host side of the Triton implementation: tables, workspace and the two launches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache

import torch

from flashinfer.core.arch import arch_of
from flashinfer.core.launch import Prebound, alignment, integer_classes
from flashinfer.core.workspace import Arena
from flashinfer.ops.attention.device.factors import factors_of, needs_natural_logits
from flashinfer.ops.attention.device.hooks import Hooks, hooks_of, launch_key, traits_of
from flashinfer.ops.attention.device.planner import ScheduleTables, launch_planner, planner_tables
from flashinfer.ops.attention.spec import AttentionSpec, Batch, Scales, Tensors
from flashinfer.ops.attention.triton.configs import Launch, block_m_for, choose, planner_config
from flashinfer.ops.attention.triton.kernel import KernelConfig, Outputs, Partials, Queries, attention_kernel
from flashinfer.ops.attention.triton.tiles import Pages
from flashinfer.ops.attention.variant import Variant

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
    planner = planner_config(cfg)
    num_programs = launch.programs_per_sm * arch.num_sms
    tables = planner_tables(arena, num_programs, batch, planner)
    hooks = hooks_of(variant)
    # The functions are those of the variant, and the dtypes those of the spec that `launch` was made for.
    key = (launch, launch_key(variant))
    launch_planner(planner, batch, tables, hooks.bounds, spec.uniform_qo_len, num_programs, launch_key(variant))
    partials = _partials(arena, num_programs, cfg)
    run_key = (key, alignment(batch.kv_indices))
    return TritonPlan(launch, num_programs, tables, hooks, partials, batch.kv_indices, run_key)


def _partials(arena: Arena, num_programs: int, cfg: KernelConfig) -> Partials:
    slots = 2 * num_programs
    shapes = {"o": ((slots, cfg.block_m, cfg.block_vo), torch.float32), "lse": ((slots, cfg.block_m), torch.float32)}
    scratch = arena.shared(shapes)
    return Partials(scratch["o"], scratch["lse"], arena.private("counters", (num_programs,), torch.int32, zero=True))


def run(spec: AttentionSpec, plan: TritonPlan, tensors: Tensors, variant: Variant, scales: Scales) -> None:
    """One launch; writes `tensors.out` and `tensors.lse`."""
    q, k, v, out, lse = tensors
    natural = needs_natural_logits(scales)
    cfg = _natural(plan.launch.kernel) if natural else plan.launch.kernel
    q_strides, k_strides, v_strides, out_strides = q.stride(), k.stride(), v.stride(), out.stride()
    lse_stride = 0 if lse is None else lse.stride(0)
    factors = factors_of(scales)
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
