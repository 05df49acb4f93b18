"""What an all-reduce should take on 8 to 1024 GPUs, and which algorithm is the fastest; writes docs/communication.md.

`python -m tools.comm_model` prints the table; `--local pcie`, `--gap US`, `--gpus N ...` and `--sizes BYTES ...` change
what is asked. `--write` puts the tables into the document, `--check` exits 1 where they are out of date. The formulas,
constants with their sources, and limits are explained in the document.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PATH = Path(__file__).resolve().parents[1] / "docs" / "communication.md"
KB, MB = 1 << 10, 1 << 20
SIZES = (2 * KB, 16 * KB, 64 * KB, 256 * KB, 1 * MB, 4 * MB, 16 * MB, 64 * MB, 256 * MB)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Link:
    """What joins GPUs.

    latency: us from a store to its being seen. bandwidth: GB/s of one GPU, each way, sum over peers. gap: us that each
    message keeps the port busy beside its bytes. carries_net: the way to the network adapter is through this port, too.
    """

    name: str
    latency: float
    bandwidth: float
    gap: float = 0.0
    carries_net: bool = False


@dataclass(frozen=True)
class Cluster:
    """gpus in hosts of `host_gpus`; launch: us of a kernel that exchanges nothing."""

    gpus: int
    local: Link
    net: Link
    host_gpus: int = 8
    launch: float = 2.0

    def __post_init__(self) -> None:
        if self.gpus < 1 or (self.gpus > self.host_gpus and self.gpus % self.host_gpus):
            raise ValueError(f"gpus: got {self.gpus}, expected full hosts of {self.host_gpus}.")

    @property
    def per_host(self) -> int:
        return min(self.gpus, self.host_gpus)

    @property
    def hosts(self) -> int:
        return self.gpus // self.per_host


# Fitted to one-shot and two-shot kernels on two H200s, 2026-11-22: 2 + 1.5 us an exchange, 340 GB/s.
NVLINK = Link("NVLink 4", 1.5, 340.0)
# 64 GB/s: PCI Express 5.0, x16. 1 us: NCCL's own model, a hop of its LL protocol.
PCIE = Link("PCIe 5.0 x16", 1.0, 64.0, carries_net=True)
# 400 Gb/s: InfiniBand NDR, one adapter a GPU. 5 us: NCCL's own model, a network hop of its trees with LL.
NDR = Link("InfiniBand NDR", 5.0, 50.0, gap=0.25)
LOCAL = {"nvlink": NVLINK, "pcie": PCIE}


@dataclass(frozen=True)
class Phase:
    """A part of an algorithm, of one piece of the message: the next part of that piece begins when it has ended.

    Hops and `path` are what one piece waits for: latencies one after the other, then microseconds of bytes on the way.
    local_bytes, net_bytes, net_messages: what the busiest GPU sends, which bounds how fast pieces can follow another.
    Without `path` a piece waits for those: for the slower of the two links, as both work at the same time.
    """

    local_hops: int = 0
    local_bytes: float = 0.0
    net_hops: int = 0
    net_messages: int = 0
    net_bytes: float = 0.0
    path: float | None = None

    def busy(self, c: Cluster) -> tuple[float, float]:
        """Microseconds that the busiest GPU's local port and network adapter work."""
        through_port = self.local_bytes + (self.net_bytes if c.local.carries_net else 0.0)
        local = through_port / (c.local.bandwidth * 1e3)
        return local, self.net_messages * c.net.gap + self.net_bytes / (c.net.bandwidth * 1e3)

    def microseconds(self, c: Cluster) -> float:
        hops = self.local_hops * c.local.latency + self.net_hops * c.net.latency
        return hops + (max(self.busy(c)) if self.path is None else self.path)


Phases = list[Phase]


def direct(size: float, c: Cluster) -> Phase:
    """Every GPU sends `size` bytes to every other one."""
    others, outside = c.per_host - 1, c.gpus - c.per_host
    if outside:
        return Phase(0, others * size, 1, outside, outside * size)
    return Phase(1 if others else 0, others * size)


def one_shot(size: float, c: Cluster) -> Phases:
    return [direct(size, c)]


