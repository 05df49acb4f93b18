"""Measures tiles of the Triton grouped product and writes the fastest ones to its configuration file.

`python -m bench.tune_gemm --out flashinfer/ops/gemm/tuned/sm90.json [--only half] [--heights 16 64]`. Entries of the
file that are not measured again stay. A tile that gives wrong results, or breaks, is left out. Exit code 0: every entry
has a tile; 1: one has none; 2: no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench.clock import Settings, times_in_turn
from bench.record import Call, Row
from bench.rows.gemm import GemmShape, call_op, make, samples
from bench.run import check_call, describe, find_commit, short_error
from bench.tune import PROVENANCE
from flashinfer.ops.gemm.triton.configs import HEIGHTS, HOPPER, Tile, imposed

SCHEMA = 1
KINDS = {"half": "plain", "fp8": "fp8_block", "fp4": "mxfp4"}
# groups, rows a group, n, k: what stands for a height of tiles; of gated products n counts both halves.
PROBLEMS = {
    16: ((64, 16, 1408, 2048), (32, 4, 5760, 2880)),
    32: ((64, 32, 1408, 2048),),
    64: ((64, 64, 1408, 2048), (1, 64, 7168, 2048)),
    128: ((128, 128, 1536, 4096), (8, 512, 14336, 4096)),
}
Key = tuple[str, bool, int]


@dataclass(frozen=True)
class Trial:
    """A tile on a problem; tflop_per_s is None where it did not run, or not right, and `reason` says why."""

    key: Key
    problem: str
    tile: Tile
    tflop_per_s: float | None
    reason: str | None = None


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
    """Even groups and, of several, uneven ones."""
    operands, gated, height = key
    for groups, rows, n, k in PROBLEMS[height]:
        shape = GemmShape(groups, rows, n, k, kind=KINDS[operands], gated=gated)
        yield shape
        if groups > 1:
            yield replace(shape, uneven=True)


def measure(key: Key, shape: GemmShape, settings: Settings, seed: int) -> list[Trial]:
    """Every candidate on one problem: judged first, then timed in turn."""
    generator = torch.Generator(settings.device).manual_seed(seed)
    inputs = make(shape, generator)
    row = Row(str(shape.fields()), "gemm", settings.device.type, shape, make, call_op, (), samples)
    runs: dict[Tile, Any] = {}
    reasons: dict[Tile, str] = {}
    for tile in candidates(key):
        call = call_op(shape, inputs, "triton")
        held = replace(call, run=partial(_under, tile, call))
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


def _under(tile: Tile, call: Call) -> None:
    with imposed(tile):
        call.run()


def label(tile: Tile) -> str:
    """A tile in short: "64x128x64 w4 s5 x2 swap band8"."""
    swap = " swap" if tile.swap else ""
    shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return f"{shape} w{tile.num_warps} s{tile.stages} x{tile.per_sm}{swap} band{tile.band}"


def entry(key: Key, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """The tile with the best geometric mean over all problems, with all rates; None where none did them all."""
    names = {t.problem for t in trials}
    rates: dict[Tile, dict[str, float]] = {}
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
        measured.setdefault(t.problem, {})[label(t.tile)] = rate
    operands, gated, height = key
    named = {"operands": operands, "gated": gated, "height": height}
    return {**named, "tile": best._asdict(), "tflop_per_s": measured}


def write(path: Path, entries: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    """Write the file that `triton.configs.tuned` reads; entries it had of other keys stay."""
    kept = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else []
    table = {(e["operands"], e["gated"], e["height"]): e for e in (*kept, *entries)}
    provenance = {name: environment[name] for name in PROVENANCE}
    content = {"schema": SCHEMA, "provenance": provenance, "entries": [table[key] for key in sorted(table)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_gemm", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--only", choices=tuple(KINDS), nargs="+", default=tuple(KINDS), help="which operands")
    parser.add_argument("--heights", type=int, choices=HEIGHTS, nargs="+", default=HEIGHTS, help="which heights")
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
    for operands, gated, height in product(args.only, args.gated, args.heights):
        key = (operands, bool(gated), height)
        trials = [t for shape in problems(key) for t in measure(key, shape, settings, args.seed)]
        for t in trials:
            rate = t.reason if t.tflop_per_s is None else f"{t.tflop_per_s:.0f} TFLOP/s"
            print(f"{key}  {t.problem}  {label(t.tile)}: {rate}", flush=True)
        best = entry(key, trials)
        complete &= best is not None
        if best is not None:
            write(args.out, [best], environment)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
