"""Draws a results file of `bench.run` as a roofline: `python -m bench.plot FILE.json [--out FILE.png]`.

Across: flops a byte that must move; up: TFLOP/s. The roof is what the same run measured: a copy and a square product.
Rows without flops (norms, activations) have no place in it. Needs matplotlib (the `bench` extra).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.run import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SIZE_INCHES = (15.0, 8.0)
DPI = 130
# Where a number may stand, in points from its marker: the first place that is free.
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 0.7), (-1, 0.7), (1, -0.7), (-1, -0.7))
NUMBER_PLACES = tuple((r * x, r * y) for r in (9, 16, 24, 33) for x, y in DIRECTIONS)


def plotted(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that have a place: right, timed, and with flops; in the order of the list beside the plot."""
    return [row for row in results["rows"] if row["status"] == "ok" and row["flops"]]


def _roof(axes: Axes, ceilings: dict[str, Any], intensities: Sequence[float]) -> None:
    """Two straight lines on logarithmic axes; they meet where a product takes as long as moving its data."""
    tflops, copy = ceilings["matmul_tflop_per_s"], ceilings["copy_gb_per_s"]
    ridge = 1e3 * tflops / copy
    ends = [min([*intensities, ridge]) / 2, ridge, max([*intensities, ridge]) * 2]
    dtype = ceilings["matmul_dtype"].removeprefix("torch.")
    name = f"measured: copy {figure(copy)} GB/s, {dtype} matmul {figure(tflops)} TFLOP/s"
    axes.plot(ends, [ends[0] * copy / 1e3, tflops, tflops], color="black", linewidth=1.2, label=name)


def _number(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Number the points in their order, each at the first place beside its marker that no earlier number takes."""
    axes.figure.canvas.draw()  # settles the limits, on which pixels depend
    markers = [axes.transData.transform(point) for point in points]
    taken: list[Bbox] = []
    for number, point in enumerate(points, 1):
        for place in NUMBER_PLACES:
            text = axes.annotate(
                str(number), point, place, textcoords="offset points", ha="center", va="center", fontsize=7
            )
            box = text.get_window_extent().expanded(1.1, 1.1)
            if not any(box.overlaps(other) for other in taken) and not any(box.contains(*m) for m in markers):
                break
            if place != NUMBER_PLACES[-1]:
                text.remove()
        taken.append(box)


def draw(results: dict[str, Any]) -> Figure:
    """The plot, and a numbered list of its rows to the right. Raises ValueError where no row has a place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = plotted(results)
    if not rows:
        raise ValueError("the results hold no right row with flops: nothing to plot")
    points = [(row["flops"] / row["bytes"], row["tflop_per_s"]) for row in rows]
    plot = Figure(figsize=SIZE_INCHES, dpi=DPI)
    FigureCanvasAgg(plot)
    axes = plot.add_axes((0.05, 0.07, 0.66, 0.87))
    axes.set(xscale="log", yscale="log", xlabel="flops per byte that must move", ylabel="TFLOP/s")
    axes.grid(True, which="both", linewidth=0.3, alpha=0.5)
    _roof(axes, results["ceilings"], [x for x, _ in points])
    for op, marker in zip(dict.fromkeys(row["op"] for row in rows), MARKERS, strict=False):
        mine = [point for point, row in zip(points, rows, strict=True) if row["op"] == op]
        axes.plot(*zip(*mine, strict=True), marker, label=op, markersize=5, linestyle="none")
    axes.legend(loc="lower right", fontsize=9)
    environment = results["environment"]
    axes.set_title(f"{environment['device']}, {environment['date'][:10]}, commit {environment['commit'][:12]}")
    _number(axes, points)
    digits = len(str(len(rows)))
    lines = [f"{n:{digits}}  {row['tflop_per_s']:5.0f}  {row['name']}" for n, row in enumerate(rows, 1)]
    head = " " * digits + "  TFLOP/s  row"
    plot.text(0.72, 0.94, "\n".join([head, *lines]), family="monospace", fontsize=7, va="top", linespacing=1.35)
    return plot


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="default: beside the results, ending in .png")
    args = parser.parse_args(argv)
    draw(json.loads(args.results.read_text())).savefig(args.out or args.results.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
