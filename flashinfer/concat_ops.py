"""Concatenation of the parts of keys, with FlashInfer's names and signatures."""

from __future__ import annotations

import torch

from flashinfer.core import check
from flashinfer.ops import quantization as ops


def concat_mla_k(k: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor, *, backend: str = "default") -> None:
    """Fill keys of multi-head latent attention, in place: `k_nope` of each head, then the `k_rope` all heads share.

    k `[nnz, num_heads, nope_dim + rope_dim]`, k_nope `[nnz, num_heads, nope_dim]`, k_rope `[nnz, 1, rope_dim]`: one
    dtype, fp8 included, innermost stride 1, otherwise any strides. backend: "default" and "auto" mean the same.
    """
    check.choice("backend", backend, ("default", "auto"))
    stored = check.FLOAT_DTYPES + check.FP8_DTYPES
    check.tensor("k", k, dtypes=stored, shape=(None, None, None), inner_contiguous=True)
    nnz, num_heads, head_dim = k.shape
    like = ("k", k)
    check.tensor("k_rope", k_rope, dtypes=(k.dtype,), shape=(nnz, 1, None), like=like, inner_contiguous=True)
    shape = (nnz, num_heads, head_dim - k_rope.shape[2])
    check.tensor("k_nope", k_nope, dtypes=(k.dtype,), shape=shape, like=like, inner_contiguous=True)
    ops.concat_heads(k, k_nope, k_rope)
