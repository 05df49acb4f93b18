"""Pipelines: fusion, equality of compiled and step-by-step pipes, parameters, errors."""

from __future__ import annotations

import pytest
import torch

from flashinfer import sampling
from flashinfer.logits_processor import (
    CompileError,
    Compiler,
    FusionRule,
    LegalizationError,
    LogitsPipe,
    LogitsProcessor,
    MinP,
    Op,
    Sample,
    Softmax,
    TaggedTensor,
    Temperature,
    TensorType,
    TopK,
    TopP,
    compile_pipeline,
    legalize_processors,
)

LOGITS, PROBS = TensorType.LOGITS, TensorType.PROBS
SEEDED = {"seed": 3, "offset": 4}


def names(pipe: LogitsPipe) -> list[str]:
    assert pipe.compiled_ops is not None
    return [type(op).__name__ for op in pipe.compiled_ops]


@pytest.fixture
def logits(device: str) -> torch.Tensor:
    return torch.randn(64, 50, device=device) * 2


# processors, parameters -> the call it must become
FUSED = {
    "logits_both": ([TopK(), Softmax(), TopP(), Sample()], LOGITS, {"top_k": 9, "top_p": 0.7}),
    "logits_joint": ([TopK(joint_topk_topp=True), Softmax(), TopP(), Sample()], LOGITS, {"top_k": 9, "top_p": 0.7}),
    "logits_top_k": ([TopK(), Sample()], LOGITS, {"top_k": 9}),
    "logits": ([Softmax(), Sample()], LOGITS, {}),
    "probs_both": ([TopK(), TopP(), Sample()], PROBS, {"top_k": 9, "top_p": 0.7}),
    "probs_joint": ([TopK(joint_topk_topp=True), TopP(), Sample()], PROBS, {"top_k": 9, "top_p": 0.7}),
    "top_k": ([TopK(), Sample()], PROBS, {"top_k": 9}),
    "top_p": ([TopP(), Sample()], PROBS, {"top_p": 0.7}),
    "min_p": ([MinP(), Sample()], PROBS, {"min_p": 0.1}),
}
CALLS = {
    "logits_both": lambda x, top_k, top_p: sampling.top_k_top_p_sampling_from_logits(x, top_k, top_p, **SEEDED),
    "logits_joint": lambda x, top_k, top_p: sampling.top_k_top_p_sampling_from_logits(
        x, top_k, top_p, filter_apply_order="joint", **SEEDED
    ),
    "logits_top_k": lambda x, top_k: sampling.top_k_top_p_sampling_from_logits(x, top_k, 1.0, **SEEDED),
    "logits": lambda x: sampling.sampling_from_logits(x, **SEEDED),
    "probs_both": lambda x, top_k, top_p: sampling.top_k_top_p_sampling_from_probs(x, top_k, top_p, **SEEDED),
    "probs_joint": lambda x, top_k, top_p: sampling.top_k_top_p_sampling_from_probs(
        x, top_k, top_p, filter_apply_order="joint", **SEEDED
    ),
    "top_k": lambda x, top_k: sampling.top_k_sampling_from_probs(x, top_k, **SEEDED),
    "top_p": lambda x, top_p: sampling.top_p_sampling_from_probs(x, top_p, **SEEDED),
    "min_p": lambda x, min_p: sampling.min_p_sampling_from_probs(x, min_p, **SEEDED),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_into_one_call(name: str, logits: torch.Tensor) -> None:
    processors, input_type, parameters = FUSED[name]
    pipe = LogitsPipe(processors, input_type=input_type)
    assert len(names(pipe)) == 1
    x = logits if input_type is LOGITS else logits.softmax(-1)
    assert torch.equal(pipe(x, **parameters, **SEEDED), CALLS[name](x, **parameters))


@pytest.mark.parametrize("joint", [False, True])
def test_temperature_before_filters(joint: bool, logits: torch.Tensor) -> None:
    """One softmax and one filtered draw, without logits in between."""
    order = "joint" if joint else "top_k_first"
    probs, given = sampling.softmax(logits, 0.7), {"temperature": 0.7, "top_k": 9, "top_p": 0.7, **SEEDED}
    pipe = LogitsPipe([Temperature(), TopK(joint_topk_topp=joint), Softmax(), TopP(), Sample()])
    assert names(pipe) == ["FilteredLogitsSampleOp"]
    expected = sampling.top_k_top_p_sampling_from_probs(probs, 9, 0.7, filter_apply_order=order, **SEEDED)
    assert torch.equal(pipe(logits, **given), expected)
    for rest in ([Softmax(), Sample()], [Sample()]):
        pipe = LogitsPipe([Temperature(), TopK(), *rest])
        assert names(pipe) == ["FilteredLogitsSampleOp"]
        assert torch.equal(pipe(logits, **given), sampling.top_k_sampling_from_probs(probs, 9, **SEEDED))
    pipe = LogitsPipe([Temperature(), Sample()])
    assert names(pipe) == ["FilteredLogitsSampleOp"]
    assert torch.equal(pipe(logits, **given), sampling.sampling_from_probs(probs, **SEEDED))


def test_temperature_joins_softmax(logits: torch.Tensor) -> None:
    pipe = LogitsPipe([Temperature(), Softmax(), TopK(), TopP(), MinP(), Sample()])
    assert names(pipe) == ["TemperatureSoftmaxOp", "ProbsTopKOp", "TopPOp", "ProbsSampleOp"]
    temperature = torch.rand(64, device=logits.device) + 0.5
    got = LogitsPipe([Temperature(), Softmax()])(logits, temperature=temperature)
    assert torch.equal(got, sampling.softmax(logits, temperature))


@pytest.mark.parametrize("compiled", [True, False])
def test_what_a_pipe_keeps(compiled: bool, logits: torch.Tensor) -> None:
    """Compiled or not, only tokens that pass every filter come."""
    pipe = LogitsPipe([Temperature(), TopK(), Softmax(), TopP(), MinP(), Sample()], compile=compiled)
    tokens = pipe(logits, temperature=0.7, top_k=9, top_p=0.8, min_p=0.3)
    probs = sampling.top_k_renorm_probs(sampling.softmax(logits, 0.7), 9)
    probs = sampling.min_p_renorm_probs(sampling.top_p_renorm_probs(probs, 0.8), 0.3)
    assert (probs.gather(1, tokens.long()[:, None]) > 0).all()


def test_parameters(logits: torch.Tensor) -> None:
    """Those of the call win over those of the constructor; a missing one is an error that names it."""
    pipe = LogitsPipe([Temperature(temperature=0.5), Softmax()])
    assert torch.equal(pipe(logits), sampling.softmax(logits, 0.5))
    assert torch.equal(pipe(logits, temperature=2.0), sampling.softmax(logits, 2.0))
    with pytest.raises(ValueError, match=r"top_k: got None"):
        LogitsPipe([TopK(), Sample()], input_type=PROBS)(logits.softmax(-1))


def test_run_time_arguments(logits: torch.Tensor) -> None:
    indices = torch.tensor([3, 3, 7], device=logits.device)
    pipe = LogitsPipe([TopK(), Sample()], input_type=LOGITS)
    got = pipe(logits, top_k=1, indices=indices, check_nan=True)
    assert torch.equal(got, logits.argmax(-1)[indices])
    with pytest.raises(ValueError, match="NaN"):
        pipe(logits * torch.nan, top_k=1, check_nan=True)


def test_temperature_zero_is_greedy(logits: torch.Tensor) -> None:
    for processors in ([Temperature(), Sample()], [Temperature(), Softmax(), Sample()]):
        assert torch.equal(LogitsPipe(processors)(logits, temperature=0.0).long(), logits.argmax(-1))


def test_tagged_tensors(logits: torch.Tensor) -> None:
    pipe = LogitsPipe([TopP(), Sample()])
    probs = TaggedTensor.probs(logits.softmax(-1))
    assert probs.size(0) == 64 and probs.shape == logits.shape
    assert torch.equal(pipe(probs, top_p=0.0).long(), logits.argmax(-1))
    with pytest.raises(ValueError, match=r"got TensorType.LOGITS"):
        pipe(TaggedTensor.logits(logits), top_p=0.5)


def test_errors() -> None:
    with pytest.raises(LegalizationError, match=r"TopP: got logits, expected probs"):
        LogitsPipe([Temperature(), TopP()])
    with pytest.raises(LegalizationError, match=r"Softmax: got probs"):
        LogitsPipe([Softmax(), Softmax()])
    with pytest.raises(ValueError, match=r"input_type: got none, with Sample first"):
        LogitsPipe([Sample()])
    with pytest.raises(ValueError, match=r"at least one processor"):
        LogitsPipe([])
    for joint in ([TopK(joint_topk_topp=True), Sample()], [TopK(joint_topk_topp=True), MinP(), Sample()]):
        with pytest.raises(CompileError, match="joint_topk_topp"):
            LogitsPipe(joint, input_type=PROBS)


class Halve(LogitsProcessor):
    """A user's own processor."""

    class Half(Op):
        IN, OUT = LOGITS, LOGITS

        def run(self, x: torch.Tensor, given: dict) -> torch.Tensor:
            return x / 2

    def legalize(self, input_type: TensorType) -> list[Op]:
        return [self.Half()]


def test_own_processors_rules_and_checks(logits: torch.Tensor) -> None:
    pipe = LogitsPipe([Halve(), Halve(), Softmax()], input_type=LOGITS)
    torch.testing.assert_close(pipe(logits), (logits / 4).softmax(-1))
    rule = FusionRule((Halve.Half, Halve.Half), lambda ops: True, lambda ops: ops[0], prio=99)
    ops = legalize_processors([Halve(), Halve(), Softmax()], LOGITS)
    assert [type(op).__name__ for op in compile_pipeline(ops, [rule])] == ["Half", "SoftmaxOp"]

    def refuse(ops: list[Op]) -> None:
        raise CompileError("refused")

    with pytest.raises(CompileError, match="refused"):
        compile_pipeline(ops, custom_validity_checks=[refuse])
    with pytest.raises(CompileError, match="expected logits"):
        Compiler().compile([*ops, Halve.Half()])
