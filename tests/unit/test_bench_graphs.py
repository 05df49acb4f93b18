"""Times inside CUDA graphs: counts, checks, files and reports. On a CPU a list of calls stands for a graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import anchors, graphs, plot, report, run
from bench.record import Call, Peer, Row
from bench.registry import ROWS
from bench.rows import gemm, moe
from bench.rows.gemm import GemmInputs, GemmShape

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
QUICK = ["--warmup-ms", "1", "--rep-ms", "2", "--copy-mib", "1", "--matmul-n", "64", "--commit", "c0ffee"]
MIB = 1 << 20
H200_L2 = 50 * MIB
# Moves a third of what copies must move, so that there are three of them.
SMALL = GemmShape(2, 8, 32, 64)
SMALL_L2 = 3 * SMALL.num_bytes // graphs.ROTATED_L2

Calls = Sequence[Callable[[], object]]


def small_row(*peers: Peer) -> Row:
    call = gemm.call_grouped
    return Row("small", "gemm", "cpu", SMALL, gemm.make, call, peers or (gemm.BMM,), gemm.samples, graphs=True)


def listed(calls: Calls, count: int, device: torch.device) -> Callable[[], object]:
    """What `graphs.capture` promises, without a graph."""
    return lambda: [calls[i % len(calls)]() for i in range(count)]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what captures on the CPU; plans are those of calls of 0.05 ms, however busy the machine is."""
    make_plan = graphs.make_plan

    def put(capture: Callable[..., Callable[[], object]] = listed) -> None:
        monkeypatch.setattr(graphs, "capture", capture)
        monkeypatch.setattr(graphs, "l2_bytes", lambda device: SMALL_L2)
        monkeypatch.setattr(graphs, "make_plan", lambda ms, *sizes: make_plan(0.05, *sizes))

    return put


