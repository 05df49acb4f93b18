"""Attention for Hopper in Gluon: warp-specialised prefill."""

from flashinfer.ops.attention.gluon_sm90.launch import plan, run

__all__ = ["plan", "run"]
