"""Kernels of collectives on two GPUs: all sizes, graphs, repetition, races, memory."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashinfer import comm
from flashinfer.comm import AllReduceFusionPattern as Pattern
from flashinfer.ops import collectives
from tests.ops.allreduce_checks import (
    EPS,
    FP8,
    Problem,
    check_all_outputs,
    check_outputs,
    fuse,
    outputs,
    problem,
    solved,
    within,
)
from tests.ops.common import captured
from tests.ranks import run_ranks, two_gpus

pytestmark = pytest.mark.gpu
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
HIDDEN = (8, 24, 1000, 2880, 4096, 7168, 8192, 16384)
TOKENS = (1, 2, 3, 7, 64, 127, 128, 500, 2048)
Ranks = tuple[int, int, torch.device]


def _workspace(ranks: Ranks, max_token_num: int = 2048, hidden_dim: int = 8192, dtype: torch.dtype = BF16) -> Any:
    workspace = comm.create_allreduce_fusion_workspace("auto", ranks[1], ranks[0], max_token_num, hidden_dim, dtype)
    assert workspace.on(ranks[2]).unreachable is None
    return workspace


def _matrix(rank: int, world_size: int, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Every length of rows by both algorithms, with a few numbers of tokens each."""
    rng = random.Random(seed)
    for i, (hidden, oneshot) in enumerate(itertools.product(HIDDEN, (True, False))):
        workspace = _workspace((rank, world_size, device), 2048, hidden, dtype)
        for num_tokens in (1, *rng.sample(TOKENS[1:-1], 3), *([2048] if hidden in (8, 4096, 16384) else [])):
            p = problem((num_tokens, hidden), dtype, world_size, seed + i, device, bias=float(i % 2))
            case = (dtype, num_tokens, hidden, oneshot, rank)
            check_all_outputs(p, rank, workspace, oneshot, case)
            got = comm.allreduce_fusion(p.inputs[rank], workspace, Pattern.kAllReduce, use_oneshot=oneshot)
            within("output", got, p.total, p.total_bound, case)
        workspace.on(device).check()
        workspace.destroy()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_sizes(dtype: torch.dtype, rng: random.Random) -> None:
    run_ranks(_matrix, two_gpus(), dtype, rng.randrange(1000), device="cuda")


def _calls_of_reduce() -> list[int]:
    """Grows with each call that is not a repetition."""
    calls: list[int] = []
    reduce = collectives.reduce

    def counted(*arguments: Any, **keywords: Any) -> None:
        calls.append(1)
        reduce(*arguments, **keywords)

    collectives.reduce = counted
    return calls


def _repeated(rank: int, world_size: int, device: torch.device, seed: int) -> None:
    """The second call of a kind is a repetition, and gives what the tensors then hold."""
    ranks = (rank, world_size, device)
    calls = _calls_of_reduce()
    workspace = _workspace(ranks, 64, 2880)
    mine = comm.CommWorkspace(device=device)
    for i in range(4):
        p = problem((33, 2880), BF16, world_size, seed + i, device)
        check_all_outputs(p, rank, workspace, None, i)
        within("output", comm.all_reduce(p.inputs[rank], mine), p.total, p.total_bound, i)
        normed = fuse(p, rank, workspace, Pattern.kARResidualRMSNorm)
        within("norm_out", normed, p.normed, p.norm_bound, i)
        into = {"norm_out": p.inputs[rank], "residual_out": p.residual}
        fuse(p, rank, workspace, Pattern.kARResidualRMSNorm, **into)
        within("in place", p.inputs[rank], p.normed, p.norm_bound, i)
    assert len(calls) == 4, f"{len(calls)} of 16 calls were no repetitions"
    mine.check()


def test_calls_are_repeated(rng: random.Random) -> None:
    run_ranks(_repeated, two_gpus(), rng.randrange(1000), device="cuda")


def _captured(rank: int, world_size: int, device: torch.device, seed: int) -> None:
    """A graph of calls by both algorithms, replayed with other numbers, the ranks out of step."""
    workspace = _workspace((rank, world_size, device), 512, 4096)
    p = problem((300, 4096), BF16, world_size, seed, device)
    x, residual = p.inputs[rank].clone(), p.residual.clone()
    wide, parts = torch.empty(2 * 300, 4096, dtype=BF16, device=device), comm.CommWorkspace(device=device)
    found: list[dict[str, torch.Tensor]] = []

    def run() -> None:
        found.clear()
        for oneshot in (True, False):
            outs = {**outputs(p), "quant_out": torch.empty_like(x, dtype=FP8)}
            common = {"residual_in": residual, "rms_gamma": p.gamma, "rms_eps": EPS, "scale_factor": p.scale}
            pattern = Pattern.kARResidualRMSNormOutFP8Quant
            comm.allreduce_fusion(x, workspace, pattern, use_oneshot=oneshot, **common, **outs)
            found.append(outs)
        comm.all_gather(x, parts, wide)

    run()
    graph = captured(run)
    for i in range(20):
        q = problem((300, 4096), BF16, world_size, seed + 1 + i, device)
        q = solved(q.inputs, q.residual, p.gamma, p.scale, 0.0)
        x.copy_(q.inputs[rank])
        residual.copy_(q.residual)
        if i % 3 == rank:
            torch.cuda._sleep(2_000_000)
        graph.replay()
        for oneshot, outs in zip((True, False), found, strict=True):
            check_outputs(q, outs, outs["quant_out"], (i, oneshot, rank))
        assert torch.equal(wide, torch.cat(q.inputs)), (i, rank)
    workspace.on(device).check()
    parts.check()


