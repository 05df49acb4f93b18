"""The memory of eager calls: which calls are repeated, and with which arguments."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashinfer.core import replay
from flashinfer.core.replay import Number, Template, permanent, recording, replayed


def addresses(*tensors: torch.Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


def test_addresses_take_the_places_of_tensors() -> None:
    x, y = torch.zeros(4, 8), torch.zeros(4, 8)
    table = permanent(torch.zeros(3))
    config = ("a", ("b", 1))
    template = Template([x, y], ((x, 8, 1), y[:, 4:], None, (y, (x.view(-1), table, 2)), config, 1.5))
    other, another = torch.zeros(4, 8), torch.zeros(4, 8)
    p, q = addresses(other, another)
    wanted = ((p, 8, 1), q + 16, None, (q, (p, table.data_ptr(), 2)), config, 1.5)
    assert template.fill([p, q]) == wanted
    assert not template.shared


def test_a_tensor_of_no_input_cannot_be_replaced() -> None:
    x = torch.zeros(4)
    with pytest.raises(LookupError):
        Template([x], (x, x.clone()))


def test_a_tensor_inside_of_two_inputs_cannot_be_told() -> None:
    rows = torch.zeros(4, 8)
    with pytest.raises(LookupError):
        Template([rows, rows[:, 2:]], (rows[:, 4:], 1))


def test_a_tensor_map_cannot_be_replaced() -> None:
    x = torch.zeros(4, 8)
    with pytest.raises(LookupError, match="tensor map"):
        Template([x], (SimpleNamespace(base=x, shape=[4, 8]), x))


def test_inputs_at_one_address_must_stay_so() -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    assert Template([x, y, x], (x, y, x)).shared == [(2, 0)]


# ---- which calls are repeated


class Recorder:
    """A function like those of the facade: checks, then one launch. calls: how often it ran. again: its repetitions."""

    def __init__(self) -> None:
        self.calls = 0
        self.again: list[list[int]] = []
        self.launches = 1
        self.remembered = replayed(self.run)

    def run(self, *arguments: Any) -> None:
        self.calls += 1
        if recording.tensors is not None:
            recording.launches += [self.launch] * self.launches

    def launch(self, found: list[int]) -> bool:
        self.again.append(found)
        return True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """CPU tensors look like those of a GPU."""
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0, raising=False)
    yield Recorder()
    replay.forget()


def test_the_same_layouts_are_repeated(recorder: Recorder) -> None:
    x, y = torch.zeros(2, 4), torch.zeros(2, 4)
    recorder.remembered(x, (x, 1), None)
    recorder.remembered(y, (y, 1), None)
    assert recorder.calls == 1
    assert recorder.again == [addresses(y, y)]


X = torch.zeros(64, dtype=torch.uint8)


@pytest.mark.parametrize(
    "arguments",
    [
        (X[:8].view(4, 2), 1.0),
        (X[:16].view(8, 2)[:, :1], 1.0),
        (X[:8].view(torch.float16).view(2, 2), 1.0),
        (X[8:16].view(2, 4), 1.0),
        (X[:8].view(2, 4), 2.0),
        (X[:8].view(2, 4), 1),
        (X[:8].view(2, 4), (1.0,)),
        (X[:8].view(2, 4), X[:4].view(torch.float32)),
    ],
    ids=["shape", "stride", "dtype", "alignment", "value", "type", "tuple", "tensor"],
)
def test_anything_else_is_another_call(recorder: Recorder, arguments: tuple[Any, ...]) -> None:
    recorder.remembered(X[:8].view(2, 4), 1.0)
    recorder.remembered(*arguments)
    assert recorder.calls == 2
    assert not recorder.again


def test_what_launches_nothing_is_not_repeated(recorder: Recorder) -> None:
    recorder.launches = 0
    for _ in range(2):
        recorder.remembered(torch.zeros(3))
    assert recorder.calls == 2


def test_all_launches_of_a_call_are_repeated(recorder: Recorder) -> None:
    recorder.launches = 3
    x = torch.zeros(3)
    for _ in range(2):
        recorder.remembered(x)
    assert recorder.calls == 1 and recorder.again == [addresses(x)] * 3


def test_numbers_may_change(recorder: Recorder) -> None:
    x = torch.zeros(3)
    for value in (5, 6):
        recorder.remembered(x, (Number(value), None))
    assert recorder.calls == 1 and recorder.again == [[*addresses(x), 6]]


def test_numbers_are_told_by_which_object_they_are() -> None:
    x, first, second = torch.zeros(3), Number(7), Number(7)
    template = Template([first, x, second], (7, second, x, (first, 8)))
    assert template.fill([1, 2, 3]) == (7, 3, 2, (1, 8)) and not template.shared


def test_a_refused_repetition_runs_the_function(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "launch", lambda found: False)
    for _ in range(2):
        recorder.remembered(torch.zeros(3))
    assert recorder.calls == 2


def test_the_memory_is_bounded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "CAPACITY", 3)
    x = torch.zeros(1)
    for value in range(5):
        recorder.remembered(x, value)
    recorder.remembered(x, 4)
    assert (recorder.calls, len(recorder.again)) == (5, 1)
    recorder.remembered(x, 0)
    assert recorder.calls == 6


def test_errors_are_not_remembered(recorder: Recorder) -> None:
    @replayed
    def fails(x: torch.Tensor) -> None:
        recorder.run(x)
        raise ValueError("x")

    for _ in range(2):
        with pytest.raises(ValueError, match="x"):
            fails(X)
    assert recorder.calls == 2 and recording.tensors is None


class Watching(TorchDispatchMode):
    """Sees every call of an op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """Has behaviour of its own."""


def test_lookers_on_see_every_call(recorder: Recorder) -> None:
    x = torch.zeros(3)
    recorder.remembered(x)
    with Watching():
        recorder.remembered(x)
    recorder.remembered(x.as_subclass(Subclass))
    recorder.remembered([x])
    assert recorder.calls == 4 and not recorder.again
    recorder.remembered(torch.nn.Parameter(x))
    assert len(recorder.again) == 1


def test_cpu_tensors_are_not_remembered() -> None:
    recorder = Recorder()
    for _ in range(2):
        recorder.remembered(torch.zeros(3))
    assert recorder.calls == 2
