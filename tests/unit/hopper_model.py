"""Shared memory, barriers and asynchronous copies and products of one Hopper SM, in plain Python.

A role (a warp or a warpgroup) is a generator that yields one operation at a time. TMA loads and stores and products
finish at a random later time; a random scheduler decides who goes on. What real hardware would answer with a hang or
with garbage is a `ProtocolError`. A warpgroup that multiplies is one thread here: what its threads owe each other is
not looked at. Warps that copy can be roles each, of one team.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

HARDWARE_BARRIERS, BOX_BYTES = 16, 2048
Tile = tuple[str, int, int]  # tensor, work item, first token (Q and O: warpgroup)
Condition = Callable[[], bool]
Operation = Callable[["Gpu", "Role"], "Condition | None"]  # what it returns must hold before the role goes on
Steps = Iterator[Operation]


class ProtocolError(Exception):
    """The hardware would hang or the kernel read garbage."""


def check(condition: object, message: str) -> None:
    if not condition:
        raise ProtocolError(message)


class Role:
    """A warp or a warpgroup; `ready`: whether what it waits for has come.

    team: warps that run one program side by side, itself included; what one thread of them does, the first one does.
    sees: stores of numbers that came before whatever it does next.
    """

    def __init__(self, name: str, warps: int, steps: Steps, team: tuple[str, ...]) -> None:
        self.name, self.threads, self.steps, self.team = name, 32 * warps, steps, team
        self.ready: Condition = lambda: True
        self.sees: set[object] = set()

    @property
    def leads(self) -> bool:
        return self.name == self.team[0]


class HardwareBarrier:
    """A named barrier; strict: a generation counts every partner once, and all of them name one number of threads."""

    def __init__(self) -> None:
        self.came: dict[str, int] = {}
        self.threads = self.generation = 0

    def arrive(self, role: Role, threads: int) -> None:
        check(not self.came or threads == self.threads, "barrier with two thread counts")
        check(role.name not in self.came, f"{role.name} came twice to a barrier")
        self.threads = threads
        self.came[role.name] = role.threads
        check(sum(self.came.values()) <= threads, "more threads at a barrier than it counts")
        if sum(self.came.values()) == threads:
            self.came.clear()
            self.generation += 1


class Gpu:
    """The scheduler and everything that is in flight. flights: of each queue, what to do as they land."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.roles: dict[str, Role] = {}
        self.barriers = [HardwareBarrier() for _ in range(HARDWARE_BARRIERS)]
        self.flights: dict[tuple[str, str], list[Callable[[], None]]] = {}
        self.written: Counter[Tile] = Counter()
        self.turn: str | None = None
        self.unfenced: set[Box] = set()

    def start(self, name: str, warps: int, steps: Steps, team: tuple[str, ...] = ()) -> None:
        self.roles[name] = Role(name, warps, steps, team or (name,))

    def others(self, role: Role) -> set[str]:
        return set(self.roles).difference(role.team)

    def fly(self, role: Role, kind: str, land: Callable[[], None]) -> None:
        self.flights.setdefault((role.name, kind), []).append(land)

    def in_flight(self, role: Role, kind: str) -> int:
        return len(self.flights.get((role.name, kind), ()))

    def run(self) -> None:
        """Until nobody has anything left to do. Each actor has a pace of its own, up to 10,000 times another's."""
        pace: dict[Any, float] = {}
        while self.roles or any(self.flights.values()):
            actors: list[Any] = [name for name, role in self.roles.items() if role.ready()]
            actors += [queue for queue, flights in self.flights.items() if flights]
            check(actors, f"deadlock of {', '.join(self.roles)}")
            for actor in actors:
                pace.setdefault(actor, 10 ** self.rng.uniform(-4, 0))
            actor = self.rng.choices(actors, [pace[a] for a in actors])[0]
            if isinstance(actor, str):
                self.step(self.roles[actor])
            else:  # TMA boxes end in any order
                flights = self.flights[actor]
                flights.pop(self.rng.randrange(len(flights)) if actor[1] in ("load", "store") else 0)()

    def step(self, role: Role) -> None:
        operation = next(role.steps, None)
        if operation is None:
            # Somebody waits for what is copied: it is enough that not all have left.
            left: list[object] = [kind for kind in ("load", "store", "product") if self.in_flight(role, kind)]
            del self.roles[role.name]
            left += [] if self.roles else [queue for queue, flights in self.flights.items() if flights]
            check(not left, f"{role.name} left with a {left} in flight")
        else:
            role.ready = operation(self, role) or (lambda: True)


