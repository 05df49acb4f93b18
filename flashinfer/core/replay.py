"""Calls seen before, launched again at once: no check, no choice of an implementation, no dispatcher.

Checks made to tell what is wrong take longer than a small kernel, and so does the dispatcher. `replayed` remembers what
a function did with tensors of some layouts, as long as that was launches only, and does it again with the addresses of
the next tensors of the same layouts. It goes around torch's dispatcher, so it steps aside wherever something looks on:
under `torch.compile`, in a dispatch mode, for subclasses of Tensor. Version counters of tensors do not move.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, reduce, wraps
from operator import itemgetter, or_
from typing import Any

import torch

try:
    from torch._C._dynamo import guards
except ImportError:
    guards = None  # type: ignore[assignment]

# Kinds of calls a function remembers, by values and by layouts; beyond, it begins anew, and forgets the oldest.
CAPACITY, MOST_LAYOUTS = 1024, 16
# What has no behaviour of its own.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


class Number(int):
    """An argument that may differ in repeated calls; launches get this very object, as an argument of its own."""


Input = torch.Tensor | Number
# Launches again with the addresses of the function's tensors, and its Numbers among them; False where the record does
# not fit them after all, which the first launch of a call says.
Again = Callable[[list[int]], bool]
Fits = Callable[..., bool]
# By the values of a call, and where its tensors begin in 16 bytes: what each set of layouts came to.
Memory = dict[Hashable, list[tuple[Fits, Again]]]
_memories: list[Memory] = []
_permanent: dict[int, torch.Tensor] = {}
_address = torch.Tensor.data_ptr


class _Recording(threading.local):
    """tensors: those of the call under way, and its Numbers; None if nothing is recorded. launches: those so far.

    An entry is None where that cannot be repeated.
    """

    tensors: list[Input] | None = None
    launches: list[Again | None]


recording = _Recording()


def permanent(x: torch.Tensor) -> torch.Tensor:
    """Keep `x`, which nothing writes to any more, for the life of the process: records may hold its address."""
    _permanent[x.data_ptr()] = x
    return x


def forget() -> None:
    """Forget all calls, for tests that change what a call does."""
    for memory in _memories:
        memory.clear()


def replayed(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, called with positional arguments only, which repeats calls that differ in addresses only.

    Arguments: tensors, Numbers, tuples of them, hashable values. What the function does may depend on their layouts
    (shapes, strides, dtypes, devices, alignment to 16 bytes) and on the other values, not on the Numbers' nor on the
    contents of tensors on a GPU.
    """
    memory: Memory = {}
    _memories.append(memory)

    @wraps(function)
    def call(*arguments: Any) -> None:
        if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():
            return function(*arguments)
        flat, lengths = arguments, []
        for x in arguments:
            if x.__class__ is tuple:
                flat += x
                lengths.append(len(x))
        form = _form((*map(type, flat),), (*lengths,))
        if form is None:
            return function(*arguments)
        tensors = form.tensors(flat)
        addresses = [*map(_address, tensors)]
        offsets = tuple(x & 15 for x in addresses) if reduce(or_, addresses, 0) & 15 else 0
        key = (form, offsets, form.values(flat))
        try:
            known = memory.get(key, ())
        except TypeError:  # something cannot be hashed: the function knows what to say to it
            return function(*arguments)
        addresses += form.numbers(flat)
        for fits, again in known:
            if fits(*tensors):
                if again(addresses):
                    return None
                break
        if any(x.get_device() < 0 for x in tensors):  # the CPU: nothing is launched there
            return function(*arguments)
        launches = _recorded([*tensors, *form.numbers(flat)], function, arguments)
        if launches:
            _remember(memory, key, _layouts(tensors), _in_turn(launches))
        return None

    return call


class _Form:
    """Of which types the arguments of a call are: arguments, then the contents of those that are tuples.

    tensors, numbers, values: what they are given all of these for, to pick the tensors, the Numbers and the rest.
    """

    def __init__(self, types: tuple[type, ...], num_arguments: int) -> None:
        self.tensors = _picker([i for i, kind in enumerate(types) if kind in PLAIN])
        self.numbers = _picker([i for i, kind in enumerate(types) if kind is Number])
        known = (*PLAIN, Number)
        opened = [i for i in range(num_arguments) if types[i] is tuple]
        self.values = _picker([i for i, kind in enumerate(types) if kind not in known and i not in opened])


@lru_cache(maxsize=CAPACITY)
def _form(types: tuple[type, ...], lengths: tuple[int, ...]) -> _Form | None:
    """The form of these types, always the same object. lengths: of the tuples. None with a subclass of Tensor."""
    if any(issubclass(kind, torch.Tensor) and kind not in PLAIN for kind in types):
        return None
    return _Form(types, len(types) - sum(lengths))


