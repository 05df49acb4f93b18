"""The memory of eager calls: which calls are repeated, and with which arguments."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashinfer.core import replay
from flashinfer.core.replay import Number, Repeat, Template, permanent, recording, replayed


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


@pytest.mark.parametrize("column", [2, 4], ids=["begins in one", "begins in none"])
def test_inputs_that_overlap_must_lie_alike_again(column: int) -> None:
    """Which of them an argument inside of several was cut from cannot be told."""
    rows = torch.zeros(4, 8)
    template = Template([rows, rows[:, 2:]], (rows[:, column:], 1))
    assert template.shared == [(1, 0, 8)]
    assert template.fill([1000, 1008]) == (1000 + 4 * column, 1)


def test_inputs_at_one_address_must_stay_so() -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    assert Template([x, y, x], (x, y, x)).shared == [(2, 0, 0)]


class Descriptor:
    """Holds a tensor where no one looks."""

    def __init__(self, x: torch.Tensor) -> None:
        self.base = x


@pytest.mark.parametrize("hide", [lambda x: [x], lambda x: {"x": x}, Descriptor, lambda x: (1, Descriptor(x))])
def test_a_hidden_tensor_cannot_be_replaced(hide: Callable[[torch.Tensor], Any]) -> None:
    x = torch.zeros(4)
    with pytest.raises(LookupError):
        Template([x], (x, hide(x)))


class TensorDescriptor:
    """As Triton's: known by its name, since the core does not import Triton."""

    def __init__(self, base: torch.Tensor) -> None:
        assert base.data_ptr() % 16 == 0
        self.base, self.shape, self.block_shape = base, list(base.shape), [1, 4]


def test_descriptors_are_made_again_for_other_memory() -> None:
    x, y = torch.zeros(4, 8), torch.zeros(4, 8)
    template = Template([x, y], (TensorDescriptor(x), 5, (TensorDescriptor(y[1:]), None), y))
    alive = [*map(weakref.ref, (x, y))]
    del x, y
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    first, five, (second, none), address = template.fill([1600, 3200])
    assert (type(first), type(second)) == (TensorDescriptor, TensorDescriptor)
    assert (first.base.data_ptr(), second.base.data_ptr(), address) == (1600, 3232, 3200)
    assert (first.shape, second.shape, second.block_shape, five, none) == ([4, 8], [3, 8], [1, 4], 5, None)
    assert template.fill([160, 320])[0].base.data_ptr() == 160 and first.base.data_ptr() == 1600


def test_a_descriptor_of_no_input_cannot_be_replaced() -> None:
    with pytest.raises(LookupError):
        Template([torch.zeros(4)], (TensorDescriptor(torch.zeros(4)), 1))


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
            recording.launches += [Repeat((), self.launch)] * self.launches

    def launch(self, found: list[int]) -> None:
        self.again.append(found)


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


def test_what_a_call_makes_is_made_again(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros anew for each repetition, in the order they were made in; the first launch knows the first only."""
    made: list[torch.Tensor] = []
    zeros = torch.zeros

    def remembered_zeros(*arguments: Any, **options: Any) -> torch.Tensor:
        made.append(zeros(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch, "zeros", remembered_zeros)
    filled: list[tuple[Any, ...]] = []

    @replayed
    def function(x: torch.Tensor) -> None:
        recorder.calls += 1
        for i in range(2):
            counter = replay.zeros(4, x.device)
            if recording.tensors is not None:
                template = Template(recording.tensors, (x, counter, i))
                recording.launches.append(Repeat((), lambda found, t=template: filled.append(t.fill(found))))

    x, y = zeros(3), zeros(3)
    function(x)
    function(y)
    function(x)
    assert recorder.calls == 1 and len(made) == 6
    assert all(counter.dtype == torch.int32 and not counter.any() for counter in made)
    pairs = [(x, made[4], 0), (x, made[5], 1)]
    assert filled[2:] == [(*addresses(*tensors), i) for *tensors, i in pairs]
    assert filled[:2] == [(*addresses(y, made[2 + i]), i) for i in range(2)]


@pytest.mark.parametrize("refusing", [0, 1, 2])
def test_a_refused_launch_runs_the_function_and_nothing_else(recorder: Recorder, refusing: int) -> None:
    """Whichever of a call's launches it is."""
    both = torch.zeros(6)

    @replayed
    def function(a: torch.Tensor, b: torch.Tensor) -> None:
        recorder.calls += 1
        for i in range(3):
            relations = ((1, 0, 12),) if i == refusing else ()
            recording.launches.append(Repeat(relations, recorder.launch))

    function(both[:3], both[3:])
    function(both[3:], both[:3])
    assert recorder.calls == 2 and not recorder.again


def test_the_memory_is_bounded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "CAPACITY", 3)
    x = torch.zeros(1)
    for value in range(5):
        recorder.remembered(x, value)
    recorder.remembered(x, 4)
    assert (recorder.calls, len(recorder.again)) == (5, 1)
    recorder.remembered(x, 0)
    assert recorder.calls == 6


