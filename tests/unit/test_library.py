"""The registered torch ops: schemas that tell the truth, fake kernels, and what the compiler sees of them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import flashinfer
from flashinfer.core import library
from flashinfer.ops import activation, merge, norm

X, R = torch.randn(2, 3, 16)
W, S = torch.randn(16), torch.tensor([0.5])
OUT = torch.empty(3, 16)
HEADS, LSE = torch.randn(4, 3, 2, 16), torch.randn(4, 3, 2)
CALLS = {
    "rmsnorm": (norm.rmsnorm, (OUT, X, W, None, 1e-6, 0.0)),
    "rmsnorm_scaled": (norm.rmsnorm, (OUT, X, W, S, 1e-6, 0.0)),
    "fused_add_rmsnorm": (norm.fused_add_rmsnorm, (X, R, W, 1e-6, 1.0)),
    "fused_add_rmsnorm_quant": (norm.fused_add_rmsnorm_quant, (OUT, X, R, W, S, 1e-6)),
    "layernorm": (norm.layernorm, (OUT, X, W, W, None, 1e-6)),
    "silu_and_mul": (activation.silu_and_mul, (OUT[:, :8], X, None)),
    "gelu_and_mul": (activation.gelu_and_mul, (OUT[:, :8], X, S)),
    "gelu_tanh_and_mul": (activation.gelu_tanh_and_mul, (OUT[:, :8], X, None)),
    "merge_pair": (merge.merge_pair, (HEADS[0], LSE[0], HEADS[1], LSE[1], HEADS[2], LSE[2], None)),
    "merge_in_place": (merge.merge_pair, (HEADS[0], LSE[0], None, None, HEADS[2], LSE[2], LSE[0, :, 0] > 0)),
    "merge_many": (merge.merge_many, (HEADS[0], LSE[0], HEADS.transpose(0, 1), LSE.transpose(0, 1))),
}


@pytest.mark.parametrize("name", CALLS)
def test_schema_and_fake_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of the poison: opcheck compares what the op left as it was, too
    op, arguments = CALLS[name]
    fresh = tuple(torch.randn_like(a) if a is OUT else a for a in arguments)
    torch.library.opcheck(op, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in fresh))


def test_the_compiler_sees_one_call_of_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    torch.compile(flashinfer.rmsnorm, fullgraph=True, backend=keep)(X, W)
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.flashinfer.rmsnorm.default) == 1 and len(called) == 2  # and the allocation


def test_parameters_with_gradients_are_taken_and_get_none() -> None:
    weight = torch.nn.Parameter(torch.ones(16))
    out = flashinfer.rmsnorm(X, weight)
    assert not out.requires_grad
    assert torch.equal(out, flashinfer.rmsnorm(X, weight.detach()))


def test_schemas_with_results_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected results '-> \(\)'"):
        library.register("makes(Tensor input) -> Tensor")


def test_import_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import flashinfer; flashinfer.rmsnorm"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def test_what_is_untraced_is_called_each_time_between_two_graphs() -> None:
    calls = []

    @library.untraced
    def count(x: torch.Tensor) -> torch.Tensor:
        assert not torch.compiler.is_compiling()
        calls.append(x)
        return x + len(calls)

    torch.compiler.reset()
    compiled = torch.compile(lambda x: count(x * 2) * 3, backend="eager")
    assert [compiled(torch.ones(2)).tolist() for _ in range(3)] == [[9.0, 9.0], [12.0, 12.0], [15.0, 15.0]]
    assert len(calls) == 3 and count(torch.ones(1)).tolist() == [5.0]
