"""The benchmark's own tests: its table, its counts, its correctness gate, its files and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import clock, plot, registry, report, run
from bench import comm as comm_bench
from bench.record import COPY, Call, Row
from bench.registry import ROWS
from bench.rows import attention, elementwise
from bench.rows.attention import AttentionInputs, AttentionShape, attention_reference
from tools import gpu_bench, gpu_test

ELEMENTWISE_OPS = (elementwise.rmsnorm, elementwise.fused_add_rmsnorm, elementwise.silu_and_mul)
QUICK = ["--device", "cpu", "--warmup-ms", "1", "--rep-ms", "2", "--copy-mib", "1", "--matmul-n", "64"]
TIMED_FIELDS = {"gate", "ms", "p20_ms", "p80_ms", "gb_per_s", "tflop_per_s", "copy_share", "matmul_share", "plan_us"}


def reference_call(shape: AttentionShape, inputs: AttentionInputs, factor: float = 1.0) -> Call:
    """An implementation that is right when `factor` is 1: the fp64 reference of each request, rounded."""
    out = torch.full_like(inputs.q, float("nan"))

    def compute() -> None:
        parts = [
            attention_reference(shape, inputs, i, torch.arange(n), torch.float64) for i, n in enumerate(shape.qo_lens)
        ]
        out.copy_(torch.cat(parts) * factor)

    return Call(lambda: None, compute, out)


def leaves_last_row_unwritten(shape: AttentionShape, inputs: AttentionInputs) -> Call:
    call = reference_call(shape, inputs)

    def compute() -> None:
        call.run()
        call.out[-1] = float("nan")

    return replace(call, run=compute)


def changes_between_runs(shape: AttentionShape, inputs: AttentionInputs) -> Call:
    call = reference_call(shape, inputs)
    steps = iter(range(100))

    def compute() -> None:
        call.run()
        call.out.mul_(1 + next(steps) * torch.finfo(call.out.dtype).eps)

    return replace(call, run=compute)


def breaks(shape: AttentionShape, inputs: AttentionInputs) -> Call:
    raise RuntimeError("no such kernel")


def tiny_row() -> Row:
    return attention.decode_row("tiny", (9, 9), 4, (4, 2, 16), "cpu")


def run_tiny(tmp_path: Path, row: Row, *options: str) -> tuple[int, dict[str, object]]:
    out = tmp_path / "results.json"
    code = run.main([*QUICK, "--out", str(out), "--commit", "c0ffee", *options], rows=(row,))
    return code, json.loads(out.read_text())


# ---- the table


def test_rows_are_well_formed() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert set(registry.COLD_ROWS) <= {row.name for row in ROWS if row.device == "cuda"}
    for row in ROWS:
        shape = row.shape
        assert row.device in ("cuda", "cpu")
        assert row.peers, row.name
        assert len({peer.name for peer in row.peers}) == len(row.peers)
        assert shape.num_bytes > 0
        json.dumps(shape.fields())
        if not isinstance(shape, AttentionShape):
            continue
        assert len(shape.qo_lens) == len(shape.kv_lens)
        assert all(1 <= qo <= kv for qo, kv in zip(shape.qo_lens, shape.kv_lens, strict=True)), row.name
        assert shape.num_qo_heads % shape.num_kv_heads == 0


def test_bytes_and_flops_of_known_rows() -> None:
    """One row of each op, counted here another way: from the sizes of each tensor, and pair by pair."""
    rows = {row.name: row.shape for row in ROWS}
    decode = rows["decode_page16_b64_l4096_h32-8_d128"]
    assert decode.num_bytes == 64 * 4096 * 8 * 128 * 2 * 2 + 2 * (64 * 32 * 128 * 2) + 4 * 64 * 256
    assert decode.num_flops == 2 * (2 * 64 * 32 * 4096 * 128)
    prefill = rows["prefill_ragged_b4_s4096_h32-8_d128_causal"]
    assert prefill.num_bytes == 4 * 4096 * (32 + 8 + 8 + 32) * 128 * 2
    assert prefill.num_flops == 4 * 32 * 128 * 4 * sum(range(1, 4097))
    window = rows["prefill_ragged_b4_s4096_h32-8_d128_causal_window1023"]
    assert window.num_flops == 4 * 32 * 128 * 4 * sum(min(i + 1, 1024) for i in range(4096))
    assert rows["prefill_ragged_b4_s4096_h32-8_d128_causal_cap30"].num_flops == prefill.num_flops
    append = rows["append_page16_b16_q4_l4096_h32-8_d128_causal"]
    assert append.num_flops == 4 * 32 * 128 * 16 * (4093 + 4094 + 4095 + 4096)
    assert rows["rmsnorm_4096_t1024"].num_bytes == 2 * 4096 * (2 * 1024 + 1)
    assert rows["fused_add_rmsnorm_8192_t64"].num_bytes == 2 * 8192 * (4 * 64 + 1)
    assert rows["silu_and_mul_14336_t1"].num_bytes == 2 * 14336 * 3
    skew = rows["decode_page16_skew_h32-8_d128"]
    assert isinstance(skew, AttentionShape)
    assert skew.batch_size == 64 and max(skew.kv_lens) == 65536 and sorted(skew.kv_lens)[-2] < 1024


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_flops_count_the_visible_pairs(data: st.DataObject) -> None:
    kv_lens = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    qo_lens = [data.draw(st.integers(1, n)) for n in kv_lens]
    causal = data.draw(st.booleans())
    window = data.draw(st.integers(-1, 8))
    shape = AttentionShape(tuple(qo_lens), tuple(kv_lens), 4, 2, 8, 0, causal, torch.float16, window)
    visible = sum(
        (not causal or key <= kv - qo + query) and (window < 0 or key >= kv - qo + query - window)
        for qo, kv in zip(qo_lens, kv_lens, strict=True)
        for query in range(qo)
        for key in range(kv)
    )
    assert shape.num_flops == visible * 4 * (2 * 8 + 2 * 8)
    inputs = attention.make_attention(shape, torch.Generator())
    assert shape.num_bytes == 2 * inputs.q.nbytes + sum(x.nbytes for x in inputs.kv)


@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("qo_len", [3, 9])
@pytest.mark.parametrize(("window", "cap"), [(-1, 0.0), (2, 0.0), (-1, 0.7), (4, 1.5)])
def test_reference_and_peers_agree_with_a_plain_formula(
    page_size: int, causal: bool, qo_len: int, window: int, cap: float
) -> None:
    """The gate's reference and every CPU peer against softmax written out for one head at a time."""
    shape = AttentionShape((qo_len,) * 2, (9, 9), 6, 2, 8, page_size, causal, torch.float32, window, cap)
    generator = torch.Generator()
    generator.seed()
    inputs = attention.make_attention(shape, generator)
    want = []
    for request in range(2):
        k, v = attention._request_kv(shape, inputs, request)
        for row, head in ((row, head) for row in range(qo_len) for head in range(6)):
            logits = k[:, head // 3].double() @ inputs.q[request * qo_len + row, head].double() / 8**0.5
            logits = cap * (logits / cap).tanh() if cap else logits
            position = 9 - qo_len + row
            sees = [(i <= position or not causal) and (i >= position - window or window < 0) for i in range(9)]
            want.append(logits[sees].softmax(0) @ v[sees, head // 3].double())
    exact = torch.stack(want).view(2 * qo_len, 6, 8)
    for sample in attention.attention_samples(shape, inputs, generator):
        torch.testing.assert_close(sample.exact, exact[sample.rows], rtol=1e-12, atol=1e-12)
    for peer in (attention.SDPA_CPU, attention.GATHER_SDPA_CPU, attention.SDPA_FLASH):
        if cap or window >= 0:
            with pytest.raises(NotImplementedError, match="soft cap" if cap else "window"), peer.open(shape, inputs):
                pass
            continue
        with peer.open(shape, inputs) as call:
            assert peer.layout is not None
            torch.testing.assert_close(peer.layout(call()).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changed", [{"window_left": 3}, {"logits_soft_cap": 0.5}])
def test_the_gate_sees_a_window_or_soft_cap_left_out(tmp_path: Path, changed: dict[str, float]) -> None:
    plain = replace(attention.prompts(2, 9, (4, 2, 16), True), dtype=torch.float32)
    row = replace(attention.prefill_row(replace(plain, **changed)), device="cpu", peers=())
    assert run_tiny(tmp_path, replace(row, call=reference_call))[0] == 0
    without = replace(row, call=lambda shape, inputs: reference_call(plain, inputs))
    code, results = run_tiny(tmp_path, without)
    assert code == 1 and "relative error" in results["rows"][0]["reason"]


def test_index_arrays_are_on_the_host_and_few_first_calls_are_timed() -> None:
    """As engines have them, so that plans know their rows; and each first call costs a process."""
    shape = replace(attention.prompts(2, 9, (4, 2, 16), True), page_size=4)
    inputs = attention.make_attention(shape, torch.Generator())
    assert {x.device.type for x in (inputs.qo_indptr, inputs.kv_indptr, inputs.last_page_len)} == {"cpu"}
    assert len(registry.COLD_ROWS) <= 7
    dims = {row.shape.head_dim for row in ROWS if row.name in registry.COLD_ROWS and row.op == "prefill"}
    assert dims == {64, 128, 256}


# ---- the run


def test_speedup_is_the_peers_time_over_ours() -> None:
    chosen = run._settings(run._parse(QUICK))
    short, long = partial(time.sleep, 0.002), partial(time.sleep, 0.02)
    assert 3 < run.time_against(long, short, chosen)["speedup"] < 30
    assert 1 / 30 < run.time_against(short, long, chosen)["speedup"] < 1 / 3
    assert 3 / 4 < run.time_against(long, short, chosen, work=0.25)["speedup"] < 30 / 4


def test_nothing_to_time_is_no_error() -> None:
    """As where every candidate of a tuning was wrong: the reasons are what counts then."""
    assert clock.times_in_turn([], run._settings(run._parse(QUICK))) == []


def test_a_right_row_is_timed_and_every_field_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, results = run_tiny(tmp_path, replace(tiny_row(), call=reference_call))
    assert code == 0
    assert set(results) == {"schema", "environment", "ceilings", "rows", "cold"}
    environment = results["environment"]
    expected = {"date", "host", "commit", "seed", "device", "driver", "torch", "triton", "cuda", "python"}
    assert expected | {"cpu_threads", "timer", "settings"} == set(environment)
    assert environment["commit"] == "c0ffee" and environment["device"] and environment["torch"] == torch.__version__
    assert results["ceilings"]["copy_gb_per_s"] > 0 and results["ceilings"]["matmul_tflop_per_s"] > 0
    (row,) = results["rows"]
    assert row["status"] == "ok" and set(row) >= TIMED_FIELDS | {"name", "op", "shape", "bytes", "flops", "peers"}
    assert row["run_enqueue_us"] is None, "enqueueing means nothing on the CPU"
    assert 0 < row["gate"]["error"] <= row["gate"]["limit"]
    assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
    assert set(row["peers"]) == {"sdpa", "gather_and_sdpa"}
    for peer in row["peers"].values():
        assert peer["ms"] > 0 and peer["speedup"] > 0
    assert row["name"] in capsys.readouterr().out.splitlines()[-1]


def test_public_wrappers_pass_the_gate_on_the_cpu(tmp_path: Path) -> None:
    plain = replace(attention.prompts(2, 9, (4, 2, 16), True), dtype=torch.float32)
    paged = replace(plain, page_size=4, causal=False)
    shapes = (plain, paged, replace(plain, window_left=3), replace(plain, logits_soft_cap=1.5))
    for row in (
        tiny_row(),
        replace(attention.append_row(2, 3, 9, page_size=4), device="cpu", peers=(attention.SDPA_CPU,)),
        *(replace(attention.prefill_row(shape), device="cpu", peers=(attention.SDPA_CPU,)) for shape in shapes),
        replace(attention.prefill_row(plain, "fa2"), device="cpu", peers=(attention.SDPA_CPU,)),
    ):
        code, results = run_tiny(tmp_path, row)
        assert code == 0, results["rows"]


ELEMENTWISE = {op.name: op for op in (f(16) for f in ELEMENTWISE_OPS)}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("tokens", [1, 40])
def test_elementwise_rows_pass_the_gate_on_the_cpu(tmp_path: Path, name: str, tokens: int) -> None:
    row = replace(elementwise.row(ELEMENTWISE[name], tokens, "cpu"), peers=(COPY,))
    code, results = run_tiny(tmp_path, row)
    assert code == 0, results["rows"]
    (entry,) = results["rows"]
    assert entry["flops"] == 0 and entry["gb_per_s"] > 0 and entry["peers"]["copy_same_bytes"]["ms"] > 0
    assert "of copy" in report.to_markdown(results)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_rows_that_are_wrong_fail(tmp_path: Path, name: str) -> None:
    """The last token off by a hundredth; and a call that leaves its output as it was."""
    op = ELEMENTWISE[name]

    def wrong(tensors: dict[str, torch.Tensor]) -> None:
        op.run(tensors)
        tensors[op.in_place[0] if op.in_place else "out"][-1] *= 1.01

    for run_it in (wrong, lambda tensors: None):
        row = replace(elementwise.row(replace(op, run=run_it), 5, "cpu"), peers=())
        code, results = run_tiny(tmp_path, row)
        assert code == 1 and results["rows"][0]["status"] == "failed"


@pytest.mark.parametrize(
    ("call", "status", "reason"),
    [
        (partial(reference_call, factor=1.001), "failed", "relative error"),
        (leaves_last_row_unwritten, "failed", "not finite"),
        (changes_between_runs, "failed", "different bits"),
        (breaks, "error", "no such kernel"),
    ],
)
def test_a_wrong_implementation_is_not_timed_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], call: object, status: str, reason: str
) -> None:
    code, results = run_tiny(tmp_path, replace(tiny_row(), call=call))
    assert code == 1
    (row,) = results["rows"]
    assert row["status"] == status and reason in row["reason"] and "ms" not in row
    assert reason in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("request_index", [0, 1])
def test_the_gate_sees_one_wrong_head_of_one_request(tmp_path: Path, request_index: int) -> None:
    def call(shape: AttentionShape, inputs: AttentionInputs) -> Call:
        right = reference_call(shape, inputs)

        def compute() -> None:
            right.run()
            right.out[request_index, 1] = right.out[request_index, 0]

        return replace(right, run=compute)

    assert run_tiny(tmp_path, replace(tiny_row(), call=call))[0] == 1


def test_a_peer_that_computes_something_else_is_not_compared(tmp_path: Path) -> None:
    doubled = replace(attention.SDPA_CPU, layout=lambda out: 2 * attention.SDPA_CPU.layout(out))
    code, results = run_tiny(tmp_path, replace(tiny_row(), call=reference_call, peers=(doubled,)))
    assert code == 0
    assert "relative error" in results["rows"][0]["peers"]["sdpa"]["reason"]


def test_rows_past_the_limit_are_reported_and_exit_1(tmp_path: Path) -> None:
    code, results = run_tiny(tmp_path, replace(tiny_row(), call=reference_call), "--limit-s", "0")
    assert code == 1 and results["rows"][0]["status"] == "not run"
    assert "not run" in report.to_markdown(results)


def test_nothing_to_run_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*QUICK, "--rows", "no-such-row"], rows=(tiny_row(),)) == 2
    assert run.main([*QUICK, "--cold"], rows=(tiny_row(),)) == 2
    errors = capsys.readouterr().err
    assert "no-such-row" in errors and "cold" in errors