def two_shot(size: float, c: Cluster) -> Phases:
    return [direct(size / c.gpus, c)] * 2


def ring(size: float, c: Cluster) -> Phases:
    """As many rings as GPUs in a host, each with its share of the bytes and leaving each host at another GPU."""
    steps, piece = 2 * (c.gpus - 1), size / (c.gpus * c.per_host)
    if c.hosts == 1:
        return [Phase(steps, steps * size / c.gpus)]
    net_hops = 2 * (c.hosts - 1)
    return [Phase(steps - net_hops, steps * (c.per_host - 1) * piece, net_hops, steps, steps * piece)]


def tree(size: float, c: Cluster) -> Phases:
    """Two binary trees of hosts with half the bytes each, a chain within a host; up, then down."""
    depth, chain = math.ceil(math.log2(c.hosts)), c.per_host - 1
    share = size / c.per_host
    # Each hop of the way takes the whole piece before the next begins.
    path = 2 * chain * size / (c.local.bandwidth * 1e3)
    path += 2 * depth * (c.net.gap + share / (c.net.bandwidth * 1e3))
    local = 2 * size if chain else 0.0
    return [Phase(2 * chain, local, 2 * depth, 4 if depth else 0, 2 * share if depth else 0.0, path)]


def within_hosts(size: float, c: Cluster, across: Phases) -> Phases:
    """Reduce-scatter in each host, `across` for each GPU's share along its own adapter, all-gather in each host."""
    inside = Phase(1, (c.per_host - 1) * size / c.per_host) if c.per_host > 1 else Phase()
    return [inside, *across, inside]


def hosts_one_shot(size: float, c: Cluster) -> Phases:
    others, share = c.hosts - 1, size / c.per_host
    return within_hosts(size, c, [Phase(0, 0, 1, others, others * share)] if others else [])


def hosts_two_shot(size: float, c: Cluster) -> Phases:
    others, share = c.hosts - 1, size / c.per_host
    return within_hosts(size, c, [Phase(0, 0, 1, others, others * share / c.hosts)] * 2 if others else [])


def hosts_ring(size: float, c: Cluster) -> Phases:
    steps, share = 2 * (c.hosts - 1), size / c.per_host
    return within_hosts(size, c, [Phase(0, 0, steps, steps, steps * share / c.hosts)] if steps else [])


def hosts_halving(size: float, c: Cluster) -> Phases:
    """Across hosts recursive halving, then doubling (Thakur et al. 2005); for powers of two hosts."""
    steps, share = 2 * math.ceil(math.log2(c.hosts)), size / c.per_host
    moved = 2 * (c.hosts - 1) * share / c.hosts
    return within_hosts(size, c, [Phase(0, 0, steps, steps, moved)] if steps else [])


# The names are those of the tables; "hosts" algorithms work in each host first.
ALGORITHMS: dict[str, Callable[[float, Cluster], Phases]] = {
    "one-shot": one_shot,
    "two-shot": two_shot,
    "ring": ring,
    "tree": tree,
    "hosts one-shot": hosts_one_shot,
    "hosts two-shot": hosts_two_shot,
    "hosts ring": hosts_ring,
    "hosts halving": hosts_halving,
}


# A message is cut in up to so many pieces that follow one another through the phases.
PIECES = tuple(1 << i for i in range(9))


def microseconds(algorithm: str, size: float, c: Cluster) -> float:
    """Modelled time of an all-reduce of `size` bytes a GPU, cut in as many pieces as is best."""
    return c.launch + min(pipelined(ALGORITHMS[algorithm](size / n, c), n, c) for n in PIECES)


def pipelined(phases: Phases, num_pieces: int, c: Cluster) -> float:
    """The first piece goes through all phases, the others follow as fast as the busiest link lets them."""
    busy = [phase.busy(c) for phase in phases]
    interval = max(sum(local for local, _ in busy), sum(net for _, net in busy))
    return sum(phase.microseconds(c) for phase in phases) + (num_pieces - 1) * interval


