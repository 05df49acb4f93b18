"""Pipelines from logits to tokens, with FlashInfer's names: processors are turned into ops, neighbours into fused ones.

    pipe = LogitsPipe([Temperature(), Softmax(), TopK(), TopP(), Sample()])
    tokens = pipe(logits, temperature=0.8, top_k=40, top_p=0.9)

A processor says what is to be done; for the type of tensor it meets it becomes an `Op`. Fusion rules replace runs of
ops by one call of `flashinfer.sampling`. Parameters come with the call, or from the processor's constructor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch

from flashinfer import sampling
from flashinfer.core import check
from flashinfer.logits_ops import (
    FilteredLogitsSampleOp,
    LogitsSampleOp,
    LogitsTopKOp,
    MinPOp,
    Op,
    ParameterizedOp,
    ProbsSampleOp,
    ProbsTopKOp,
    SoftmaxOp,
    TaggedTensor,
    TemperatureOp,
    TemperatureSoftmaxOp,
    TensorType,
    TopPOp,
)


class CompileError(Exception):
    """The ops of a pipeline do not fit together."""


class LegalizationError(CompileError):
    """A processor cannot work on the type of tensor it meets."""


class LogitsProcessor:
    """What is to be done, whatever the tensor holds. ops: the op for each type it can meet."""

    ops: ClassVar[dict[TensorType, type[ParameterizedOp]]] = {}

    def __init__(self, **params: Any) -> None:
        self.params = params

    def legalize(self, input_type: TensorType) -> list[Op]:
        """The ops that do it on `input_type`. Raises LegalizationError."""
        op = self.ops.get(input_type)
        if op is None:
            known = ", ".join(t.value for t in self.ops)
            raise LegalizationError(
                f"{type(self).__name__}: got {input_type.value}, expected {known}. Change the order of the processors."
            )
        return [op(**self.params)]


class Temperature(LogitsProcessor):
    """Divide logits by `temperature`."""

    ops: ClassVar = {TensorType.LOGITS: TemperatureOp}


class Softmax(LogitsProcessor):
    """Turn logits into probabilities."""

    ops: ClassVar = {TensorType.LOGITS: SoftmaxOp}

    def __init__(self, enable_pdl: bool | None = None, **params: Any) -> None:
        super().__init__(**params)


class TopK(LogitsProcessor):
    """Keep the `top_k` largest. joint_topk_topp: a TopP after it measures the whole row, not what stays."""

    ops: ClassVar = {TensorType.LOGITS: LogitsTopKOp, TensorType.PROBS: ProbsTopKOp}

    def __init__(self, joint_topk_topp: bool = False, **params: Any) -> None:
        super().__init__(**params)
        self.joint_topk_topp = joint_topk_topp

    def legalize(self, input_type: TensorType) -> list[Op]:
        found = super().legalize(input_type)
        for op in found:
            op.joint = self.joint_topk_topp  # type: ignore[attr-defined]
        return found


class TopP(LogitsProcessor):
    """Keep the nucleus of `top_p`."""

    ops: ClassVar = {TensorType.PROBS: TopPOp}


class MinP(LogitsProcessor):
    """Keep what is at least `min_p` times as probable as the most probable."""

    ops: ClassVar = {TensorType.PROBS: MinPOp}


class Sample(LogitsProcessor):
    """Draw a token; takes `indices`, `generator` or `seed` and `offset`, `check_nan` at run time."""

    ops: ClassVar = {TensorType.LOGITS: LogitsSampleOp, TensorType.PROBS: ProbsSampleOp}

    def __init__(self, deterministic: bool = True, **params: Any) -> None:
        super().__init__(deterministic=deterministic, **params)


class FusionRule(NamedTuple):
    """Ops of the types `pattern`, where `guard` accepts them, become what `build` makes; larger prio goes first."""

    pattern: tuple[type[Op], ...]
    guard: Callable[[list[Op]], bool]
    build: Callable[[list[Op]], Op]
    prio: int = 0


def _merged(ops: Sequence[Op]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for op in ops:
        merged |= getattr(op, "default_params", {})
    return merged


def _is_joint(op: Op) -> bool:
    return bool(getattr(op, "joint", False))


def _sampled(op: type[ProbsSampleOp], call: Callable[..., Any], *names: str, **fixed: Any) -> Callable[[list[Op]], Op]:
    """Builds the op that filters and draws in one call."""

    def build(ops: list[Op]) -> Op:
        joint = any(map(_is_joint, ops))
        order = {"filter_apply_order": "joint" if joint else "top_k_first"} if {*BOTH} <= {*names} else {}
        return op(call, names, fixed | order, **_merged(ops))

    return build


def _plain_sample(ops: list[Op]) -> bool:
    """The sampling op at the end has nothing fused into it yet, and no TopK waits for a TopP that is not there."""
    last = ops[-1]
    waiting = any(map(_is_joint, ops)) and not any(isinstance(op, TopPOp) for op in ops)
    return not waiting and (not isinstance(last, ProbsSampleOp) or not last.names)


def _after_softmax(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` on probs as a function of logits and temperature: top_k keeps the same tokens before softmax and after."""
    return lambda logits, temperature, *rest, **keywords: call(sampling.softmax(logits, temperature), *rest, **keywords)