def test_layouts_of_the_same_values_are_bounded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_LAYOUTS", 2)
    for n in (1, 2, 3, 2, 3, 1):
        recorder.remembered(torch.zeros(n), 0.5)
    assert recorder.calls == 4 and len(recorder.again) == 2


def test_a_tensor_given_twice_must_be_so_again(recorder: Recorder) -> None:
    x, y = torch.zeros(3), torch.zeros(3)
    recorder.remembered(x, 1, x)
    recorder.remembered(y, 1, y)
    assert recorder.calls == 1 and recorder.again == [addresses(y, y)]
    recorder.remembered(x, 1, y)
    assert recorder.calls == 2


VIEWS = {
    "same": X[16:24].view(2, 4), "shape": X[:8].view(4, 2), "rank": X[:8], "stride": X[:16].view(2, 8)[:, :4],
    "transposed": X[:8].view(4, 2).T, "dtype": X[:8].view(2, 4).view(torch.int8), "broadcast": X[:4].expand(2, 4),
    "parameter": torch.nn.Parameter(X[:8].view(2, 4), requires_grad=False),
    "negated": torch._neg_view(X[:8].view(2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_torchs_guards_see_what_comparing_sees(name: str) -> None:
    tensors = (X[:8].view(2, 4), torch.zeros(5))
    fits, compared = replay._guarded(tensors), replay._compared(tensors)
    assert fits(VIEWS[name], torch.zeros(5)) == compared(VIEWS[name], torch.zeros(5)) == (name == "same")
    assert not fits(torch.zeros(5), VIEWS[name]) and not compared(torch.zeros(5), VIEWS[name])


def test_both_see_gradients_inference_and_sharing() -> None:
    x, y = torch.zeros(2), torch.zeros(2)
    with torch.inference_mode():
        inference = torch.zeros(2)
    for fits in (replay._guarded((x, y)), replay._compared((x, y))):
        assert fits(y, x) and not fits(x, x)
        assert not fits(x, inference) and not fits(torch.zeros(2, requires_grad=True), y)


class Lenient:
    """Another meaning of the same name."""

    def __init__(self, *tensors: torch.Tensor, **options: object) -> None:
        self.check = lambda *others: True


@pytest.mark.parametrize(
    "found",
    [None, SimpleNamespace(), SimpleNamespace(TensorGuards=lambda: None), SimpleNamespace(TensorGuards=Lenient)],
)
def test_guards_that_torch_has_not_are_done_without(
    found: object, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "guards", found)
    replay._tensor_guards.cache_clear()
    try:
        test_the_same_layouts_are_repeated(recorder)
        recorder.remembered(torch.zeros(2, 5), (torch.zeros(2, 5), 1), None)
        assert recorder.calls == 2
        assert replay._guarded((X,)).__qualname__.startswith("_compared")  # type: ignore[attr-defined]
    finally:
        replay._tensor_guards.cache_clear()


@pytest.mark.parametrize("setting", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
def test_this_torch_has_the_guards(setting: Callable[[], Any]) -> None:
    """Wherever the first call looks for them."""
    replay._tensor_guards.cache_clear()
    with setting():
        assert replay._tensor_guards() is not None


def test_no_tensor_is_kept_alive(recorder: Recorder) -> None:
    x, y = torch.zeros(3), torch.zeros(4)
    seen = [weakref.ref(x), weakref.ref(y), weakref.ref(x.untyped_storage())]
    recorder.launch = lambda found: None  # type: ignore[method-assign]
    for _ in range(2):
        recorder.remembered(x, (x, y), y, 1.0)
    assert recorder.calls == 1
    del x, y
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3


class Pair(NamedTuple):
    """Two tensors under names."""

    k: torch.Tensor
    v: torch.Tensor


def test_tensors_that_are_not_looked_for_are_not_remembered(recorder: Recorder) -> None:
    """In a tuple of another kind, or deeper, they would be values of the call, compared by identity, and kept."""
    x, y = torch.zeros(3), torch.zeros(3)
    for hidden in (Pair(x, y), ((x, y), 1), (Pair(x, y), 1)):
        for _ in range(2):
            recorder.remembered(x, hidden)
    assert recorder.calls == 6 and not recorder.again


def test_a_call_within_a_call_is_part_of_it(recorder: Recorder) -> None:
    """Known already or not, its launches are those of the outer call."""
    inner = Recorder()
    x = torch.zeros(3)

    @replayed
    def outer(x: torch.Tensor) -> None:
        recorder.run(x)
        inner.remembered(x)
        recorder.run(x)

    for known in (False, True):
        replay.forget()
        inner.again.clear()
        if known:
            inner.remembered(x)
        outer(x)
        recorder.again.clear()
        outer(x)
        assert len(recorder.again) == 2 and len(inner.again) == 1


def test_records_of_one_layout_are_all_tried(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that differ in how their inputs overlap."""
    x, y = torch.zeros(3), torch.zeros(3)

    @replayed
    def function(a: torch.Tensor, b: torch.Tensor) -> None:
        recorder.calls += 1
        relations = ((0, 1, 0),) if a.data_ptr() == b.data_ptr() else ()
        recording.launches.append(Repeat(relations, recorder.launch))

    for _ in range(3):
        function(x, x.view(3))
        function(x, y)
    assert recorder.calls == 2 and len(recorder.again) == 4


def test_nothing_is_repeated_or_remembered_in_a_pause(recorder: Recorder) -> None:
    arguments = (torch.zeros(4), torch.zeros(4), 1)
    with replay.paused():
        recorder.remembered(*arguments)
    recorder.remembered(*arguments)
    assert recorder.calls == 2
    with replay.paused():
        recorder.remembered(*arguments)
    assert recorder.calls == 3 and not recorder.again
    recorder.remembered(*arguments)
    assert recorder.calls == 3 and len(recorder.again) == 1


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


class Intercepting(TorchFunctionMode):
    """Sees every call of a function of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """Has behaviour of its own."""


def test_lookers_on_see_every_call(recorder: Recorder) -> None:
    x = torch.zeros(3)
    recorder.remembered(x)
    with Watching():
        recorder.remembered(x)
    with Intercepting():
        recorder.remembered(x)
    recorder.remembered(x.as_subclass(Subclass))
    recorder.remembered([x])
    assert recorder.calls == 5 and not recorder.again
    for _ in range(2):  # a kind of its own
        recorder.remembered(torch.nn.Parameter(x))
    assert recorder.calls == 6 and len(recorder.again) == 1


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")
@pytest.mark.parametrize("with_guards", [True, False])
def test_a_trace_sees_every_call(recorder: Recorder, monkeypatch: pytest.MonkeyPatch, with_guards: bool) -> None:
    if not with_guards:
        monkeypatch.setattr(replay, "_guarded", replay._compared)

    def step(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            recorder.remembered(x)
        return x + 1

    step(torch.zeros(3))
    for n in range(2):
        torch.jit.trace(step, (torch.zeros(3),), check_trace=False)
        assert recorder.calls == 3 + 2 * n


def test_tensors_without_memory_are_left_to_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # torch.func makes the compiler look at torch.empty, which must be torch's own then
    recorder = Recorder()
    for _ in range(2):
        torch.func.grad(lambda x: (recorder.remembered(x), x.sum())[1])(torch.zeros(3))
    assert recorder.calls == 2


def test_cpu_tensors_are_not_remembered() -> None:
    recorder = Recorder()
    for _ in range(2):
        recorder.remembered(torch.zeros(3))
    assert recorder.calls == 2