def run_row(tmp_path: Path, row: Row) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(exit code, all results as read back, the row's)."""
    out = tmp_path / "results.json"
    code = run.main([*QUICK, "--device", row.device, "--out", str(out)], rows=(row,))
    results = json.loads(out.read_text())
    return code, results, results["rows"][0]


# ---- counts


@given(
    ms=st.floats(1e-3, 1) | st.floats(1, 100),
    num_bytes=st.integers(MIB, 256 * MIB) | st.integers(1, 1 << 36),
    copy_bytes=st.integers(0, 4 << 30) | st.integers(0, 1 << 36),
    l2=st.integers(MIB, 512 * MIB),
)
def test_plans_fill_a_graph_and_stay_in_memory(ms: float, num_bytes: int, copy_bytes: int, l2: int) -> None:
    plan = graphs.make_plan(ms, num_bytes, copy_bytes, l2)
    assert plan.copies >= 1 and plan.calls >= 1 and plan.calls % plan.copies == 0
    assert plan.calls * ms >= graphs.GRAPH_MS * (1 - 1e-9)
    assert plan.calls == 1 or plan.calls * ms < 2 * graphs.GRAPH_MS + ms, "rounding up to all copies at most doubles it"
    assert (plan.copies - 1) * copy_bytes <= graphs.EXTRA_BYTES
    if plan.cold:
        assert plan.copies * num_bytes >= min(graphs.ROTATED_L2 * l2, max(graphs.LARGE_BYTES, 2 * l2))
    assert (plan.copies - 1) * num_bytes < graphs.ROTATED_L2 * l2, "one more than needed"


@pytest.mark.parametrize(
    ("ms", "num_bytes", "copy_bytes", "plan"),
    [
        (0.01, 16 * MIB, 16 * MIB, (403, 13, True)),
        (0.1, 127 * MIB, 127 * MIB, (40, 2, True)),
        (0.1, 128 * MIB, 22 << 30, (40, 1, True)),
        (0.03, 72 * MIB, 1200 * MIB, (135, 3, True)),
        (0.03, 72 * MIB, 3 << 30, (134, 2, False)),
        (0.03, 72 * MIB, 5 << 30, (134, 1, False)),
        (30.0, 22 << 30, 22 << 30, (1, 1, True)),
        (3.0, 10 * MIB, 10 * MIB, (2, 2, False)),
    ],
)
def test_plans_of_known_problems(ms: float, num_bytes: int, copy_bytes: int, plan: tuple[int, int, bool]) -> None:
    assert graphs.make_plan(ms, num_bytes, copy_bytes, H200_L2) == plan


def test_a_larger_cache_raises_what_counts_as_large() -> None:
    assert graphs.make_plan(0.1, 200 * MIB, 200 * MIB, 126 * MIB).copies == 3


def test_all_products_and_mixtures_are_timed_in_graphs() -> None:
    assert {row.op for row in ROWS if row.graphs} == {"gemm", "moe"}
    assert all(row.graphs for row in (*gemm.ROWS, *moe.ROWS))


def test_the_dense_peer_of_mixtures_moves_less_for_as_many_flops() -> None:
    for row in moe.ROWS:
        if moe.CUBLAS in row.peers:
            assert moe.CUBLAS.work(row.shape) == 1
            assert moe.CUBLAS.computes(row.shape).num_bytes != row.shape.num_bytes
    dense = moe.CUBLAS.computes(moe.MoEShape(moe.QWEN, 512))
    assert dense.num_bytes == 2 * 3 * 2048 * 768 + 4 * 8 * 512 * 2048


# ---- a row


def test_times_are_of_one_call_and_compared_with_peers(
    tmp_path: Path, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    taken = [{"ms": 6.0, "p20_ms": 5.0, "p80_ms": 7.0}, {"ms": 12.0, "p20_ms": 12.0, "p80_ms": 12.0}]
    asked: list[tuple[int, bool]] = []

    def times(fns: Calls, settings: object, flushed: bool = True) -> list[dict[str, float]]:
        asked.append((len(fns), flushed))
        return taken

    monkeypatch.setattr(graphs, "times_in_turn", times)
    twice = replace(gemm.BMM, shape=lambda shape: replace(shape, groups=2 * shape.groups))
    code, _, row = run_row(tmp_path, small_row(twice))
    assert code == 0 and asked == [(2, False)]
    ours, peer = row["graph"], row["peers"]["cublas_bmm"]["graph"]
    assert (ours["copies"], ours["cold"], ours["gate"]) == (3, True, {"ok": True, "same_bits": True})
    assert ours["ms"] == pytest.approx(6 / ours["calls"]) and ours["p80_ms"] == pytest.approx(7 / ours["calls"])
    assert peer["copies"] == 2, "it moves twice as much"
    assert peer["speedup"] == pytest.approx(12 / peer["calls"] / ours["ms"] / 2), "by time per flop"


def test_rows_and_peers_are_timed_and_reported(
    tmp_path: Path, fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake()
    code, results, row = run_row(tmp_path, small_row())
    assert code == 0
    ours, peer = row["graph"], row["peers"]["cublas_bmm"]["graph"]
    assert 0 < ours["p20_ms"] <= ours["ms"] <= ours["p80_ms"] and peer["speedup"] > 0
    assert ours["calls"] > 40 and ours["ms"] < 40 * row["ms"], "of one call, not of all"
    table = report.to_markdown(results).partition("### gemm in CUDA graphs")[2]
    assert "| row | µs | cublas_bmm ÷ ours |" in table
    assert f"| `small` | {run.figure(1e3 * ours['ms'])} | {peer['speedup']:.2f}× |" in table
    assert "not measured" not in table
    assert "in CUDA graphs" in capsys.readouterr().out
    ours["cold"] = peer["cold"] = False
    marked = f"| `small` | {run.figure(1e3 * ours['ms'])} L2 | {peer['speedup']:.2f}× L2 |"
    assert marked in report.to_markdown(results)


def test_every_copy_is_other_memory_and_is_called_as_often(tmp_path: Path, fake: Callable[..., None]) -> None:
    seen: dict[int, int] = {}

    def capture(calls: Calls, count: int, device: torch.device) -> Callable[[], object]:
        assert count % len(calls) == 0
        return listed(calls, count, device)

    def call(shape: GemmShape, inputs: GemmInputs) -> Call:
        right = gemm.call_grouped(shape, inputs)

        def counted() -> None:
            place = inputs.weights.values.data_ptr()
            seen[place] = seen.get(place, 0) + 1
            right.run()

        return replace(right, run=counted)

    fake(capture)
    code, _, row = run_row(tmp_path, replace(small_row(), call=call))
    assert code == 0 and len(seen) == row["graph"]["copies"] == 3
    first, *others = seen.values()
    assert len(set(others)) == 1 and first > others[0] > 1, "the first is also called eagerly"


def test_without_a_gpu_there_are_no_graphs(tmp_path: Path) -> None:
    code, results, row = run_row(tmp_path, small_row())
    assert code == 0 and row["status"] == "ok" and row["ms"] > 0
    assert row["graph"] == {"reason": "no CUDA graphs on device 'cpu'"} and "graph" not in row["peers"]["cublas_bmm"]
    text = report.to_markdown(results)
    assert "in CUDA graphs\n" not in text and "ours not timed in CUDA graphs: no CUDA graphs on device 'cpu'" in text
    assert "graph" not in run_row(tmp_path, replace(small_row(), graphs=False))[2]


def changed(change: Callable[[torch.Tensor], object]) -> Callable[..., Callable[[], object]]:
    """A capture whose replays change the output of the last copy that the row's own calls have."""
    outs: list[torch.Tensor] = []

    def capture(calls: Calls, count: int, device: torch.device) -> Callable[[], object]:
        run_all = listed(calls, count, device)
        results = [call() for call in calls]
        outs.extend(out for out in results if isinstance(out, torch.Tensor))
        last = outs[len(calls) - 1]
        return lambda: (run_all(), change(last))

    return capture


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda out: out[-1].fill_(float("nan")), "in a CUDA graph: 32 of 512 elements are not finite"),
        (lambda out: out.mul_(1.1), "in a CUDA graph: rows: relative error"),
    ],
)
def test_a_replay_that_is_wrong_fails_the_row(
    tmp_path: Path, fake: Callable[..., None], change: Callable[[torch.Tensor], object], reason: str
) -> None:
    fake(changed(change))
    code, results, row = run_row(tmp_path, small_row())
    assert code == 1 and row["status"] == "failed" and reason in row["reason"]
    assert "ms" not in row["graph"] and "graph" not in row["peers"]["cublas_bmm"]
    assert "**failed**" in report.to_markdown(results)


