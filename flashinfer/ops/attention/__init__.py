"""Attention over ragged and paged KV: one schedule, any variant."""

from flashinfer.core.select import Impl
from flashinfer.ops.attention.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.attention.triton", triton_supports),
    Impl("torch", "flashinfer.ops.attention.reference", torch_supports),
)
