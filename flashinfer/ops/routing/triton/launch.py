"""Launch of the routing kernels."""

from __future__ import annotations

from collections.abc import Callable

import triton

from flashinfer.core.arch import Arch
from flashinfer.core.launch import Prebound, pointers, token
from flashinfer.ops.routing.spec import Routing, RoutingSpec
from flashinfer.ops.routing.triton.kernel import SCORES, Outputs, RoutingConfig, choose_kernel, lookup_kernel

# A warp holds this many scores, 16 a thread; more of them are shared by several warps.
WARP_PLACES = 512

_choose = Prebound(choose_kernel)
_lookup = Prebound(lookup_kernel)


def config_of(spec: RoutingSpec) -> RoutingConfig:
    """The kernel's view of a spec."""
    return RoutingConfig(
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        renormalise=spec.renormalise,
        scale=spec.scale,
        num_groups=spec.num_groups,
        topk_groups=spec.topk_groups,
        by_logits=spec.by_logits,
        num_shared=spec.num_shared,
        shared_weight=1.0 / spec.shared_scale,
        groups=triton.next_power_of_2(spec.num_groups),
        # At least a warp's worth, so that every thread has a place.
        size=max(triton.next_power_of_2(spec.group_size), 32 // triton.next_power_of_2(spec.num_groups), 1),
        block_k=triton.next_power_of_2(spec.top_k + spec.num_shared),
    )


def num_warps(cfg: RoutingConfig) -> int:
    return min(8, max(1, cfg.groups * cfg.size // WARP_PLACES))


def bind(spec: RoutingSpec, arch: Arch) -> Callable[[Routing], None]:
    """The call `(tensors)` for one kind: one launch."""
    cfg, score, kind = config_of(spec), SCORES[spec.score], token(spec)

    def run(tensors: Routing) -> None:
        weights, ids, logits, bias, replay, tokens, table = tensors
        outputs = Outputs(
            weights, ids, replay, weights.stride(0), ids.stride(0), 0 if replay is None else replay.stride(0)
        )
        # Triton takes tuples' integers apart by value, so these strides are part of the key.
        key = (kind, outputs[3:], pointers(*tensors))
        grid = (logits.shape[0], 1, 1)
        if tokens is not None and table is not None:
            strides = (logits.stride(0), table.stride(0))
            arguments: tuple[object, ...] = (outputs, logits, tokens, table, *strides, score, cfg)
            _lookup(grid, key, arguments, logits.device, num_warps=1)
        else:
            arguments = (outputs, logits, bias, logits.stride(0), score, cfg)
            _choose(grid, key, arguments, logits.device, num_warps=num_warps(cfg))

    return run
