"""The steps that logits pipelines are made of: what a tensor holds, ops, and how they become calls of sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch

from flashinfer import sampling
from flashinfer.core import check

RANDOMNESS = ("indices", "generator", "check_nan", "seed", "offset")


class TensorType(Enum):
    """What a tensor holds: unnormalised logits, probabilities, or token ids."""

    LOGITS = "logits"
    PROBS = "probs"
    INDICES = "indices"


@dataclass(frozen=True)
class TaggedTensor:
    """A tensor and what it holds."""

    data: torch.Tensor
    type: TensorType

    @staticmethod
    def logits(t: torch.Tensor) -> TaggedTensor:
        return TaggedTensor(t, TensorType.LOGITS)

    @staticmethod
    def probs(t: torch.Tensor) -> TaggedTensor:
        return TaggedTensor(t, TensorType.PROBS)

    @staticmethod
    def indices(t: torch.Tensor) -> TaggedTensor:
        return TaggedTensor(t, TensorType.INDICES)

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    def size(self, dim: int | None = None) -> Any:
        return self.data.size(dim)


class Op:
    """One step on tensors. IN, OUT: what it takes and gives."""

    IN: ClassVar[TensorType]
    OUT: ClassVar[TensorType]

    def __init__(self) -> None:
        pass

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        if tensor.type is not self.IN:
            raise ValueError(check.problem(type(self).__name__, tensor.type, str(self.IN), "Set the tensor's type."))
        return TaggedTensor(self.run(tensor.data, kwargs), self.OUT)

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        raise NotImplementedError


class ParameterizedOp(Op):
    """An op with parameters: those of the call, else these defaults."""

    def __init__(self, **default_params: Any) -> None:
        super().__init__()
        self.default_params = default_params

    def parameter(self, name: str, given: dict[str, Any], required: bool = True) -> Any:
        value = given.get(name)
        value = self.default_params.get(name) if value is None else value
        if value is None and required:
            fix = f"Pass {name} to the pipe or to {type(self).__name__}(...)."
            raise ValueError(check.problem(name, None, "a number or one for each row", fix))
        return value

    def randomness(self, given: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments for a sampling function."""
        found = {name: self.parameter(name, given, required=False) for name in (*RANDOMNESS, "deterministic")}
        return {name: value for name, value in found.items() if value is not None}


class TemperatureOp(ParameterizedOp):
    """logits / temperature."""

    IN, OUT = TensorType.LOGITS, TensorType.LOGITS

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        return sampling.scale_logits(x, self.parameter("temperature", given))


class SoftmaxOp(ParameterizedOp):
    """softmax of logits."""

    IN, OUT = TensorType.LOGITS, TensorType.PROBS

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        return sampling.softmax(x)


class TemperatureSoftmaxOp(ParameterizedOp):
    """softmax(logits / temperature) in one step."""

    IN, OUT = TensorType.LOGITS, TensorType.PROBS

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        return sampling.softmax(x, self.parameter("temperature", given))


class LogitsTopKOp(ParameterizedOp):
    """All but the largest logits become -inf."""

    IN, OUT = TensorType.LOGITS, TensorType.LOGITS

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        return sampling.top_k_mask_logits(x, self.parameter("top_k", given))


class ProbsTopKOp(ParameterizedOp):
    """All but the largest probabilities become 0; the rest sums to 1."""

    IN, OUT = TensorType.PROBS, TensorType.PROBS

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        return sampling.top_k_renorm_probs(x, self.parameter("top_k", given))


class TopPOp(ParameterizedOp):
    """All outside of the nucleus become 0; the rest sums to 1."""

    IN, OUT = TensorType.PROBS, TensorType.PROBS

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        return sampling.top_p_renorm_probs(x, self.parameter("top_p", given))


class MinPOp(ParameterizedOp):
    """All less probable than min_p times the largest become 0; the rest sums to 1."""

    IN, OUT = TensorType.PROBS, TensorType.PROBS

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        return sampling.min_p_renorm_probs(x, self.parameter("min_p", given))


class LogitsSampleOp(ParameterizedOp):
    """A token by softmax(logits)."""

    IN, OUT = TensorType.LOGITS, TensorType.INDICES

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        return sampling.sampling_from_logits(x, **self.randomness(given))


class ProbsSampleOp(ParameterizedOp):
    """A token by its probability, of those that pass the filters fused into this op.

    call: the function of `flashinfer.sampling`; names: its parameters.
    """

    IN, OUT = TensorType.PROBS, TensorType.INDICES

    def __init__(
        self,
        call: Callable[..., Any] = sampling.sampling_from_probs,
        names: tuple[str, ...] = (),
        fixed: dict[str, Any] | None = None,
        **default_params: Any,
    ) -> None:
        super().__init__(**default_params)
        self.call, self.names, self.fixed = call, names, fixed or {}

    def run(self, x: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        parameters = (self.parameter(name, given) for name in self.names)
        result: torch.Tensor = self.call(x, *parameters, **self.fixed, **self.randomness(given))
        return result


class FilteredLogitsSampleOp(ProbsSampleOp):
    """`ProbsSampleOp` on logits."""

    IN = TensorType.LOGITS