def test_a_replay_that_writes_nothing_fails_the_row(tmp_path: Path, fake: Callable[..., None]) -> None:
    """As of a graph that stayed empty: what eager calls left in the outputs must not count."""
    fake(lambda calls, count, device: lambda: None)
    code, _, row = run_row(tmp_path, small_row())
    assert code == 1 and "not finite" in row["reason"]


def test_other_bits_that_are_right_pass(tmp_path: Path, fake: Callable[..., None]) -> None:
    def one_bit(out: torch.Tensor) -> None:
        out.view(torch.int16)[0, 0] ^= 1

    fake(changed(one_bit))
    code, _, row = run_row(tmp_path, small_row())
    assert code == 0 and row["graph"]["gate"] == {"ok": True, "same_bits": False} and row["graph"]["ms"] > 0


def test_a_row_that_cannot_be_captured_keeps_its_eager_times(
    tmp_path: Path, fake: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(calls: Calls, count: int, device: torch.device) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    fake(refuse)
    code, results, row = run_row(tmp_path, small_row())
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert code == 0 and row["status"] == "ok" and row["ms"] > 0 and row["graph"] == {"reason": reason}
    assert f"no graph small ours: {reason}" in capsys.readouterr().out
    assert reason in report.to_markdown(results)


def test_a_peer_that_cannot_be_captured_is_left_out(tmp_path: Path, fake: Callable[..., None]) -> None:
    closed = []

    @contextmanager
    def open_it(shape: GemmShape, inputs: GemmInputs) -> Iterator[Callable[[], torch.Tensor]]:
        with gemm.BMM.open(shape, inputs) as call:
            try:
                yield call
            finally:
                closed.append(True)

    def capture(calls: Calls, count: int, device: torch.device) -> Callable[[], object]:
        if len(captured) == 1:
            captured.append(0)
            raise RuntimeError("it waits for the GPU")
        captured.append(count)
        return listed(calls, count, device)

    captured: list[int] = []
    fake(capture)
    broken = Peer("broken", open_it, gemm.BMM.layout)
    wrong = replace(gemm.BMM, name="wrong", layout=lambda out: 2 * out)
    code, results, row = run_row(tmp_path, small_row(broken, gemm.BMM, wrong))
    assert code == 0 and row["graph"]["ms"] > 0 and len(captured) == 3
    assert row["peers"]["broken"]["graph"] == {"reason": "RuntimeError: it waits for the GPU"}
    assert row["peers"]["broken"]["ms"] > 0 and row["peers"]["cublas_bmm"]["graph"]["speedup"] > 0
    assert "graph" not in row["peers"]["wrong"], "what is wrong in eager calls is not timed"
    assert len(closed) == 1 + row["graph"]["copies"], "open after its eager times or its capture"
    text = report.to_markdown(results)
    assert "broken not timed in CUDA graphs: RuntimeError: it waits for the GPU" in text
    assert "| row | µs | cublas_bmm ÷ ours |" in text


# ---- older files


@pytest.mark.parametrize("name", ["h200-gemm-2026-11-22-22ddcc6", "h200-moe-2026-11-22-22ddcc6"])
def test_files_without_graphs_give_the_same_report(name: str) -> None:
    results = json.loads((RESULTS / f"{name}.json").read_text())
    assert report.to_markdown(results) == (RESULTS / f"{name}.md").read_text()
    assert len(plot.plotted(results)) == sum(row["status"] == "ok" for row in results["rows"])
    assert results["environment"]["commit"] in run.summary(results)


def test_files_without_graphs_are_held_against_anchors() -> None:
    results = json.loads((RESULTS / "h200-sampling-2026-11-22-f43a483.json").read_text())
    assert "met" in anchors.compare(results)[0]


# ---- real graphs


@pytest.mark.gpu
def test_a_graph_calls_in_turn() -> None:
    tensors = [torch.zeros(4, device="cuda") for _ in range(3)]
    replay = graphs.capture([lambda x=x: x.add_(1) for x in tensors], 7, torch.device("cuda"))
    for x in tensors:
        x.zero_()
    replay()
    assert [int(x[0]) for x in tensors] == [3, 2, 2]


@pytest.mark.gpu
def test_after_a_capture_that_broke_off_all_goes_on() -> None:
    device, stream = torch.device("cuda"), torch.cuda.current_stream()
    x = torch.ones(4, device=device)
    for _ in range(2):
        with pytest.raises(Exception, match="captur"):
            graphs.capture([lambda: x.sum().item()], 2, device)
        assert torch.cuda.current_stream() == stream
        assert torch.randn(8, device=device).isfinite().all(), "torch's generator still thinks that it is captured"

    attempts = iter(range(10))

    def raises() -> None:
        x.mul_(1)
        if next(attempts) >= 2:
            raise ValueError("not in a graph")

    with pytest.raises(ValueError, match="not in a graph"):
        graphs.capture([raises], 2, device)
    graphs.capture([lambda: x.add_(1)], 5, device)()
    assert x.tolist() == [8.0] * 4


@pytest.mark.gpu
def test_a_row_is_timed_in_graphs(tmp_path: Path) -> None:
    row = next(row for row in gemm.ROWS if row.name == "gemm_fp8_1x64x7168x2048")
    code, _, entry = run_row(tmp_path, row)
    assert code == 0, entry
    graph = entry["graph"]
    assert graph["gate"]["ok"] and graph["cold"] and graph["copies"] > 1
    assert 0.3 * entry["ms"] < graph["ms"] < 1.2 * entry["ms"]
    assert "speedup" in entry["peers"]["torch_scaled_mm_tensor"]["graph"]
