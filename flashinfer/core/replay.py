"""Calls seen before, launched again at once: no check, no choice of an implementation, no dispatcher.

Checks made to tell what is wrong take longer than a small kernel, and so does the dispatcher. `replayed` remembers what
a function did with tensors of some layouts, as long as that was launches only, and does it again with the addresses of
the next tensors of the same layouts. It goes around torch's dispatcher, so it steps aside wherever something looks on:
under `torch.compile`, in a mode, in a trace, for subclasses of Tensor. Nothing is lost that the first call has: the
package's ops have no gradients and move no version counters.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial, reduce, wraps
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch

# What torch does not publish may be missing in another release: without the guards tensors are compared one by one,
# without the numbers of modes nothing is repeated.
try:
    from torch._C._dynamo import guards
except ImportError:
    guards = None  # type: ignore[assignment]
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)

# Kinds of calls a function remembers, by values and by layouts; beyond, it begins anew, and forgets the oldest.
CAPACITY, MOST_LAYOUTS = 1024, 16
# What has no behaviour of its own.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


class Number(int):
    """An argument that may differ in repeated calls; launches get this very object, as an argument of its own."""


Input = torch.Tensor | Number
# (i, j, distance): the address of input i less that of input j, which has to be the same again.
Relation = tuple[int, int, int]


class Repeat(NamedTuple):
    """One launch that can be made again, with the addresses of the function's tensors, and its Numbers, for these."""

    relations: Sequence[Relation]
    launch: Callable[[list[int]], None]


# All launches of a call again; False, and nothing launched, where the addresses do not relate as they did.
Again = Callable[[list[int]], bool]
Fits = Callable[..., bool]
# By the values of a call, and where its tensors begin in 16 bytes: what each set of layouts came to.
Memory = dict[Hashable, list[tuple[Fits, Again]]]
_memories: list[Memory] = []
_permanent: dict[int, torch.Tensor] = {}
_address = torch.Tensor.data_ptr
_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


class _Recording(threading.local):
    """tensors: those of the call under way, its Numbers, then what it made; None if nothing is recorded. makers: of
    what it made. launches: those so far, None for one that cannot be repeated. paused: nothing is repeated in this
    thread.
    """

    tensors: list[Input] | None = None
    makers: list[Callable[[], torch.Tensor]]
    launches: list[Repeat | None]
    paused: bool = False


recording = _Recording()


def permanent(x: torch.Tensor) -> torch.Tensor:
    """Keep `x`, which is no argument of a call, until it is released: records hold its address."""
    _permanent[x.data_ptr()] = x
    return x


def release(tensors: Sequence[torch.Tensor]) -> None:
    """Let go of tensors that were permanent. No call may come again whose records hold their addresses."""
    for x in tensors:
        _permanent.pop(x.data_ptr(), None)


def forget() -> None:
    """Forget all calls, for tests that change what a call does."""
    for memory in _memories:
        memory.clear()


def zeros(count: int, device: torch.device) -> torch.Tensor:
    """int32 zeros `[count]` for the launches of the call under way, which makes others when it is repeated."""
    make = partial(torch.zeros, count, dtype=torch.int32, device=device)
    made = make()
    if recording.tensors is not None:
        recording.tensors.append(made)
        recording.makers.append(make)
    return made


@contextmanager
def paused() -> Iterator[None]:
    """Within, in this thread, calls neither are repeated nor remembered: for measuring what else they could do."""
    before = recording.paused
    recording.paused = True
    try:
        yield
    finally:
        recording.paused = before


