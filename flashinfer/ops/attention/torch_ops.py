"""Attention as torch ops: what `torch.compile` sees of it.

A plan stays out of the graph: an op is given the number of a session, and finds there what the last `plan` made. So
planning another batch changes nothing that a compiled graph depends on. Eager calls do not come here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashinfer.core import library
from flashinfer.ops.attention.options import Scale, scales_of
from flashinfer.ops.attention.session import SESSIONS

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
# What a result is allocated by: (num_qo_heads, head_dim_vo, dtype).
Shape = tuple[int, int, torch.dtype]


def join_scales(tensors: Sequence[torch.Tensor | None], numbers: Sequence[float]) -> list[Scale]:
    """What `split_scales` took apart: a tensor or a number each."""
    return [number if x is None else x for x, number in zip(tensors, numbers, strict=True)]


def split_scales(scales: Sequence[Scale]) -> tuple[list[torch.Tensor | None], list[float]]:
    """Tensors, None where there is a number instead; numbers, 1 where there is a tensor or nothing."""
    tensors = [x if isinstance(x, torch.Tensor) else None for x in scales]
    return tensors, [1.0 if x is None or isinstance(x, torch.Tensor) else float(x) for x in scales]


@library.register(
    "attention_run(Tensor(a!)[] results, Tensor[] qkv, Tensor?[] tensors, float[] numbers, bool[] made, "
    "SymInt session) -> ()"
)
def attention_run(
    results: list[torch.Tensor],
    qkv: list[torch.Tensor],
    tensors: list[torch.Tensor | None],
    numbers: list[float],
    made: list[bool],
    session: int,
) -> None:
    """What a session planned. results: out, and lse if wanted; made: which of them is not the caller's own.

    qkv: q and NHD pages of k and v. tensors, numbers: q, k, v and o scales of `split_scales`; tensors also has sinks.
    """
    planned = SESSIONS.get(session)
    if planned is None:
        raise RuntimeError("run() of a wrapper that does not exist any more. Keep the wrapper as long as its graph.")
    planned.require_plan()
    q, k, v = qkv
    out, lse = (*results, None)[:2]
    q_scale, k_scale, v_scale, o_scale = join_scales(tensors[:4], numbers)
    scales = scales_of(planned.options.sm_scale, planned.spec, q, q_scale, k_scale, v_scale, o_scale, tensors[4])
    planned.run((q, k, v), scales, out, lse, made=(made[0], made[-1]))


def run(session: int, shape: Shape | None, qkv: QKV, factors: Sequence[Any], outputs: tuple[Any, Any, bool]) -> Result:
    """`attention_run` with results made where they are not given.

    factors: q, k, v and o scales, sinks. outputs: out, lse, whether lse is wanted.
    """
    if shape is None:
        raise RuntimeError("run() was called before plan(). Call plan(...) with this step's index arrays first.")
    results, made = results_of(shape, qkv[0], outputs)
    tensors, numbers = split_scales(factors[:4])
    attention_run(results, list(qkv), [*tensors, factors[4]], numbers, made, session)
    return (results[0], results[1]) if outputs[2] else results[0]


def results_of(shape: Shape, q: torch.Tensor, outputs: tuple[Any, Any, bool]) -> tuple[list[torch.Tensor], list[bool]]:
    """Out and, if wanted or given, lse; whether they were made here."""
    out, lse, return_lse = outputs
    made = [out is None, lse is None]
    if out is None:
        out = torch.empty((q.shape[0], *shape[:2]), dtype=shape[2], device=q.device)
    if lse is None and not return_lse:
        return [out], made[:1]
    if lse is None:
        lse = torch.empty((q.shape[0], shape[0]), dtype=torch.float32, device=q.device)
    return [out, lse], made
