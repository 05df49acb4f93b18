"""Grouped matrix products for Hopper in Gluon: warp-specialised, with tensor maps and asynchronous products."""

from flashinfer.ops.gemm.gluon_sm90.launch import bind

__all__ = ["bind"]
