"""Measures tiles of the grouped products and writes the fastest ones to their configuration files.

`python -m bench.tune_gemm [--backend triton] --out flashinfer/ops/gemm/tuned/sm90.json [--only half] [--heights 16 64]`
for Triton's, `--backend gluon_sm90 --out flashinfer/ops/gemm/tuned/gluon_sm90.json` for Hopper's own. Entries of the
file that are not measured again stay. A tile that gives wrong results, or breaks, is left out. Exit code 0: every entry
has a tile; 1: one has none; 2: no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.clock import Settings, times_in_turn
from bench.record import Call, Row, short_error
from bench.rows.gemm import GemmShape, call_op, make, samples
from bench.run import check_call, describe, find_commit
from bench.tune import PROVENANCE
from flashinfer.ops.gemm.gluon_sm90 import configs as hopper
from flashinfer.ops.gemm.triton import configs
from flashinfer.ops.gemm.triton.configs import HEIGHTS, HOPPER, Tile

SCHEMA = 1
KINDS = {"half": "plain", "fp8": "fp8_block", "fp4": "mxfp4"}
# groups, rows a group, n, k: what stands for a height of tiles; of gated products n counts both halves.
PROBLEMS = {
    16: ((64, 16, 1408, 2048), (32, 4, 5760, 2880)),
    32: ((64, 32, 1408, 2048),),
    64: ((64, 64, 1408, 2048), (1, 64, 7168, 2048)),
    128: ((128, 128, 1536, 4096), (8, 512, 14336, 4096)),
}
# The same for Hopper's own, by height and whether tiles are too few to occupy the GPU.
HOPPER_PROBLEMS = {
    (16, False): ((64, 16, 1408, 2048),),
    (32, False): ((64, 32, 1408, 2048),),
    (64, False): ((64, 64, 1408, 2048),),
    (128, False): ((128, 128, 1536, 4096),),
    (256, False): ((128, 256, 1536, 2048),),
    (512, False): ((8, 512, 14336, 4096), (1, 4096, 4096, 4096)),
    (16, True): ((1, 16, 7168, 2048),),
    (32, True): ((1, 32, 7168, 2048),),
    (64, True): ((1, 64, 7168, 2048),),
    (128, True): ((1, 128, 7168, 2048),),
    (256, True): ((1, 256, 4096, 7168),),
    (512, True): ((1, 512, 4096, 7168),),
}
BITS = {16: "plain", 8: "fp8_block", 4: "mxfp4"}
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Trial:
    """A tile on a problem; tflop_per_s is None where it did not run, or not right, and `reason` says why."""

    key: Key
    problem: str
    tile: Any
    tflop_per_s: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Kernel:
    """Whose tiles are measured.

    fields: what an entry of its file is found by, whose values are a key. keys: all there are, of these operands,
    heights, and pairs or not. problems: even groups only. label: a tile in short. imposed: within, products get a tile.
    """

    backend: str
    fields: tuple[str, ...]
    keys: Callable[[Sequence[str], Sequence[int], Sequence[bool]], Iterator[Key]]
    candidates: Callable[[Key], Iterator[Any]]
    problems: Callable[[Key], Iterator[GemmShape]]
    label: Callable[[Any], str]
    imposed: Callable[[Any], AbstractContextManager[None]]


# ---- Triton's


def _keys(operands: Sequence[str], heights: Sequence[int], gated: Sequence[bool]) -> Iterator[Key]:
    for kind, pairs, height in product(operands, gated, heights):
        if height in HEIGHTS:
            yield kind, pairs, height


def candidates(key: Key) -> Iterator[Tile]:
    """The default first, then what differs from it in shape, depth, warps or resident programs."""
    operands, _, height = key
    default = HOPPER[operands, height]
    found = dict.fromkeys([default])
    widths = (64, 128, 256) if operands != "fp8" else (64, 128)
    depths = (128,) if operands == "fp8" else (64, 128)
    heights = [m for m in HEIGHTS if m in (height, height * 2, height // 2)]
    swaps = (True,) if operands == "fp4" or height == HEIGHTS[0] else (False, True)
    for block_m, block_n, block_k, swap in product(heights, widths, depths, swaps):
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        if block_m * block_n > 128 * 256 or (swap and block_n < 64 * warps // 4):
            continue
        for per_sm in (1, 2) if warps == 4 else (1,):
            found[Tile(block_m, block_n, block_k, warps, 6, per_sm, swap)] = None
    found |= dict.fromkeys(default._replace(band=band) for band in (4, 16))
    yield from found


def problems(key: Key) -> Iterator[GemmShape]:
    operands, gated, height = key
    for size in PROBLEMS[height]:
        yield GemmShape(*size, kind=KINDS[operands], gated=gated)


def label(tile: Tile) -> str:
    """A tile in short: "64x128x64 w4 s5 x2 swap band8"."""
    extra = " swap" * tile.swap
    shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return f"{shape} w{tile.num_warps} s{tile.stages} x{tile.per_sm}{extra} band{tile.band}"


TRITON = Kernel("triton", ("operands", "gated", "height"), _keys, candidates, problems, label, configs.imposed)


# ---- Hopper's own


def hopper_keys(operands: Sequence[str], heights: Sequence[int], gated: Sequence[bool]) -> Iterator[Key]:
    wanted = [bits for bits, kind in BITS.items() if kind in [KINDS[name] for name in operands]]
    for bits, height, pairs, few in product(wanted, heights, gated, (False, True)):
        if (height, bits) in hopper.RULES:
            yield bits, height, pairs, few


def hopper_candidates(key: Key) -> Iterator[hopper.Tile]:
    """What the rules choose first, then in bands of other heights, then every tile, of fp8 with turns and without."""
    bits, height, _, few = key
    default = hopper.TILES[hopper.RULES[height, bits][few], bits]
    tiles = [tile for (_, width), tile in hopper.TILES.items() if width == bits]
    two = [tile for tile in tiles if tile.consumers == 2 and bits == 8]
    others = [*(default._replace(band=band) for band in (4, 16)), *tiles]
    yield from dict.fromkeys((default, *others, *(tile._replace(turns=not tile.turns) for tile in two)))


def hopper_problems(key: Key) -> Iterator[GemmShape]:
    bits, height, gated, few = key
    for size in HOPPER_PROBLEMS[height, few]:
        yield GemmShape(*size, kind=BITS[bits], gated=gated)


def hopper_label(tile: hopper.Tile) -> str:
    """A tile in short: its shape, then what differs from the defaults: "128x256 stages4 split_rows band16"."""
    rest = {name: value for name, value in tile._asdict().items() if value != hopper.Tile._field_defaults.get(name)}
    words = [
        name if value is True else f"{name}{value}" for name, value in rest.items() if not name.startswith("block")
    ]
    return " ".join([f"{tile.block_m}x{tile.block_n}", *words])


GLUON = Kernel(
    "gluon_sm90",
    ("bits", "height", "gated", "few"),
    hopper_keys,
    hopper_candidates,
    hopper_problems,
    hopper_label,
    hopper.imposed,
)
KERNELS = {kernel.backend: kernel for kernel in (TRITON, GLUON)}


# ---- Measuring


def with_uneven(shapes: Iterator[GemmShape]) -> Iterator[GemmShape]:
    """Each and, of several groups, the same with uneven ones."""
    for shape in shapes:
        yield shape
        if shape.groups > 1:
            yield replace(shape, uneven=True)


def measure(kernel: Kernel, key: Key, shape: GemmShape, settings: Settings, seed: int) -> list[Trial]:
    """Every candidate on one problem: judged first, then timed in turn."""
    generator = torch.Generator(settings.device).manual_seed(seed)
    inputs = make(shape, generator)
    row = Row(str(shape.fields()), "gemm", settings.device.type, shape, make, call_op, (), samples)
    runs: dict[Any, Any] = {}
    reasons: dict[Any, str] = {}
    for tile in kernel.candidates(key):
        call = call_op(shape, inputs, kernel.backend)
        held = replace(call, run=partial(_under, kernel, tile, call))
        try:
            verdict = check_call(row, inputs, held, torch.Generator(settings.device).manual_seed(seed))
        except Exception as error:  # one that does not compile must not hide the others
            verdict = {"ok": False, "reason": short_error(error)}
        if verdict["ok"]:
            runs[tile] = held.run
        else:
            reasons[tile] = verdict["reason"]
    times = times_in_turn(list(runs.values()), settings)
    rates = {tile: shape.num_flops / t["ms"] / 1e9 for tile, t in zip(runs, times, strict=True)}
    name = f"{shape.groups}x{shape.rows}x{shape.n}x{shape.k}{' uneven' if shape.uneven else ''}"
    return [Trial(key, name, tile, rates.get(tile), reasons.get(tile)) for tile in (*runs, *reasons)]


def _under(kernel: Kernel, tile: Any, call: Call) -> None:
    with kernel.imposed(tile):
        call.run()


def entry(kernel: Kernel, key: Key, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """The tile with the best geometric mean over all problems, with all rates; None where none did them all."""
    names = {t.problem for t in trials}
    rates: dict[Any, dict[str, float]] = {}
    for t in trials:
        if t.tflop_per_s is not None:
            rates.setdefault(t.tile, {})[t.problem] = t.tflop_per_s
    complete = {tile: statistics.geometric_mean(r.values()) for tile, r in rates.items() if set(r) == names}
    if not complete:
        return None
    best = max(complete, key=lambda tile: complete[tile])
    measured: dict[str, dict[str, float | str | None]] = {}
    for t in trials:
        rate = t.reason if t.tflop_per_s is None else round(t.tflop_per_s, 1)
        measured.setdefault(t.problem, {})[kernel.label(t.tile)] = rate
    return {**dict(zip(kernel.fields, key, strict=True)), "tile": best._asdict(), "tflop_per_s": measured}


def write(kernel: Kernel, path: Path, entries: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    """Write the file that `configs.tuned` of the kernel reads; entries it had of other keys stay."""
    kept = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else []
    table = {tuple(e[name] for name in kernel.fields): e for e in (*kept, *entries)}
    provenance = {name: environment[name] for name in PROVENANCE}
    content = {"schema": SCHEMA, "provenance": provenance, "entries": [table[key] for key in sorted(table)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_gemm", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=tuple(KERNELS), default=TRITON.backend, help="whose tiles")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--only", choices=tuple(KINDS), nargs="+", default=tuple(KINDS), help="which operands")
    parser.add_argument(
        "--heights", type=int, choices=hopper.HEIGHTS, nargs="+", default=hopper.HEIGHTS, help="which heights"
    )
    parser.add_argument("--gated", type=int, choices=(0, 1), nargs="+", default=(0, 1), help="pairs, or not, or both")
    parser.add_argument("--commit", help="the commit measured, where there is no git")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU to measure on", file=sys.stderr)
        return 2
    settings = Settings(torch.device("cuda"))
    environment = describe(settings, args.commit or find_commit(), args.seed)
    complete = True
    kernel = KERNELS[args.backend]
    for key in kernel.keys(args.only, args.heights, [bool(gated) for gated in args.gated]):
        shapes = with_uneven(kernel.problems(key))
        trials = [t for shape in shapes for t in measure(kernel, key, shape, settings, args.seed)]
        for t in trials:
            rate = t.reason if t.tflop_per_s is None else f"{t.tflop_per_s:.0f} TFLOP/s"
            print(f"{key}  {t.problem}  {kernel.label(t.tile)}: {rate}", flush=True)
        best = entry(kernel, key, trials)
        complete &= best is not None
        if best is not None:
            write(kernel, args.out, [best], environment)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
