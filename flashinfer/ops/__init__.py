"""One folder per op: its meaning, its plan, its kernels."""
