"""Triton functions that the kernels of all implementations share."""