BOTH = ("top_k", "top_p")
FUSION_RULES = (
    FusionRule(
        (TemperatureOp, LogitsTopKOp, SoftmaxOp, TopPOp, ProbsSampleOp),
        _plain_sample,
        _sampled(
            FilteredLogitsSampleOp, _after_softmax(sampling.top_k_top_p_sampling_from_probs), "temperature", *BOTH
        ),
        prio=40,
    ),
    *(
        FusionRule(
            (TemperatureOp, LogitsTopKOp, *rest),
            _plain_sample,
            _sampled(
                FilteredLogitsSampleOp, _after_softmax(sampling.top_k_sampling_from_probs), "temperature", "top_k"
            ),
            prio=35,
        )
        for rest in ((SoftmaxOp, ProbsSampleOp), (LogitsSampleOp,))
    ),
    FusionRule(
        (TemperatureOp, LogitsSampleOp),
        _plain_sample,
        _sampled(FilteredLogitsSampleOp, _after_softmax(sampling.sampling_from_probs), "temperature"),
        prio=5,
    ),
    FusionRule((TemperatureOp, SoftmaxOp), lambda ops: True, lambda ops: TemperatureSoftmaxOp(**_merged(ops)), prio=1),
    FusionRule(
        (LogitsTopKOp, SoftmaxOp, TopPOp, ProbsSampleOp),
        _plain_sample,
        _sampled(FilteredLogitsSampleOp, sampling.top_k_top_p_sampling_from_logits, *BOTH),
        prio=30,
    ),
    *(
        FusionRule(
            pattern,
            _plain_sample,
            _sampled(FilteredLogitsSampleOp, sampling.top_k_top_p_sampling_from_logits, "top_k", top_p=1.0),
            prio=25,
        )
        for pattern in ((LogitsTopKOp, SoftmaxOp, ProbsSampleOp), (LogitsTopKOp, LogitsSampleOp))
    ),
    FusionRule((SoftmaxOp, ProbsSampleOp), _plain_sample, lambda ops: LogitsSampleOp(**_merged(ops)), prio=5),
    FusionRule(
        (ProbsTopKOp, TopPOp, ProbsSampleOp),
        _plain_sample,
        _sampled(ProbsSampleOp, sampling.top_k_top_p_sampling_from_probs, *BOTH),
        prio=20,
    ),
    *(
        FusionRule((op, ProbsSampleOp), _plain_sample, _sampled(ProbsSampleOp, call, name), prio=10)
        for op, call, name in (
            (ProbsTopKOp, sampling.top_k_sampling_from_probs, "top_k"),
            (TopPOp, sampling.top_p_sampling_from_probs, "top_p"),
            (MinPOp, sampling.min_p_sampling_from_probs, "min_p"),
        )
    ),
)


def _check_types(ops: list[Op]) -> None:
    """Each op takes what the one before it gives."""
    for before, after in pairwise(ops):
        if before.OUT is not after.IN:
            raise CompileError(
                f"{type(after).__name__}: got {before.OUT.value} from {type(before).__name__}, expected "
                f"{after.IN.value}. Change the order of the ops."
            )


def _check_joint(ops: list[Op]) -> None:
    """A joint TopK is only right together with the TopP it waits for."""
    for op in ops:
        if _is_joint(op):
            raise CompileError(
                f"{type(op).__name__}: got joint_topk_topp without TopP and Sample to be joined with, expected them "
                "right behind it. Add them, or leave joint_topk_topp off."
            )


