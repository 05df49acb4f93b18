"""What the offline compile gate compiles of this folder: the launches of each call, recorded on empty tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from flashinfer.core.launch import Prebound
from flashinfer.ops.sampling.spec import Draws, Filters, Selection, Tree
from flashinfer.ops.sampling.triton import choose, launch
from flashinfer.testing.gate import GateCase

VOCAB = 128256
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launched(NamedTuple):
    """One launch that was not made."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def record(call: Callable[[], object]) -> list[Launched]:
    """The launches `call` would make."""
    seen: list[Launched] = []
    original = Prebound.__call__

    def note(self: Prebound, grid: object, key: object, args: tuple[Any, ...], device: object, **options: Any) -> None:
        seen.append(Launched(self.kernel, args, options))

    Prebound.__call__ = note  # type: ignore[assignment]
    try:
        call()
    finally:
        Prebound.__call__ = original  # type: ignore[method-assign]
    return seen


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _calls() -> Iterator[tuple[str, Callable[[], object]]]:
    probs, half = _empty(16, VOCAB), _empty(16, VOCAB, dtype=torch.bfloat16)
    odd = _empty(16, 50257, dtype=torch.float16)
    k, p = _empty(16, dtype=torch.int32), _empty(16)
    draws = Draws(_empty(1, dtype=torch.int64), 0, 16)
    chosen = Draws(5, 6, 40, _empty(40, dtype=torch.int64))
    yield "from_logits", lambda: launch.sample(half, True, Filters(), draws)
    yield "from_probs", lambda: launch.sample(probs, False, Filters(), chosen)
    yield "top_k", lambda: launch.sample(probs, False, Filters(top_k=k), draws)
    yield "top_p", lambda: launch.sample(probs, False, Filters(top_p=0.9), chosen)
    yield "min_p", lambda: launch.sample(probs, False, Filters(min_p=p), draws)
    yield "top_k_top_p", lambda: launch.sample(half, True, Filters(k, p), draws)
    yield "joint", lambda: launch.sample(odd, False, Filters(50, p, joint=True), draws)
    yield "softmax", lambda: launch.softmax(_empty(2, VOCAB), p)
    yield "softmax_rows", lambda: launch.softmax(_empty(512, VOCAB, dtype=torch.bfloat16), 0.7)
    yield "top_p_renorm", lambda: launch.renormalise(probs, Filters(top_p=p))
    yield "min_p_renorm", lambda: launch.renormalise(probs, Filters(min_p=p))
    yield "top_k_renorm", lambda: launch.renormalise(half, Filters(top_k=50))
    yield "top_k_mask", lambda: launch.mask_logits(half, k)
    yield "select", lambda: choose.select(probs, Selection(64))
    yield "select_2048", lambda: choose.select(half, Selection(2048, 2, False, k, k))
    drafts, target = _empty(16, 4, VOCAB), _empty(16, 5, VOCAB)
    tokens = _empty(16, 5, dtype=torch.int32)
    yield "chain", lambda: choose.verify_chain(drafts, tokens[:, :4], target, draws)
    yield "tree", lambda: choose.verify_tree(Tree(tokens, tokens, tokens), target, Draws(5, 6, 16))


def cases() -> Iterator[GateCase]:
    """Every kernel in the forms in which it is launched."""
    for name, call in _calls():
        # Steps of a loop launch the same kernel in the same form.
        forms = {launched.kernel.__name__: launched for launched in record(call)}
        for kernel, launched in forms.items():
            yield _case(f"{name}.{kernel}", launched)


def _case(name: str, launched: Launched) -> GateCase:
    constexprs: dict[Any, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(value: Any, path: tuple[int, ...], constant: bool, plain: bool) -> Any:
        """The Triton type of an argument as a launch would see it; notes constants and alignment on the way."""
        if isinstance(value, tuple) and not constant:
            kinds = [kind(v, (*path, i), False, plain) for i, v in enumerate(value)]
            return type(value)(*kinds) if hasattr(value, "_fields") else tuple(kinds)
        if isinstance(value, torch.Tensor):
            attrs[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if isinstance(value, float) and not constant:
            return "fp32"
        if isinstance(value, int) and not constant and (plain or value != 1):
            if not plain and value % 16 == 0:
                attrs[path] = [["tt.divisibility", 16]]
            return "i32"
        constexprs[path] = value
        return "constexpr"

    signature = {
        p.name: kind(value, (i,), p.is_constexpr, p.do_not_specialize)
        for i, (p, value) in enumerate(zip(launched.kernel.params, launched.arguments, strict=True))
    }
    return GateCase(f"sampling.{name}", launched.kernel, signature, constexprs, attrs, launched.options)
