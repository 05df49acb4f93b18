"""Calls seen before, launched again at once: no check, no choice of an implementation, no dispatcher.

Checks made to tell what is wrong take longer than a small kernel, and so does the dispatcher. `replayed` remembers what
a function did with tensors of some layouts, as long as that was launches only, and does it again with the addresses of
the next tensors of the same layouts. It goes around torch's dispatcher, so it steps aside wherever something looks on:
under `torch.compile`, in a dispatch mode, for subclasses of Tensor. Version counters of tensors do not move.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import wraps
from operator import itemgetter
from typing import Any

import torch

# Kinds of calls a function remembers; beyond, it begins anew.
CAPACITY = 8192
# What has no behaviour of its own.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


class Number(int):
    """An argument that may differ in repeated calls; launches get this very object, as an argument of its own."""


Input = torch.Tensor | Number
# Launches again with the addresses of the function's tensors, and its Numbers among them; False where the record does
# not fit them after all, which the first launch of a call says.
Again = Callable[[list[int]], bool]
Memory = dict[Hashable, Again]
_memories: list[Memory] = []
_permanent: dict[int, torch.Tensor] = {}


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
        key: list[Hashable] = []
        tensors: list[Input] = []
        addresses: list[int] = []
        for x in arguments:
            parts = (x,)
            if x.__class__ is tuple:
                parts = x
                key.append(len(x))
            for part in parts:
                if part.__class__ in PLAIN:
                    device = part.get_device()
                    if device < 0:  # the CPU: nothing is launched there
                        return function(*arguments)
                    address = part.data_ptr()
                    tensors.append(part)
                    addresses.append(address)
                    key += (part.shape, part.stride(), part.dtype, device, address & 15)
                elif part.__class__ is Number:
                    tensors.append(part)
                    addresses.append(int(part))
                    key.append(Number)
                elif isinstance(part, torch.Tensor):
                    return function(*arguments)
                else:
                    key += (part.__class__, part)
        kind = tuple(key)
        try:
            again = memory.get(kind)
        except TypeError:  # something cannot be hashed: the function knows what to say to it
            return function(*arguments)
        if again is not None and again(addresses):
            return None
        return _record(memory, kind, tensors, function, arguments)

    return call


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


def _record(
    memory: Memory,
    kind: Hashable,
    tensors: list[Input],
    function: Callable[..., None],
    arguments: Sequence[Any],
) -> None:
    """Call the function and remember what it launched."""
    outer, recording.tensors, recording.launches = recording.tensors, tensors, []
    try:
        function(*arguments)
        launches = recording.launches
    finally:
        recording.tensors, recording.launches = outer, []
    repeatable = [launch for launch in launches if launch is not None]
    if repeatable and len(repeatable) == len(launches) and outer is None:
        if len(memory) >= CAPACITY:
            memory.clear()
        memory[kind] = _in_turn(repeatable)


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
        if isinstance(getattr(x, "base", None), torch.Tensor):
            raise LookupError("a tensor map, which holds an address")
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
