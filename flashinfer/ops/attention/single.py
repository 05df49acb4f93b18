"""Attention of one request: a plan and a run in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashinfer.core import library
from flashinfer.ops.attention.options import Options
from flashinfer.ops.attention.spec import Batch
from flashinfer.ops.attention.torch_ops import QKV, Result, join_scales, results_of, split_scales
from flashinfer.ops.attention.wrapper import BatchWrapper, attention_spec, data_types

Masks = Sequence[torch.Tensor | None]
# out, lse, whether lse is wanted
Outputs = tuple[torch.Tensor | None, torch.Tensor | None, bool]


def attend(
    qkv: QKV,
    options: Options,
    factors: Sequence[Any],
    masks: Masks,
    backend: str,
    o_dtype: torch.dtype,
    outputs: Outputs,
) -> Result:
    """qkv: q `[qo_len, num_qo_heads, head_dim]`, k and v as pages of one token. masks: custom, packed.

    factors: q, k and v scales.
    """
    q, k, v = qkv
    dtypes = data_types(q.dtype, k.dtype, o_dtype, ("q", "k", "o_dtype"))
    spec = attention_spec((q.shape[1], k.shape[2]), (q.shape[2], v.shape[3]), None, dtypes, uniform_qo_len=None)
    wrapper = BatchWrapper(torch.empty(0, dtype=torch.uint8, device=q.device), "NHD", False, backend)
    bits = torch.tensor([0, q.shape[0] * k.shape[0]])
    custom, packed = (None if m is None else m.reshape(-1) for m in masks)
    mask = wrapper._mask_variant(custom, packed, bits)
    qo_indptr, kv_indptr = (_bounds(x.shape[0], q.device) for x in (q, k))
    batch = Batch(qo_indptr, kv_indptr, None, None, 1, q.shape[0], k.shape[0], covers_rows=True)
    wrapper._plan(spec, batch, options, mask)
    return wrapper._run((q, k, v), (*factors, None, None), outputs)


def _bounds(length: int, device: torch.device) -> torch.Tensor:
    """[0, length] on `device`, made there: an upload from pageable memory would wait for the device."""
    return torch.arange(2, dtype=torch.int32, device=device) * length


@library.register(
    "single_attention(Tensor(a!)[] results, Tensor[] qkv, Tensor?[] masks, Tensor?[] tensors, float[] numbers, "
    "float[] options, str pos_encoding_mode, str backend) -> ()"
)
def single_attention(
    results: list[torch.Tensor],
    qkv: list[torch.Tensor],
    masks: list[torch.Tensor | None],
    tensors: list[torch.Tensor | None],
    numbers: list[float],
    options: list[float],
    pos_encoding_mode: str,
    backend: str,
) -> None:
    """`attend` to results: out, and lse if wanted. options: the fields of `Options` as numbers, but for the mode."""
    causal, window_left, soft_cap, *scales = options
    chosen = Options(bool(causal), int(window_left), soft_cap, pos_encoding_mode, *scales)
    q, k, v = qkv
    out, lse = (*results, None)[:2]
    assert out is not None
    attend((q, k, v), chosen, join_scales(tensors, numbers), masks, backend, out.dtype, (out, lse, lse is not None))


def run(
    qkv: QKV,
    options: Options,
    factors: Sequence[Any],
    masks: Masks,
    backend: str,
    o_dtype: torch.dtype | None,
    return_lse: bool,
) -> Result:
    """`attend` to new results; under `torch.compile` as the op, which is where tracing ends."""
    q, k, v = qkv
    out_dtype = data_types(q.dtype, k.dtype, o_dtype, ("q", "k", "o_dtype"))[2]
    outputs = (None, None, return_lse)
    if not torch.compiler.is_dynamo_compiling():
        return attend(qkv, options, factors, masks, backend, out_dtype, outputs)
    results, _ = results_of((q.shape[1], v.shape[3], out_dtype), q, outputs)
    numbers = [float(options.causal), float(options.window_left), options.logits_soft_cap]
    numbers += [options.sm_scale, options.rope_scale, options.rope_theta]
    mode = options.pos_encoding_mode
    single_attention(results, list(qkv), list(masks), *split_scales(factors), numbers, mode, backend)
    return (results[0], results[1]) if return_lse else results[0]