def replayed(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, called with positional arguments only, which repeats calls that differ in addresses only.

    Arguments: tensors, Numbers, tuples of them, hashable values. What the function does may depend on their layouts
    (shapes, strides, dtypes, devices, alignment to 16 bytes) and on the other values, not on the Numbers' nor on the
    contents of tensors on a GPU. 0.0 and -0.0 are one value. What it does to tensors must be launches only, as nothing
    else is seen here but `zeros`; what it calls that is `replayed` as well counts as its own.
    """
    memory: Memory = {}
    _memories.append(memory)

    @wraps(function)
    def call(*arguments: Any) -> None:
        watched = torch.compiler.is_dynamo_compiling() or _dispatch_modes() or _function_modes()
        if watched or recording.tensors is not None or recording.paused:
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
        try:
            addresses = [*map(_address, tensors)]
        except RuntimeError:  # wrappers of torch.func have no memory
            return function(*arguments)
        offsets = tuple(x & 15 for x in addresses) if reduce(or_, addresses, 0) & 15 else 0
        key = (form, offsets, form.values(flat))
        try:
            known = memory.get(key, ())
        except TypeError:  # something cannot be hashed: the function knows what to say to it
            return function(*arguments)
        addresses += form.numbers(flat)
        for fits, again in known:
            if fits(*tensors) and again(addresses):
                return None
        # Nothing is launched on the CPU; a trace is a property of the thread, which the guards see.
        if any(x.get_device() < 0 for x in tensors) or _is_tracing():
            return function(*arguments)
        launches, makers = _recorded([*tensors, *form.numbers(flat)], function, arguments)
        if launches:
            _remember(memory, key, _layouts(tensors), _in_turn(launches, makers))
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
    """The form of these types, always the same object. lengths: of the tuples.

    None with a subclass of Tensor, and with tuples of another kind or within tuples, which may hold tensors.
    """
    num_arguments = len(types) - sum(lengths)
    for i, kind in enumerate(types):
        opened = kind is tuple and i < num_arguments
        if issubclass(kind, (torch.Tensor, tuple)) and kind not in PLAIN and not opened:
            return None
    return _Form(types, num_arguments)


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

    pick, again = _picker(unique), [(i, j) for i, j in enumerate(firsts) if i != j]

    def fits(*others: torch.Tensor) -> bool:
        for i, j in again:
            if others[i] is not others[j]:
                return False
        return same(*pick(others))

    return fits


def _guarded(tensors: Sequence[torch.Tensor]) -> Fits:
    """The same for tensors that are all different ones.

    Torch's guards of compiled functions look at all tensors in one call, at a tenth of the cost of asking each of them
    from Python.
    """
    make = _tensor_guards()
    return _compared(tensors) if make is None else make(tensors)


@cache
def _tensor_guards() -> Callable[[Sequence[torch.Tensor]], Fits] | None:
    """Torch's guards, None where this release has none, or others than are known here."""

    def make(tensors: Sequence[torch.Tensor]) -> Fits:
        shapes: list[Any] = [list(x.shape) for x in tensors]
        strides: list[Any] = [list(x.stride()) for x in tensors]
        check: Fits = guards.TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
        return check

    x = torch.zeros(2, 2, device="cpu")
    others = x[:1], x.t(), x.double(), torch.nn.Parameter(x, requires_grad=False)
    try:
        fits = make([x])
        known = fits(x.clone()) and not any(map(fits, others))
    except Exception:  # whatever a function does that is another one by now
        return None
    return make if known else None


def _compared(tensors: Sequence[torch.Tensor]) -> Fits:
    layouts = [_layout(x) for x in tensors]

    def fits(*others: torch.Tensor) -> bool:
        if _is_tracing() or len(set(map(id, others))) < len(others):
            return False
        return [_layout(x) for x in others] == layouts

    return fits


def _layout(x: torch.Tensor) -> tuple[Hashable, ...]:
    state = (x.requires_grad, x.is_inference(), x.is_neg())
    return x.__class__, x.shape, x.stride(), x.dtype, x.get_device(), state


def _in_turn(repeats: list[Repeat], makers: list[Callable[[], torch.Tensor]]) -> Again:
    """All launches of a call as one, after what it makes: none of them where one does not fit."""
    relations = tuple(dict.fromkeys(relation for repeat in repeats for relation in repeat.relations))
    first, *others = (repeat.launch for repeat in repeats)

    def launch_all(addresses: list[int]) -> bool:
        for i, j, distance in relations:
            if addresses[i] - addresses[j] != distance:
                return False
        if makers:
            made = [make() for make in makers]
            addresses += map(_address, made)
        first(addresses)
        for launch in others:
            launch(addresses)
        return True

    return launch_all


def _recorded(
    inputs: list[Input], function: Callable[..., None], arguments: Sequence[Any]
) -> tuple[list[Repeat], list[Callable[[], torch.Tensor]]]:
    """Call the function; what it launched, nothing if that cannot be repeated, and the makers of what it made."""
    recording.tensors, recording.launches, recording.makers = inputs, [], []
    try:
        function(*arguments)
        launches, makers = recording.launches, recording.makers
    finally:
        recording.tensors, recording.launches, recording.makers = None, [], []
    repeatable = [launch for launch in launches if launch is not None]
    return repeatable if len(repeatable) == len(launches) else [], makers


class Template:
    """The arguments of a launch, nested as they were, for other addresses of the tensors they came from.

    inputs: the tensors and Numbers of the recorded call. An argument that is a tensor, or Triton's descriptor of one,
    must begin in one of them, or be permanent. shared: (i, j, distance) for inputs i and j that an argument begins in
    both of; as it cannot be told which it came from, later calls must have input i `distance` bytes behind input j too.
    Raises LookupError where the arguments cannot be told from the inputs.
    """

    def __init__(self, inputs: Sequence[Input], arguments: tuple[Any, ...]) -> None:
        self._numbers = [x if isinstance(x, Number) else None for x in inputs]
        # A Number lies nowhere: at an address of its own, with no byte in it.
        self._begins = [-1 - i if isinstance(x, Number) else x.data_ptr() for i, x in enumerate(inputs)]
        self._ends = [-len(inputs) - 1 if isinstance(x, Number) else _end(x) for x in inputs]
        self._offsets: list[tuple[int, int]] = []
        self._constants: list[Any] = []
        self._maps: list[tuple[Callable[[int], Any], tuple[str, int]]] = []
        self._tuples: list[Callable[[Any], Any]] = []
        self.shared: list[Relation] = []
        # Places are those of the pool that `fill` builds: addresses, addresses with offsets, constants, descriptors,
        # tuples.
        self._count = len(inputs)
        kinds = ("address", "offset", "constant", "map", "tuple")
        self._places: list[list[tuple[str, int]]] = []
        self._visit(arguments)
        sizes = (len(inputs), len(self._offsets), len(self._constants), len(self._maps), len(self._places))
        begin = {kind: sum(sizes[:i]) for i, kind in enumerate(kinds)}
        self._describe = [(describe, begin[kind] + i) for describe, (kind, i) in self._maps]
        for places in self._places:
            self._tuples.append(_picker([begin[kind] + i for kind, i in places]))

    def _visit(self, x: Any) -> tuple[str, int]:
        if isinstance(x, torch.Tensor):
            return self._tensor(x)
        if isinstance(x, Number):
            return "address", next(i for i, number in enumerate(self._numbers) if number is x)
        if _is_descriptor(x):
            self._maps.append((_describer(x), self._tensor(x.base)))
            return "map", len(self._maps) - 1
        if _holds_tensor(x):
            places = [self._visit(part) for part in x]
            self._places.append(places)
            return "tuple", len(self._places) - 1
        if _may_hide_tensor(x):
            raise LookupError("a tensor where it cannot be replaced")
        return self._constant(x)

    def _constant(self, x: Any) -> tuple[str, int]:
        self._constants.append(x)
        return "constant", len(self._constants) - 1

    def _tensor(self, x: torch.Tensor) -> tuple[str, int]:
        address = x.data_ptr()
        bounds = enumerate(zip(self._begins, self._ends, strict=True))
        holders = [i for i, (begin, end) in bounds if begin == address or begin < address < end]
        if not holders:
            if address not in _permanent:
                raise LookupError("a tensor of none of the inputs")
            return self._constant(address)
        first, *others = holders
        for i in others:
            relation = (i, first, self._begins[i] - self._begins[first])
            if relation not in self.shared:
                self.shared.append(relation)
        if address == self._begins[first]:
            return "address", first
        self._offsets.append((first, address - self._begins[first]))
        return "offset", len(self._offsets) - 1

    def fill(self, addresses: list[int]) -> tuple[Any, ...]:
        """The arguments, with addresses in the place of tensors; they are in the order of the inputs.

        After those may come others, of what the call made later.
        """
        pool: list[Any] = [
            *addresses[: self._count],
            *(addresses[i] + offset for i, offset in self._offsets),
            *self._constants,
        ]
        for describe, i in self._describe:
            pool.append(describe(pool[i]))
        for pick in self._tuples:
            pool.append(pick(pool))
        result: tuple[Any, ...] = pool[-1]
        return result


class _Base:
    """Memory at an address: of a tensor, what a launch asks the one in a descriptor for."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _is_descriptor(x: Any) -> bool:
    """Whether `x` is one of Triton's TensorDescriptors, of which there are several classes."""
    return type(x).__name__ == "TensorDescriptor" and isinstance(getattr(x, "base", None), torch.Tensor)


def _describer(x: Any) -> Callable[[int], Any]:
    """A function of addresses: the descriptor `x` of memory there. Keeps no tensor."""
    kind, fields = type(x), {name: value for name, value in vars(x).items() if name != "base"}

    def describe(address: int) -> Any:
        # The constructor would check again what it has checked of `x`.
        made = object.__new__(kind)
        made.__dict__.update(fields, base=_Base(address))
        return made

    return describe


def _end(x: torch.Tensor) -> int:
    """The address behind the last element."""
    if x.numel() == 0:
        return x.data_ptr()
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (last + 1) * x.element_size()


def _holds_tensor(x: Any) -> bool:
    if isinstance(x, tuple):
        return any(map(_holds_tensor, x))
    return isinstance(x, (torch.Tensor, Number)) or _is_descriptor(x)


def _may_hide_tensor(x: Any) -> bool:
    """Whether `x`, which is no tensor, could hold one elsewhere than in tuples."""
    if isinstance(x, tuple):
        return any(map(_may_hide_tensor, x))
    return isinstance(x, (list, dict, set)) or any(
        isinstance(y, torch.Tensor) for y in getattr(x, "__dict__", {}).values()
    )