class Compiler:
    """Fuses ops. Rules are tried by prio, then in the order of their registration, until none applies."""

    def __init__(self) -> None:
        self.rules: list[FusionRule] = []
        self.checks: list[Callable[[list[Op]], None]] = []

    def register_fusion_rule(self, rule: FusionRule) -> None:
        self.rules.append(rule)

    def register_validity_check(self, check: Callable[[list[Op]], None]) -> None:
        """check: raises CompileError for ops that cannot be right; sees the compiled ops."""
        self.checks.append(check)

    def compile(self, ops: list[Op]) -> list[Op]:
        """The ops after fusion. Raises CompileError."""
        ops = list(ops)
        rules = sorted(self.rules, key=lambda rule: -rule.prio)
        _check_types(ops)
        while any(self._apply(rule, ops) for rule in rules):
            pass
        for validity_check in self.checks:
            validity_check(ops)
        return ops

    @staticmethod
    def _apply(rule: FusionRule, ops: list[Op]) -> bool:
        """Replace the first place where the rule fits, in `ops` itself."""
        length = len(rule.pattern)
        for begin in range(len(ops) - length + 1):
            window = ops[begin : begin + length]
            if [type(op) for op in window] == list(rule.pattern) and rule.guard(window):
                ops[begin : begin + length] = [rule.build(window)]
                return True
        return False


def legalize_processors(
    processors: Sequence[LogitsProcessor], initial_type: TensorType = TensorType.LOGITS
) -> list[Op]:
    """The ops of the processors, the first of which meets `initial_type`. Raises LegalizationError."""
    ops: list[Op] = []
    current = initial_type
    for processor in processors:
        found = processor.legalize(current)
        if not found:
            raise LegalizationError(f"{type(processor).__name__}: got no ops, expected at least one. Return some.")
        ops += found
        current = found[-1].OUT
    return ops


def compile_pipeline(
    ops: Sequence[Op],
    custom_fusion_rules: Sequence[FusionRule] | None = None,
    custom_validity_checks: Sequence[Callable[[list[Op]], None]] | None = None,
) -> list[Op]:
    """The ops after fusion by the built-in rules and the caller's. Raises CompileError."""
    compiler = Compiler()
    for rule in (*FUSION_RULES, *(custom_fusion_rules or ())):
        compiler.register_fusion_rule(rule)
    for validity_check in (_check_types, _check_joint, *(custom_validity_checks or ())):
        compiler.register_validity_check(validity_check)
    return compiler.compile(list(ops))


class LogitsPipe:
    """Processors applied one after the other; compiled into fused calls unless `compile` is False.

    input_type: what the pipe is given; needed where the first processor takes logits and probs alike and the input is
    no `TaggedTensor`. Calling it gives the last op's tensor.
    """

    def __init__(
        self,
        processors: list[LogitsProcessor],
        compile: bool = True,
        input_type: TensorType | None = None,
        custom_fusion_rules: list[FusionRule] | None = None,
        custom_validity_checks: list[Callable[[list[Op]], None]] | None = None,
    ) -> None:
        if not processors:
            raise ValueError(check.problem("processors", "an empty list", "at least one processor", "Add one."))
        self.processors = list(processors)
        self.initial_type = self._initial_type() if input_type is None else input_type
        self.ops = legalize_processors(self.processors, self.initial_type)
        self.compiled_ops: list[Op] | None = None
        if compile:
            self.compile(custom_fusion_rules, custom_validity_checks)

    def _initial_type(self) -> TensorType:
        first = self.processors[0]
        known = list(first.ops)
        if len(known) != 1:
            fix = "Pass input_type=TensorType.LOGITS or TensorType.PROBS."
            name = type(first).__name__
            raise ValueError(check.problem("input_type", f"none, with {name} first", "the type of the input", fix))
        return known[0]

    def compile(
        self,
        custom_fusion_rules: list[FusionRule] | None = None,
        custom_validity_checks: list[Callable[[list[Op]], None]] | None = None,
    ) -> None:
        """Fuse the ops. Raises CompileError."""
        self.compiled_ops = compile_pipeline(self.ops, custom_fusion_rules, custom_validity_checks)

    def __call__(self, x: torch.Tensor | TaggedTensor, **kwargs: Any) -> torch.Tensor:
        tensor = x if isinstance(x, TaggedTensor) else TaggedTensor(x, self.initial_type)
        for op in self.compiled_ops if self.compiled_ops is not None else self.ops:
            tensor = op(tensor, **kwargs)
        return tensor.data

    def __repr__(self) -> str:
        names = ", ".join(type(op).__name__ for op in self.compiled_ops or self.ops)
        return f"LogitsPipe({names})"
