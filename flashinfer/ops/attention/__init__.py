"""Attention over ragged and paged KV: one schedule, any variant."""

from flashinfer.core.select import Impl
from flashinfer.ops.attention.support import gluon_sm90_layout, gluon_sm90_supports, torch_supports, triton_supports

IMPLS = (
    Impl("gluon_sm90", "flashinfer.ops.attention.gluon_sm90", gluon_sm90_supports, gluon_sm90_layout),
    Impl("triton", "flashinfer.ops.attention.triton", triton_supports),
    Impl("torch", "flashinfer.ops.attention.reference", torch_supports),
)