def _picker(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """itemgetter that always returns a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda flat: tuple(flat[i] for i in places)


def _remember(memory: Memory, key: Hashable, fits: Fits, again: Again) -> None:
    """The newest layouts come first: they are those that come next."""
    if len(memory) >= CAPACITY:
        memory.clear()
    memory[key] = [(fits, again), *memory.get(key, ())][:MOST_LAYOUTS]


def _layouts(tensors: Sequence[torch.Tensor]) -> Fits:
    """Whether other tensors have the types, shapes, strides, dtypes and devices of these.

    A tensor given twice must be so again: the guards want each of theirs to be another one.
    """
    firsts = [next(j for j, y in enumerate(tensors) if y is x) for x in tensors]
    unique = sorted(set(firsts))
    same = _guarded([tensors[i] for i in unique])
    if len(unique) == len(tensors):
        return same

    def fits(*others: torch.Tensor) -> bool:
        return all(others[j] is x for j, x in zip(firsts, others, strict=True)) and same(*(others[i] for i in unique))

    return fits


def _guarded(tensors: Sequence[torch.Tensor]) -> Fits:
    """The same for tensors that are all different ones.

    Torch's guards of compiled functions look at all tensors in one call, at a tenth of the cost of asking each of them
    from Python. They are not public, so they may be missing.
    """
    if guards is None:
        return _compared(tensors)
    shapes: list[Any] = [list(x.shape) for x in tensors]
    strides: list[Any] = [list(x.stride()) for x in tensors]
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check


def _compared(tensors: Sequence[torch.Tensor]) -> Fits:
    layouts = [_layout(x) for x in tensors]
    return lambda *others: [_layout(x) for x in others] == layouts


def _layout(x: torch.Tensor) -> tuple[Hashable, ...]:
    return x.__class__, x.shape, x.stride(), x.dtype, x.get_device()


def _in_turn(launches: list[Again]) -> Again:
    """All launches of a call as one."""
    if len(launches) == 1:
        return launches[0]
    first, *others = launches

    def launch_all(addresses: list[int]) -> bool:
        if not first(addresses):
            return False
        for launch in others:
            launch(addresses)
        return True

    return launch_all


def _recorded(inputs: list[Input], function: Callable[..., None], arguments: Sequence[Any]) -> list[Again]:
    """Call the function; what it launched, nothing if that cannot be repeated."""
    outer, recording.tensors, recording.launches = recording.tensors, inputs, []
    try:
        function(*arguments)
        launches = recording.launches
    finally:
        recording.tensors, recording.launches = outer, []
    repeatable = [launch for launch in launches if launch is not None]
    return repeatable if len(repeatable) == len(launches) and outer is None else []


class Template:
    """The arguments of a launch, nested as they were, for other addresses of the tensors they came from.

    inputs: the tensors and Numbers of the recorded call. An argument that is a tensor must begin in exactly one of
    them, or be permanent; where two inputs begin at one address, they have to in later calls. Raises LookupError where
    the arguments cannot be told from the inputs.
    """

    def __init__(self, inputs: Sequence[Input], arguments: tuple[Any, ...]) -> None:
        self._numbers = [x if isinstance(x, Number) else None for x in inputs]
        # A Number lies nowhere: at an address of its own, with no byte in it.
        self._begins = [-1 - i if isinstance(x, Number) else x.data_ptr() for i, x in enumerate(inputs)]
        self._ends = [-len(inputs) - 1 if isinstance(x, Number) else _end(x) for x in inputs]
        self._offsets: list[tuple[int, int]] = []
        self._constants: list[Any] = []
        self._tuples: list[Callable[[list[Any]], Any]] = []
        # Places are those of the pool that `fill` builds: addresses, addresses with offsets, constants, tuples.
        kinds = ("address", "offset", "constant", "tuple")
        self._places: list[list[tuple[str, int]]] = []
        self._visit(arguments)
        sizes = (len(inputs), len(self._offsets), len(self._constants), len(self._places))
        begin = {kind: sum(sizes[:i]) for i, kind in enumerate(kinds)}
        for places in self._places:
            self._tuples.append(itemgetter(*(begin[kind] + i for kind, i in places)))
        firsts = [self._begins.index(address) for address in self._begins]
        self.shared = [(i, first) for i, first in enumerate(firsts) if i != first]

    def _visit(self, x: Any) -> tuple[str, int]:
        if isinstance(x, torch.Tensor):
            return self._tensor(x)
        if isinstance(x, Number):
            return "address", next(i for i, number in enumerate(self._numbers) if number is x)
        if _holds_tensor(x):
            if len(x) < 2:
                raise LookupError("a tuple of one")
            places = [self._visit(part) for part in x]
            self._places.append(places)
            return "tuple", len(self._places) - 1
        self._constants.append(x)
        return "constant", len(self._constants) - 1

    def _tensor(self, x: torch.Tensor) -> tuple[str, int]:
        address = x.data_ptr()
        if address in self._begins:
            return "address", self._begins.index(address)
        if x.data_ptr() in _permanent:
            self._constants.append(address)
            return "constant", len(self._constants) - 1
        holders = [i for i in range(len(self._begins)) if self._begins[i] <= address < self._ends[i]]
        (holder,) = holders if len(holders) == 1 else (None,)
        if holder is None:
            raise LookupError("a tensor of none of the inputs, or of several")
        self._offsets.append((holder, address - self._begins[holder]))
        return "offset", len(self._offsets) - 1

    def fill(self, addresses: list[int]) -> tuple[Any, ...]:
        """The arguments, with addresses in the place of tensors; they are in the order of the inputs."""
        pool: list[Any] = [*addresses, *(addresses[i] + offset for i, offset in self._offsets), *self._constants]
        for pick in self._tuples:
            pool.append(pick(pool))
        result: tuple[Any, ...] = pool[-1]
        return result


def _end(x: torch.Tensor) -> int:
    """The address behind the last element."""
    if x.numel() == 0:
        return x.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (last + 1) * x.element_size()


def _holds_tensor(x: Any) -> bool:
    return isinstance(x, (torch.Tensor, Number)) or (isinstance(x, tuple) and any(map(_holds_tensor, x)))