def test_cold_child_times_the_first_and_second_call() -> None:
    chosen = run._settings(run._parse(QUICK))
    seconds = run.cold_child(replace(tiny_row(), call=reference_call), chosen)
    assert set(seconds) == {"first_plan_s", "first_run_s", "second_s"} and min(seconds.values()) > 0


def test_cold_child_that_breaks_is_reported() -> None:
    result = run.measure_cold("no-such-row", torch.device("cpu"))
    assert result["status"] == "error" and "StopIteration" in result["reason"]


def test_report_shows_figures_peers_and_what_is_missing(tmp_path: Path) -> None:
    row = replace(tiny_row(), call=reference_call)
    _, results = run_tiny(tmp_path, row)
    results["rows"].append({"name": "b", "op": "decode", "status": "failed", "reason": "it was wrong"})
    results["rows"][0]["peers"]["sdpa"] = {"reason": "no such backend"}
    results["cold"].append(
        {"name": "c", "op": "decode", "status": "ok", "first_plan_s": 0.25, "first_run_s": 1.5, "second_s": 0.001}
    )
    (tmp_path / "in.json").write_text(json.dumps(results))
    assert report.main([str(tmp_path / "in.json"), "--out", str(tmp_path / "out.md")]) == 0
    text = (tmp_path / "out.md").read_text()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables if "row" in line or "`" in line}) <= 2
    assert f"| `{row.name}` | {1e3 * results['rows'][0]['ms']:.1f} |" in text
    for part in ("commit `c0ffee`", "**failed**", "it was wrong", "no such backend", "| 0.25 | 1.50 |"):
        assert part in text


