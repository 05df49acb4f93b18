"""Which implementation runs which rows: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

from flashinfer.core.arch import Arch
from flashinfer.core.select import triton_missing
from flashinfer.ops.sampling.spec import RowSpec

# A program holds two numbers for each group of at most 1024 tokens, 8192 groups of them.
MAX_VOCAB = 1 << 23
# A program holds the candidates, about one and a half times k, in its registers.
MAX_SELECTED = 4096


def torch_supports(spec: RowSpec, arch: Arch) -> str | None:
    """The torch implementation runs everything."""
    return None


def triton_supports(spec: RowSpec, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter."""
    missing = triton_missing(arch)
    if missing is not None:
        return missing
    if spec.vocab_size == 1:
        return "one token needs no kernel"
    if spec.vocab_size > MAX_VOCAB:
        return f"one program holds the statistics of at most {MAX_VOCAB} tokens"
    if spec.k > MAX_SELECTED:
        return f"one program selects at most {MAX_SELECTED} numbers"
    return None