def named_sync(barrier: int, threads: int) -> Operation:
    def operation(gpu: Gpu, me: Role) -> Condition:
        at = gpu.barriers[barrier]
        generation = at.generation
        at.arrive(me, threads)
        return lambda: at.generation != generation

    return operation


def named_arrive(barrier: int, threads: int) -> Operation:
    return lambda gpu, me: gpu.barriers[barrier].arrive(me, threads)


class mbarrier:
    """A phase ends when `count` roles have arrived and all announced bytes; who waits for it sees what they saw."""

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.arrivals = self.bytes = self.phase = 0
        self.coming: set[object] = set()
        self.shows: set[object] = set()

    def update(self, arrivals: int, bytes: int, seen: Iterable[object] = ()) -> None:
        self.arrivals += arrivals
        self.bytes += bytes
        self.coming.update(seen)
        check(self.arrivals <= self.count and self.bytes >= 0, "mbarrier arrived at twice in a phase")
        if self.arrivals == self.count and self.bytes == 0:
            self.arrivals = 0
            self.phase += 1
            self.shows |= self.coming
            self.coming.clear()

    def expect(self, bytes: int) -> Operation:
        """By one thread."""
        return lambda gpu, me: self.update(1, bytes, me.sees) if me.leads else None

    def wait(self, parity: int, pred: bool = True) -> Operation:
        def operation(gpu: Gpu, me: Role) -> Condition:
            def over() -> bool:
                if pred and self.phase % 2 != parity:
                    me.sees |= self.shows
                return not pred or self.phase % 2 != parity

            return over

        return operation


class Box:
    """Shared memory of one TMA box. owners: consumers that have yet to release it; readers: reads in flight.

    unfenced: roles whose asynchronous reads do not see yet what threads wrote there. loading: parts of `coming` that
    have yet to land.
    """

    def __init__(self, bytes: int = BOX_BYTES) -> None:
        self.bytes = bytes
        self.unfenced: set[str] = set()
        self.holds: Tile | None = None
        self.coming: Tile | None = None
        self.loading = 0
        self.owners: set[str] = set()
        self.readers = 0

    def begin_read(self, role: Role, tile: Tile) -> None:
        check(self.holds == tile, f"{role.name} reads {self.holds} and means {tile}")
        check(role.name not in self.unfenced, f"{role.name} reads {tile} before a fence")
        self.readers += 1

    def load(self, tile: Tile) -> Operation:
        return lambda gpu, me: self.begin_read(me, tile)

    def store(self, tile: Tile, reads: int = 0) -> Operation:
        """Ends `reads` reads of this role; others may read on while what the box holds stays the same."""

        def operation(gpu: Gpu, me: Role) -> None:
            self.readers -= reads
            check(not self.loading and (self.holds == tile or not self.readers), f"{tile} stored into a box in use")
            self.holds = tile
            self.unfenced.add(me.name)
            gpu.unfenced.add(self)

        return operation


class Readable(Box):
    """Threads read it, at once: that takes no fence."""

    def load(self, tile: Tile) -> Operation:
        return Part([self]).load(tile)

    def slice(self, begin: int, rows: int) -> Readable:
        return self


class Part(list[Box]):
    def load(self, tile: Tile) -> Operation:
        """By threads, at once: that takes no fence."""

        def operation(gpu: Gpu, me: Role) -> None:
            for box in self:
                check(box.holds == tile, f"{me.name} reads {box.holds} and means {tile}")

        return operation

    def slice(self, begin: int, rows: int) -> Part:
        return self

    def store(self, tile: Tile) -> Operation:
        def operation(gpu: Gpu, me: Role) -> None:
            for box in self:
                box.store(tile)(gpu, me)

        return operation