def test_the_roofline_is_a_png_with_a_marker_for_each_row(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, results = run_tiny(tmp_path, replace(tiny_row(), call=reference_call))
    (row,) = results["rows"]
    rows = [{**row, "name": f"row {i}", "op": op} for i, op in enumerate(("decode", "decode", "prefill"))]
    skipped = [{**row, "flops": 0}, {"name": "b", "op": "decode", "status": "failed", "reason": "it was wrong"}]
    results["rows"] = [*rows, *skipped]
    axes = plot.draw(results).axes[0]
    assert {line.get_label(): len(line.get_xdata()) for line in axes.lines[1:]} == {"decode": 2, "prefill": 1}
    roof = axes.lines[0].get_ydata()
    assert roof[1] == roof[2] == results["ceilings"]["matmul_tflop_per_s"] and roof[0] < roof[1]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), "three rows at one place"
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert plot.main([str(tmp_path / "results.json")]) == 0
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    results["rows"] = skipped
    with pytest.raises(ValueError, match="nothing to plot"):
        plot.draw(results)


# ---- the GPU machine's scripts


def test_run_logged_keeps_output_exit_code_and_limit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert gpu_test.run_logged([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], log, 30) == 3
    assert gpu_test.tail(log, 5) == "hello"
    slow = "import time; print('started'); time.sleep(60)"
    assert gpu_test.run_logged([sys.executable, "-c", slow], log, 3.0) == gpu_test.TIMED_OUT
    assert gpu_test.tail(log, 5) == "started"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("def test_a(): pass", None),
        ("def test_a(): assert False", "1 failed"),
        ("import pytest\n@pytest.mark.skip\ndef test_a(): pass", "no test passed"),
        ("", "exit code 5"),
        ("import time\ndef test_a(): time.sleep(60)", "stopped at the limit"),
    ],
)
def test_gpu_test_judges_pytest_honestly(tmp_path: Path, body: str, problem: str | None) -> None:
    (tmp_path / "test_case.py").write_text(body + "\n")
    args = gpu_test.parse([str(tmp_path / "test_case.py"), "-n", "1"])
    limit_s = 3.0 if problem == "stopped at the limit" else 60.0
    step, counts = gpu_test.run_tests(args, tmp_path, limit_s)
    assert (step.problem is None) == (problem is None)
    assert problem is None or problem in step.problem
    assert counts["passed"] == (problem is None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_scripts_refuse_to_run_without_a_gpu() -> None:
    assert gpu_test.main([]) == 2
    assert gpu_bench.main([]) == 2


def test_collectives_run_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "comm.json"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.comm", "--device=cpu", "--quick", f"--out={path}"]
    environment = {**os.environ, **hidden}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    names = [row["name"] for row in rows]
    fused = "all_reduce + add + RMSNorm, 1 x 256"
    assert names == ["all_reduce", fused, "all_gather", "reduce_scatter", "all_reduce_fp8"]
    assert all(row["eager"]["us"] > 0 for row in rows)


def test_collectives_without_rows_or_with_errors() -> None:
    assert comm_bench.main(["--device=cpu", "--rows=nothing"]) == 2
    assert comm_bench.table([{"name": "all_reduce", "error": "off by one"}]).endswith("all_reduce: off by one")