def test_graphs(rng: random.Random) -> None:
    run_ranks(_captured, two_gpus(), rng.randrange(1000), device="cuda")


def _uncaptured(rank: int, world_size: int, device: torch.device) -> str:
    workspace = comm.CommWorkspace(device=device)
    x = torch.ones(4, 64, device=device)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            comm.all_reduce(x, workspace)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_first_call_in_a_capture_is_refused() -> None:
    for message in run_ranks(_uncaptured, two_gpus(), device="cuda"):
        assert "Warm up first" in message, message


def _random_call(
    rng: random.Random, p: Problem, rank: int, workspace: Any, mine: comm.CommWorkspace
) -> Callable[[], None]:
    """A call of a random kind is made now; what it gave is looked at later."""
    oneshot, x = rng.choice((None, True, False)), p.inputs[rank]
    kind = rng.randrange(4)
    if kind == 0:
        got = comm.allreduce_fusion(x, workspace, Pattern.kAllReduce, use_oneshot=oneshot)
        return lambda: within("output", got, p.total, p.total_bound, oneshot)
    if kind == 1:
        outs, codes = outputs(p), torch.empty_like(x, dtype=FP8)
        given = {**outs, "quant_out": codes, "scale_factor": p.scale, "use_oneshot": oneshot}
        fuse(p, rank, workspace, Pattern.kARResidualRMSNormOutFP8Quant, **given)
        return lambda: check_outputs(p, outs, codes, oneshot)
    if kind == 2:
        gathered, expected = comm.all_gather(x, mine), torch.cat(p.inputs)
        return lambda: torch.testing.assert_close(gathered, expected, rtol=0, atol=0)
    part = comm.reduce_scatter(torch.cat([x, x]), mine)
    return lambda: within("part", part, p.total, p.total_bound, "reduce_scatter")


def _races(rank: int, world_size: int, device: torch.device, seed: int) -> None:
    """Back-to-back calls of mixed sizes and kinds, nobody waiting for anybody, the ranks delayed at random."""
    rng, own = random.Random(seed), random.Random(seed + 1 + rank)
    workspace = _workspace((rank, world_size, device), 600, 4096)
    mine = comm.CommWorkspace(device=device, max_bytes=1 << 20)
    shapes = [(1, 4096), (3, 4096), (64, 4096), (600, 4096), (5, 2880), (200, 2880), (1, 64), (77, 64)]
    problems = {shape: problem(shape, BF16, world_size, seed, device) for shape in shapes}
    for _ in range(5):
        looks = []
        torch.cuda.synchronize()
        for _ in range(40):
            looks.append(_random_call(rng, problems[rng.choice(shapes)], rank, workspace, mine))
            if own.random() < 0.2:
                torch.cuda._sleep(own.randrange(200_000))
        for look in looks:
            look()
    workspace.on(device).check()
    mine.check()


def test_races(rng: random.Random) -> None:
    run_ranks(_races, two_gpus(), rng.randrange(1000), device="cuda")


def _compiled(rank: int, world_size: int, device: torch.device, seed: int) -> None:
    workspace = _workspace((rank, world_size, device), 64, 2880)
    p = problem((16, 2880), BF16, world_size, seed, device)

    def layer(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = {"residual_in": residual, "rms_gamma": p.gamma, "rms_eps": EPS}
        out = torch.empty_like(residual)
        normed = comm.allreduce_fusion(x, workspace, Pattern.kARResidualRMSNorm, residual_out=out, **given)
        return normed * 2, out

    compiled = torch.compile(layer, fullgraph=True)
    for _ in range(3):
        normed, out = compiled(p.inputs[rank], p.residual)
        within("norm_out", normed / 2, p.normed, p.norm_bound, rank)
        within("residual_out", out, p.sum, p.sum_bound, rank)
    workspace.on(device).check()


def test_compiled(rng: random.Random) -> None:
    run_ranks(_compiled, two_gpus(), rng.randrange(1000), device="cuda")


def _rounds(rank: int, world_size: int, device: torch.device) -> list[int]:
    free = []
    for _ in range(8):
        workspace = _workspace((rank, world_size, device), 256, 4096)
        x = torch.ones(256, 4096, dtype=BF16, device=device)
        assert (comm.allreduce_fusion(x, workspace, Pattern.kAllReduce) == world_size).all()
        shared = comm.create_shared_buffer(1 << 20)
        comm.free_shared_buffer(shared)
        workspace.destroy()
        del workspace, x
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info(device)[0])
    return free


def test_workspaces_leave_no_memory() -> None:
    for free in run_ranks(_rounds, two_gpus(), device="cuda"):
        assert free[2] - free[-1] < 4 << 20, free  # the first rounds load modules


def _cudart(rank: int, world_size: int, device: torch.device) -> None:
    library = comm.CudaRTLibrary()
    library.cudaSetDevice(rank)
    memory = library.cudaMalloc(64)
    assert memory.value is not None
    library.cudaMemset(memory, 0, 64)
    comm.trtllm_lamport_initialize(memory.value, 16, FP32)
    x = comm.pack_strided_memory(memory.value, 16, 32, 2, FP32, rank)
    assert x.shape == (2, 4) and torch.signbit(x).all()
    source = torch.arange(16.0, device=device)
    library.cudaMemcpy(memory, memory.__class__(source.data_ptr()), 64)
    library.cudaDeviceSynchronize()
    assert x.tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    library.cudaIpcGetMemHandle(memory)
    library.cudaFree(memory)
    with pytest.raises(RuntimeError, match="CUDART"):
        library.cudaSetDevice(99)


def test_run_time_library() -> None:
    run_ranks(_cudart, two_gpus(), device="cuda")
