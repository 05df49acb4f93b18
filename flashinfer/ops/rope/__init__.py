"""Rotary position embedding (RoPE)."""

from flashinfer.ops.rope.reference import Rope, Smoothing, angles, request_positions, rotate_by_angles, rotate_inplace

__all__ = ["Rope", "Smoothing", "angles", "request_positions", "rotate_by_angles", "rotate_inplace"]
