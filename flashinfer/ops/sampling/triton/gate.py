"""What the offline compile gate compiles of this folder: the launches of each call, recorded on empty tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.launch import Prebound
from flashinfer.ops.sampling.spec import Draws, Filters, Parameter, Samples, Selection, Tree
from flashinfer.ops.sampling.triton import choose, launch, softmax_launch
from flashinfer.testing.gate import ALL_ARCHS, Constant, GateCase, Typed, case_of

VOCAB = 128256
EARLY = tuple(arch for arch in ALL_ARCHS if Arch(arch, 0, 0).launches_early)
LATE = tuple(arch for arch in ALL_ARCHS if arch not in EARLY)
Call = Callable[[], object]


class Launched(NamedTuple):
    """One launch that was not made."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def record(call: Call, early: bool) -> list[Launched]:
    """The launches `call` would make; early: as on an architecture whose kernels are launched early."""
    seen: list[Launched] = []
    original, options = Prebound.__call__, launch.waits_itself

    def note(self: Prebound, grid: object, key: object, args: tuple[Any, ...], device: object, **options: Any) -> None:
        seen.append(Launched(self.kernel, args, options))

    Prebound.__call__ = note  # type: ignore[assignment]
    launch.waits_itself = lambda device: {"launch_pdl": True} if early else {}
    try:
        call()
    finally:
        Prebound.__call__ = original  # type: ignore[method-assign]
        launch.waits_itself = options
    return seen


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def sampled(x: torch.Tensor, logits: bool, filters: Filters, draws: Draws) -> None:
    """Tokens, and which rows had weight."""
    dtype = torch.int32 if draws.indices is None else draws.indices.dtype
    out = Samples(_empty(draws.num_samples, dtype=dtype), _empty(draws.num_samples, dtype=torch.bool))
    launch.sample(x, logits, filters, draws, out, None)


def softmax(x: torch.Tensor, temperature: Parameter) -> None:
    """fp32 softmax."""
    softmax_launch.softmax(_empty(*x.shape), x, temperature, None)


def kept(x: torch.Tensor, kind: str, parameter: Parameter, logits: bool = False) -> None:
    """What passes a filter."""
    launch.keep(torch.empty_like(x), x, kind, parameter, logits, None)


def selected(x: torch.Tensor, selection: Selection) -> None:
    """The largest numbers."""
    shape = (x.shape[0], selection.k)
    values, indices = _empty(*shape, dtype=x.dtype), _empty(*shape, dtype=selection.index_dtype)
    choose.select(values, indices, x, selection, None)


def everywhere() -> Iterator[tuple[str, Call]]:
    """Calls that launch every kernel; of a kernel with branches chosen at compile time, the form that has the most."""
    probs, half = _empty(16, VOCAB), _empty(16, VOCAB, dtype=torch.bfloat16)
    k, p = _empty(16, dtype=torch.int32), _empty(16)
    draws, tokens = Draws(_empty(1, dtype=torch.int64), 0, 16), _empty(16, 5, dtype=torch.int32)
    yield "top_k_top_p", lambda: sampled(half, True, Filters(k, p), draws)
    yield "softmax", lambda: softmax(_empty(2, VOCAB), p)
    yield "softmax_rows", lambda: softmax(_empty(512, VOCAB, dtype=torch.bfloat16), 0.7)
    yield "top_p_renorm", lambda: kept(probs, "p", p)
    yield "select", lambda: selected(half, Selection(512, 2, False, k, k))
    yield "select_of_few_rows", lambda: selected(half[:2], Selection(512, 2, False, k[:2], k[:2]))
    target = _empty(16, 5, VOCAB)
    yield "chain", lambda: choose.verify_chain(_empty(16, 4, VOCAB), tokens[:, :4], target, draws)
    yield "tree", lambda: choose.verify_tree(Tree(tokens, tokens, tokens), target, Draws(5, 6, 16))


def on_hopper() -> Iterator[tuple[str, Call]]:
    """The other forms: each filter, probs and logits, odd rows, values and tensors; sixteen warps that select.

    These would be 1024 lanes on AMD, where the selection then spills.
    """
    probs, half = _empty(16, VOCAB), _empty(16, VOCAB, dtype=torch.bfloat16)
    odd = _empty(16, 50257, dtype=torch.float16)
    p, k = _empty(16), _empty(16, dtype=torch.int32)
    chosen = Draws(5, 6, 40, _empty(40, dtype=torch.int64))
    yield "from_logits", lambda: sampled(half, True, Filters(), chosen)
    yield "top_p", lambda: sampled(probs, False, Filters(top_p=0.9), chosen)
    yield "top_k", lambda: sampled(probs, False, Filters(50), chosen)
    yield "top_k_top_p_probs", lambda: sampled(probs, False, Filters(50, 0.9), chosen)
    yield "min_p", lambda: sampled(probs, False, Filters(min_p=p), Draws(5, 6, 16))
    yield "joint", lambda: sampled(odd, False, Filters(50, p, joint=True), Draws(5, 6, 16))
    yield "min_p_renorm", lambda: kept(probs, "min_p", p)
    yield "top_k_renorm", lambda: kept(half, "k", 50)
    yield "top_k_mask", lambda: kept(half, "k", k, True)
    yield "select_2048", lambda: selected(half, Selection(2048))
    yield "select_2048_of_few_rows", lambda: selected(probs[:2], Selection(2048))


def cases() -> Iterator[GateCase]:
    """Every kernel for every architecture, and for the one it is tuned on in each form in which it is launched."""
    seen: set[tuple[str, str]] = set()
    runs = ((everywhere(), False, LATE), (everywhere(), True, EARLY), (on_hopper(), True, ("sm90",)))
    for calls, early, archs in runs:
        for name, call in calls:
            for launched in record(call, early):
                kernel = f"sampling.{name}{'.early' * early}.{launched.kernel.__name__}"
                case = _case(kernel, launched, archs)
                form = repr((launched.kernel.__name__, case.signature, case.constexprs, case.attrs, case.options))
                new = tuple(arch for arch in archs if (form, arch) not in seen)
                seen.update((form, arch) for arch in new)
                if new:
                    yield replace(case, archs=new)


def _case(name: str, launched: Launched, archs: tuple[str, ...]) -> GateCase:
    def spelled(parameter: Any, value: Any) -> Any:
        if parameter.is_constexpr:
            return Constant(value)
        return Typed("i32") if parameter.do_not_specialize and isinstance(value, int) else value

    pairs = zip(launched.kernel.params, launched.arguments, strict=True)
    arguments = {parameter.name: spelled(parameter, value) for parameter, value in pairs}
    return case_of(name, launched.kernel, arguments, archs=archs, options=launched.options)