def fastest(size: float, c: Cluster) -> tuple[str, float]:
    """The algorithm of the least time, the first of equals, and that time in us."""
    times = {name: microseconds(name, size, c) for name in ALGORITHMS}
    name = min(times, key=lambda n: times[n])
    return name, times[name]


# --- what was measured ------------------------------------------------------------------------------------------------

# (bytes, algorithm, us, us of NCCL's all_reduce): two H200s of one host, torch 2.11, Triton 3.6, graph-captured,
# 2026-11-22; a prototype of the kernels.
MEASURED = (
    (2 * KB, "one-shot", 3.5, 8.7),
    (64 * KB, "one-shot", 3.6, 10.6),
    (256 * KB, "one-shot", 4.3, 11.7),
    (1 * MB, "one-shot", 6.9, 17.3),
    (4 * MB, "two-shot", 17.0, 34.7),
    (16 * MB, "two-shot", 53.0, 75.0),
)
MEASURED_ON = Cluster(2, NVLINK, NDR)
# The largest error of the model on these.
STATED_ERROR = 0.05


# --- the document -----------------------------------------------------------------------------------------------------


def spelled(size: float) -> str:
    return f"{size / MB:g} MB" if size >= MB else f"{size / KB:g} KB"


def figure(time: float) -> str:
    return f"{time:.1f}" if time < 100 else f"{time:.0f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def winners(sizes: Sequence[int], clusters: Sequence[Cluster]) -> str:
    """The fastest algorithm and its time in us, sizes down, GPUs across."""
    rows = []
    for size in sizes:
        best = [fastest(size, c) for c in clusters]
        rows.append([spelled(size), *(f"{name} {figure(time)}" for name, time in best)])
    return markdown(["bytes a GPU", *(str(c.gpus) for c in clusters)], rows)


def calibration() -> str:
    """The model beside what was measured on two GPUs."""
    rows = []
    for size, name, measured, nccl in MEASURED:
        model = microseconds(name, size, MEASURED_ON)
        rows.append([spelled(size), name, f"{measured:g}", f"{model:.1f}", f"{model / measured - 1:+.0%}", f"{nccl:g}"])
    return markdown(["bytes", "algorithm", "measured, us", "model, us", "error", "NCCL, us"], rows)


def clusters_of(gpus: Sequence[int], local: Link, net: Link = NDR) -> list[Cluster]:
    return [Cluster(n, local, net) for n in gpus]


def sections() -> dict[str, str]:
    """The generated parts of the document by name."""
    slow = replace(NDR, gap=1.0)
    return {
        "calibration": calibration(),
        "nvlink": winners(SIZES, clusters_of(GPUS, NVLINK)),
        "nvlink, gap of 1 us": winners(SIZES[1::2], clusters_of(GPUS, NVLINK, slow)),
        "pcie": winners(SIZES[1::2], clusters_of(GPUS, PCIE)),
    }


def generated(text: str) -> str:
    """`text` with every generated part as it should be; raises ValueError for a part that has no place."""
    for name, table in sections().items():
        begin, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"{PATH.name}: no part between {begin.strip()} and {end}.")
        text = before + begin + table + "\n" + rest[rest.index(end) :]
    return text


def lines(args: argparse.Namespace) -> Iterator[str]:
    local, net = LOCAL[args.local], replace(NDR, gap=args.gap)
    yield f"hosts of 8 GPUs joined by {local.name}, {net.name} between; fastest all-reduce, us"
    yield winners(args.sizes, clusters_of(args.gpus, local, net))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--local", choices=LOCAL, default="nvlink", help="what joins the GPUs of a host")
    parser.add_argument("--gap", type=float, default=NDR.gap, help="us that a message keeps a network adapter busy")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of each GPU's tensor")
    parser.add_argument("--write", action="store_true", help=f"write the tables to {PATH.name}")
    parser.add_argument("--check", action="store_true", help=f"exit 1 if the tables in {PATH.name} are out of date")
    args = parser.parse_args(arguments)
    if not (args.write or args.check):
        print("\n".join(lines(args)))
        return 0
    text = PATH.read_text()
    if args.write:
        PATH.write_text(generated(text))
    elif generated(text) != text:
        print(f"{PATH} is out of date: run python -m tools.comm_model --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
