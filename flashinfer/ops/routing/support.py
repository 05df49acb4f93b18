"""Which implementation routes what: `supports(spec, arch) -> None or the reason why not`."""

from __future__ import annotations

from flashinfer.core.arch import Arch
from flashinfer.core.select import triton_missing
from flashinfer.ops.routing.spec import RoutingSpec

MAX_EXPERTS = 4096
MAX_GROUPS = 32
MAX_TOP_K = 64


def torch_supports(spec: RoutingSpec, arch: Arch) -> str | None:
    """The torch implementation runs everything."""
    return None


def triton_supports(spec: RoutingSpec, arch: Arch) -> str | None:
    """Triton needs a GPU or its interpreter; a program holds a token's scores, and compares all pairs of groups."""
    missing = triton_missing(arch)
    if missing is not None:
        return missing
    if spec.num_experts > MAX_EXPERTS:
        return f"a program holds the scores of at most {MAX_EXPERTS} experts in registers"
    if spec.num_groups > MAX_GROUPS:
        return f"all pairs of groups are compared, of at most {MAX_GROUPS}"
    if spec.top_k > MAX_TOP_K:
        return f"a program takes one expert after another, at most {MAX_TOP_K}"
    return None