class Word:
    """A number in shared memory, which threads store and load.

    A load sees a store only where an arrival on an mbarrier, by who stored, came after it, and the end of that phase
    before the load. Warps of a team all store the same. owners: roles that have yet to release it.
    """

    def __init__(self) -> None:
        self.value = 0
        self.stores: dict[str, object] = {}
        self.owners: set[str] = set()
        self.loaded = False

    def store(self, value: int) -> Operation:
        def operation(gpu: Gpu, me: Role) -> None:
            if not self.stores or me.name in self.stores:
                check(not self.owners, f"{me.name} stores {value} over {self.value} before its release")
                self.value, self.stores, self.owners, self.loaded = value, {}, gpu.others(me), False
            check(value == self.value and not self.loaded, f"{me.name} stores {value} where {self.value} is read")
            self.stores[me.name] = object()
            me.sees.add(self.stores[me.name])

        return operation

    def load(self, numbers: list[int]) -> Operation:
        """Appends to `numbers`."""

        def operation(gpu: Gpu, me: Role) -> None:
            seen = self.stores and me.sees.issuperset(self.stores.values())
            check(seen and me.name in self.owners, f"{me.name} reads a number that it need not see")
            self.loaded = True
            numbers.append(self.value)

        return operation


def _overwrite(gpu: Gpu, me: Role, tile: Tile, box: Box, parts: int) -> None:
    check(not box.readers, f"{tile} overwrites {box.holds} while it is read")
    check(not box.owners and not box.loading, f"{tile} overwrites {box.holds} before its release")
    box.holds, box.coming, box.loading = None, tile, parts
    box.owners = gpu.others(me)
    box.unfenced.clear()


def tma_load(tile: Tile, landing: mbarrier, box: Box) -> Operation:
    """By one thread."""

    def operation(gpu: Gpu, me: Role) -> None:
        if not me.leads:
            return
        _overwrite(gpu, me, tile, box, 1)

        def land() -> None:
            box.holds, box.loading = tile, 0
            landing.update(0, -box.bytes)

        gpu.fly(me, "load", land)

    return operation


def copy_load(part: Part, tile: Tile) -> Operation:
    """A copy by threads, of which each warp of a team does a part."""

    def operation(gpu: Gpu, me: Role) -> None:
        for box in part:
            if not box.loading or box.coming != tile:
                _overwrite(gpu, me, tile, box, len(me.team))
                box.unfenced |= box.owners
        gpu.unfenced.update(part)

        def land() -> None:
            for box in part:
                box.loading -= 1
                if not box.loading:
                    box.holds = tile

        gpu.fly(me, "copy", land)

    return operation


def copy_arrive(landing: mbarrier) -> Operation:
    """Arrives when all copies before it have landed, so that one queue can hold both."""

    def operation(gpu: Gpu, me: Role) -> None:
        seen = set(me.sees)
        gpu.fly(me, "copy", lambda: landing.update(1, 0, seen))

    return operation


def rows_from(tile: Tile, rows: int) -> list[Tile]:
    name, first, rest = tile
    return [(name, first + i, rest) for i in range(rows)]


def tma_store(tile: Tile, box: Box, rows: int = 1) -> Operation:
    def operation(gpu: Gpu, me: Role) -> None:
        box.begin_read(me, tile)

        def land() -> None:
            box.readers -= 1
            gpu.written.update(rows_from(tile, rows))

        gpu.fly(me, "store", land)

    return operation


def tma_store_wait(pending: int) -> Operation:
    return lambda gpu, me: lambda: gpu.in_flight(me, "store") <= pending


def fence_async_shared() -> Operation:
    def operation(gpu: Gpu, me: Role) -> None:
        for box in gpu.unfenced:
            if not box.loading:
                box.unfenced.discard(me.name)

    return operation


def partition_barrier() -> Operation:
    return lambda gpu, me: None


def plain_store(tile: Tile, boxes: int, rows: int = 1) -> Operation:
    return lambda gpu, me: gpu.written.update(dict.fromkeys(rows_from(tile, rows), boxes))


def warpgroup_mma(*operands: tuple[Part, Tile]) -> Operation:
    """A product that reads these parts of shared memory, from now until some time later."""

    def operation(gpu: Gpu, me: Role) -> None:
        for part, tile in operands:
            for box in part:
                box.begin_read(me, tile)

        def land() -> None:
            for part, _ in operands:
                for box in part:
                    box.readers -= 1

        gpu.fly(me, "product", land)

    return operation


def warpgroup_mma_wait(pending: int) -> Operation:
    return lambda gpu, me: lambda: gpu.in_flight(me, "product") <= pending


def assert_found(message: str, run: Callable[[random.Random], None]) -> None:
    """Some of 200 random schedules must fail as `message` (a regex) says; the seed is fixed, so no luck is needed."""
    rng, found = random.Random(0), set()
    for _ in range(200):
        try:
            run(rng)
        except ProtocolError as error:
            found.add(str(error))
            if re.search(message, str(error)):
                return
    raise AssertionError(f"found only {found}")
