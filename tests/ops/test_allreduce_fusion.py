"""Fused all-reduces and their facades, on the CPU: by torch's collectives and by kernels through the interpreter."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashinfer import comm
from flashinfer.comm import AllReduceFusionPattern as Pattern
from flashinfer.comm import QuantizationSFLayout as Layout
from flashinfer.comm.comm_backend import TorchDistBackend
from flashinfer.core.peers import PeerError
from flashinfer.ops import collectives, quantization
from flashinfer.ops.quantization import scales_needed
from tests.ops.allreduce_checks import (
    EPS,
    FP8,
    check_all_outputs,
    fp8_bound,
    fp8_within,
    fuse,
    outputs,
    problem,
    within,
)
from tests.ranks import poisoned, run_ranks, skip_interpreter, two_gpus

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
Ranks = tuple[int, int, torch.device]


def _workspace(ranks: Ranks, max_token_num: int = 16, hidden_dim: int = 256, dtype: torch.dtype = FP32) -> Any:
    rank, world_size, _ = ranks
    return comm.create_allreduce_fusion_workspace("auto", world_size, rank, max_token_num, hidden_dim, dtype)


def _plain(ranks: Ranks, seed: int) -> None:
    """Sums alone, norms in new tensors and in place, everything at once; a gain of 1 added to gamma."""
    rank, world_size, device = ranks
    workspace = _workspace(ranks)
    for i, (shape, dtype, oneshot) in enumerate(
        [((1, 8), FP32, None), ((5, 96), FP16, False), ((16, 256), FP32, True), ((3, 250), FP16, None)]
    ):
        p = problem(shape, dtype, world_size, seed + i, device, bias=float(i % 2))
        case = (shape, dtype, oneshot, rank)
        before = p.inputs[rank].clone(), p.residual.clone()
        check_all_outputs(p, rank, workspace, oneshot, case)
        got = comm.allreduce_fusion(p.inputs[rank], workspace, Pattern.kAllReduce, use_oneshot=oneshot)
        within("output", got, p.total, p.total_bound, case)
        normed = fuse(p, rank, workspace, Pattern.kARResidualRMSNorm, residual_out=None)
        within("norm_out", normed, p.normed, p.norm_bound, case)
        assert torch.equal(p.inputs[rank], before[0]) and torch.equal(p.residual, before[1])
        into = {"norm_out": p.inputs[rank], "residual_out": p.residual}
        assert fuse(p, rank, workspace, Pattern.kARResidualRMSNorm, **into) is p.inputs[rank]
        within("norm_out", p.inputs[rank], p.normed, p.norm_bound, case)
        within("residual_out", p.residual, p.sum, p.sum_bound, case)
    workspace.destroy()


def _without_residual(ranks: Ranks, seed: int) -> None:
    rank, world_size, device = ranks
    workspace = _workspace(ranks)
    p = problem((4, 64), FP16, world_size, seed, device)
    p.residual.zero_()
    exact = p.total * torch.rsqrt(p.total.square().mean(-1, keepdim=True) + EPS) * p.gamma.double()
    got = fuse(p, rank, workspace, Pattern.kARResidualRMSNorm, residual_in=None)
    torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=2e-3)
    empty = problem((0, 64), FP16, world_size, seed, device)
    assert fuse(empty, rank, workspace, Pattern.kARResidualRMSNorm).shape == (0, 64)
    workspace.destroy()


def _codes_of_rows(ranks: Ranks, seed: int) -> None:
    """fp8 by a scale given as a number or not at all, fp8 with a scale for each row."""
    rank, world_size, device = ranks
    workspace = _workspace(ranks)
    p = problem((5, 128), FP16, world_size, seed, device)
    one = torch.ones(1, device=device)
    for factor, scale in ((0.5, one / 2), (None, one), (one / 4, one / 4)):
        codes = fuse(p, rank, workspace, Pattern.kARResidualRMSNormFP8Quant, scale_factor=factor)
        assert codes.dtype == FP8
        fp8_within("quant_out", codes, scale, p, (factor, rank))
    for pattern in (Pattern.kARResidualRMSNormDynamicFP8Quant, Pattern.kARResidualRMSNormOutDynamicFP8Quant):
        outs, codes = outputs(p), torch.empty(5, 128, dtype=FP8, device=device)
        scales = torch.full((5, 1), float("nan"), device=device)
        assert fuse(p, rank, workspace, pattern, **outs, quant_out=codes, scale_out=scales) is codes
        largest = p.normed.abs().amax(-1, keepdim=True) / 448
        torch.testing.assert_close(scales.double(), largest, rtol=2e-3, atol=0)
        fp8_within("quant_out", codes, scales, p, (pattern, rank))
        kept = pattern == Pattern.kARResidualRMSNormOutDynamicFP8Quant
        assert outs["norm_out"].isnan().all() == (not kept)
    p.gamma.zero_()  # rows of zeros: the smallest scale, and codes of zero
    fuse(p, rank, workspace, Pattern.kARResidualRMSNormDynamicFP8Quant, quant_out=codes, scale_out=scales)
    assert (codes.float() == 0).all() and torch.allclose(scales, torch.tensor(2.0**-9 / 448, device=device))
    workspace.destroy()


def _fp4(ranks: Ranks, seed: int) -> None:
    """The codes are those of the norm that comes out beside them, with and without it, in every order of scales."""
    rank, world_size, device = ranks
    workspace = _workspace(ranks)
    p = problem((5, 96), FP16, world_size, seed, device)
    factor = torch.full((1,), 7.5, device=device)
    for layout in (None, Layout.SWIZZLED_128x4, Layout.SWIZZLED_8x4, Layout.LINEAR):
        order = quantization.SfLayout(layout or 0)
        size = scales_needed(5, 6, order)
        found = []
        for pattern in (Pattern.kARResidualRMSNormOutFP4Quant, Pattern.kARResidualRMSNormFP4Quant):
            outs = outputs(p)
            codes, scales = (torch.zeros(n, dtype=torch.uint8, device=device) for n in ((5, 48), size))
            given = {**outs, "quant_out": codes, "scale_out": scales, "scale_factor": factor, "layout_code": layout}
            assert fuse(p, rank, workspace, pattern, **given) is codes
            found.append((codes, scales, outs["norm_out"]))
        within("norm_out", found[0][2], p.normed, p.norm_bound, (layout, rank))
        expected = torch.zeros_like(codes), torch.zeros_like(scales)
        quantization.quantize_fp4(*expected, found[0][2], factor, order)
        for codes, scales, _ in found:
            assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1]), (layout, rank)
    workspace.destroy()


def _codes_of_groups(ranks: Ranks, seed: int) -> None:
    """fp8 with scales 2^n for groups, four exponents to an int32, columns aligned to four rows, zeros between."""
    rank, world_size, device = ranks
    workspace = _workspace(ranks)
    p = problem((5, 192), FP16, world_size, seed, device)
    codes = torch.empty(5, 192, dtype=FP8, device=device)
    whole = torch.full((16,), 0x7F7F7F7F, dtype=torch.int32, device=device)
    scales = whole.as_strided((5, 2), (1, 8))
    given = {"quant_out": codes, "scale_out": scales, "block_quant_group_size": 32}
    pattern = Pattern.kARResidualRMSNormOutPerTokenGroupFP8PackedQuant
    assert fuse(p, rank, workspace, pattern, **given) is codes
    exponents = torch.stack([scales >> shift & 255 for shift in (0, 8, 16, 24)], -1).view(5, 8)
    assert (exponents[:, 6:] == 0).all() and (whole[5:8] == 0).all()
    factors = torch.exp2(exponents[:, :6].float() - 127).repeat_interleave(32, 1)
    fp8_within("quant_out", codes, factors, p, rank)
    largest = p.normed.abs().view(5, 6, 32).amax(-1) / 448
    assert (factors[:, ::32] >= largest * 0.99).all() and (factors[:, ::32] < largest * 2.02).all()
    workspace.destroy()


def _experts(ranks: Ranks, seed: int) -> None:
    """Sums over experts before: by scales of all experts, by a table of rows."""
    rank, world_size, device = ranks
    workspace = _workspace(ranks)
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int, dtype: torch.dtype = FP16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    num_tokens, hidden, count = 5, 64, 3
    residual, gamma = rand(num_tokens, hidden), rand(hidden)
    rows = [rand(count * num_tokens, hidden) for _ in range(world_size)]
    added = [rand(num_tokens, hidden) for _ in range(world_size)]
    scales = rand(count, num_tokens, dtype=FP32)
    table = torch.randint(-1, count * num_tokens, (num_tokens, count), generator=generator, dtype=torch.int32)
    table = table.to(device)
    weights = rand(num_tokens, count)
    parts = [(scales[..., None] * x.view(count, num_tokens, hidden)).sum(0) for x in rows]
    sums = [(part + y).to(FP16) for part, y in zip(parts, added, strict=True)]
    expected = (sum(x.double() for x in sums) + residual.double(),)
    outs = {name: torch.full_like(residual, float("nan")) for name in ("output", "residual_out", "norm_out")}
    common = {"residual_in": residual, "rms_gamma": gamma, "rms_eps": EPS}
    experts = {
        "moe_reduction_device_num_experts": count,
        "moe_reduction_scale_input": scales,
        "moe_reduction_active_experts_token_input": rows[rank],
        "moe_reduction_token_input": added[rank],
    }
    reduction = Pattern.kMoEReductionARResidualRMSNorm
    assert comm.allreduce_fusion(rows[rank], workspace, reduction, **outs, **common, **experts) is outs["norm_out"]
    _check_norm(outs, expected[0], gamma, world_size, rank)
    codes = torch.empty(num_tokens * hidden // 4, dtype=FP16, device=device)
    block_scales = torch.zeros(512, dtype=torch.uint8, device=device)
    quantised = {"quant_out": codes, "scale_out": block_scales, "scale_factor": 2.0}
    comm.allreduce_fusion(rows[rank], workspace, reduction, **outs, **common, **experts, **quantised)
    wanted = torch.zeros(num_tokens, hidden // 2, dtype=torch.uint8, device=device), torch.zeros_like(block_scales)
    quantization.quantize_fp4(*wanted, outs["norm_out"], torch.full((1,), 2.0, device=device), 0)
    assert torch.equal(codes.view(torch.uint8)[: wanted[0].numel()], wanted[0].view(-1))
    assert torch.equal(block_scales, wanted[1])
    kept = (table >= 0)[..., None]
    parts = [(torch.where(kept, x[table.clamp(min=0).long()], 0) * weights.float()[..., None]).sum(1) for x in rows]
    sums = [(part + y).to(FP16) for part, y in zip(parts, added, strict=True)]
    finalise = {
        "expanded_idx_to_permuted_idx": table,
        "expert_scale_factor": weights,
        "shared_expert_output": added[rank],
    }
    outs = {name: torch.full_like(residual, float("nan")) for name in outs}
    pattern = Pattern.kMoEFinalizeARResidualRMSNorm
    assert comm.allreduce_fusion(rows[rank], workspace, pattern, **outs, **common, **finalise) is outs["norm_out"]
    _check_norm(outs, sum(x.double() for x in sums) + residual.double(), gamma, world_size, rank)
    assert comm.allreduce_fusion(rows[rank], workspace, pattern, **common, **finalise).equal(outs["norm_out"])
    workspace.destroy()


def _check_norm(outs: dict[str, torch.Tensor], exact: torch.Tensor, gamma: torch.Tensor, ranks: int, case: int) -> None:
    """The parts themselves are rounded by up to one last place more, where fp32 sums are in another order."""
    torch.testing.assert_close(outs["residual_out"].double(), exact, rtol=2e-3, atol=4e-3 * ranks)
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPS) * gamma.double()
    torch.testing.assert_close(outs["norm_out"].double(), normed, rtol=4e-3, atol=4e-3 * ranks)
    assert not outs["output"].isnan().any()


def _trtllm(ranks: Ranks, seed: int) -> None:
    """The older names, tensors flat, workspaces as numbers."""
    rank, world_size, device = ranks
    backend = TorchDistBackend()
    handles, tensor, metadata = comm.trtllm_create_ipc_workspace_for_all_reduce_fusion(
        rank, world_size, 8, 128, create_metadata=True, comm_backend=backend
    )
    assert metadata["max_token_num"] == 8 and len(handles) == 3
    p = problem((6, 128), FP16, world_size, seed, device)
    x, residual = p.inputs[rank].clone().view(-1), p.residual.clone().view(-1)
    call = (world_size, rank, 6, 128, tensor, True, True, True, Pattern.kARResidualRMSNorm, None)
    comm.trtllm_allreduce_fusion(x, *call, None, residual, residual, x, None, None, p.gamma, EPS, None, None, metadata)
    within("norm_out", x.view(6, 128), p.normed, p.norm_bound, rank)
    within("residual_out", residual.view(6, 128), p.sum, p.sum_bound, rank)
    ones = torch.ones(2, 6, device=device)
    outs = [torch.full_like(p.residual, float("nan")).view(-1) for _ in range(3)]
    comm.trtllm_moe_allreduce_fusion(
        world_size, rank, 6, 128, tensor, False, p.residual.view(-1), p.gamma, EPS, 1.0, 2, ones.view(-1),
        torch.cat([p.inputs[rank], -p.inputs[rank]]).view(-1), p.inputs[rank].view(-1), None, *outs, None, None
    )  # fmt: skip
    within("output", outs[0].view(6, 128), p.total, p.total_bound, rank)
    within("norm_out", outs[2].view(6, 128), p.normed, p.norm_bound, rank)
    table = torch.arange(6, device=device, dtype=torch.int32)[:, None]
    halves = torch.full((6, 1), 0.5, dtype=FP16, device=device)
    comm.trtllm_moe_finalize_allreduce_fusion(
        p.inputs[rank], p.residual, p.gamma, table, p.inputs[rank], None, None, None, tensor, True, rank, world_size,
        EPS, None, halves, 2.0
    )  # fmt: skip
    within("norm_out", p.inputs[rank], p.normed, p.norm_bound, rank)
    with pytest.raises(ValueError, match="no workspace"):
        comm.trtllm_allreduce_fusion(x, *call[:4], tensor.clone(), *call[5:], *[None] * 10)
    comm.trtllm_destroy_ipc_workspace_for_all_reduce(handles)
    comm.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(handles)
    assert comm.compute_fp4_swizzled_layout_sf_size(129, 5) == 256 * 8


def _vllm(ranks: Ranks, seed: int) -> None:
    """Custom all-reduce over shared buffers, known by their addresses."""
    rank, world_size, device = ranks
    meta = comm.create_shared_buffer(comm.vllm_meta_size() + 4096)
    buffers = comm.create_shared_buffer(4096)
    comm.trtllm_lamport_initialize(buffers[rank], 16, FP32)
    seen = comm.pack_strided_memory(buffers[rank], 8, 16, 4, FP32, device)
    assert seen.shape == (4, 2) and torch.signbit(seen).all() and (seen == 0).all()
    fa = comm.vllm_init_custom_ar(meta, torch.empty(64, dtype=torch.uint8), rank, True)
    comm.vllm_register_buffer(fa, buffers)
    p = problem((8, 256), FP16, world_size, seed, device)
    out = torch.full_like(p.residual, float("nan"))
    comm.vllm_all_reduce(fa, p.inputs[rank], out, buffers[rank], 4096, 16)
    within("out", out, p.total, p.total_bound, rank)
    with pytest.raises(ValueError, match="at most 4095 bytes"):
        comm.vllm_all_reduce(fa, p.inputs[rank], out, buffers[rank], 4095, 16)
    handle, offsets = comm.vllm_get_graph_buffer_ipc_meta(fa)
    comm.vllm_register_graph_buffers(fa, [handle] * world_size, [offsets] * world_size)
    with pytest.raises(ValueError, match="create_shared_buffer"):
        comm.vllm_register_buffer(fa, [1] * world_size)
    comm.vllm_dispose(fa)
    with pytest.raises(ValueError, match="fa"):
        comm.vllm_dispose(fa)
    for buffer in (buffers, meta):
        comm.free_shared_buffer(buffer)
    with pytest.raises(ValueError, match="pointers"):
        comm.free_shared_buffer(buffers)


def _by_group(ranks: Ranks, seed: int) -> None:
    """What takes a group: the quantised sum, the gathered product; groups of some of the ranks."""
    rank, world_size, device = ranks
    p = problem((16, 256), FP16, world_size, seed, device)
    got = comm.quantized_all_reduce(p.inputs[rank], dist.group.WORLD, scale_group=128)
    within("fp8", got, p.total, fp8_bound(p.inputs, 128), rank)
    w = torch.randn(256, 24, generator=torch.Generator().manual_seed(seed)).to(device, FP16)
    expected = torch.cat(p.inputs).float() @ w.float()
    launch = comm.prepare_all_gather_matmul(p.inputs[rank], w, dist.group.WORLD)
    for product in (comm.all_gather_matmul(p.inputs[rank], w, dist.group.WORLD), launch(p.inputs[rank])):
        torch.testing.assert_close(product.float(), expected, rtol=4e-3, atol=4e-2)
    with pytest.raises(ValueError, match="at most 16"):
        launch(torch.cat([p.inputs[rank]] * 2))
    everyone = TorchDistBackend()
    assert everyone.allgather(rank) == tuple(range(world_size)) and everyone.bcast(rank, 1) == 1
    half = everyone.Split(int(rank == 0), 0)
    assert half.Get_size() == (1 if rank == 0 else world_size - 1)
    workspace = comm.create_allreduce_fusion_workspace(
        "mnnvl", half.Get_size(), half.Get_rank(), 16, 256, FP16, comm_backend=half
    )
    assert workspace.backend == "mnnvl"
    mine = p.inputs[:1] if rank == 0 else p.inputs[1:]
    before = collectives.CHOICE.auto
    collectives.CHOICE.auto = before if len(mine) > 1 else "torch"  # no kernel sends to nobody
    got = comm.allreduce_fusion(p.inputs[rank], workspace, Pattern.kAllReduce)
    collectives.CHOICE.auto = before
    torch.testing.assert_close(got.double(), sum(x.double() for x in mine), rtol=1e-3, atol=2e-3)
    everyone.barrier()
    workspace.destroy()


def _functions(ranks: Ranks, seed: int) -> None:
    """This package's own functions, in new tensors and given ones."""
    rank, world_size, device = ranks
    workspace = comm.CommWorkspace(device=device, max_bytes=1 << 12)
    assert (workspace.rank, workspace.world_size) == (rank, world_size)
    p = problem((4, 50), FP16, world_size, seed, device)
    x = p.inputs[rank]
    within("all_reduce", comm.all_reduce(x, workspace), p.total, p.total_bound, rank)
    assert comm.all_gather(x, workspace).equal(torch.cat(p.inputs))
    parts = [torch.cat([y] * world_size) for y in p.inputs]
    part = torch.full_like(x, float("nan"))
    assert comm.reduce_scatter(parts[rank], workspace, part) is part
    within("reduce_scatter", part, p.total, p.total_bound, rank)
    assert comm.all_reduce(x, workspace, x) is x
    within("in place", x, p.total, p.total_bound, rank)
    assert comm.all_reduce(torch.tensor(2.0, device=device), workspace) == 2 * world_size
    workspace.destroy()
    workspace.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        comm.all_reduce(x, workspace)


def _compiled(ranks: Ranks, seed: int) -> None:
    """In one graph, new results and in place."""
    rank, world_size, device = ranks
    workspace = _workspace(ranks)
    p = problem((6, 64), FP16, world_size, seed, device)

    def layer(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        pattern = Pattern.kARResidualRMSNorm
        given = {"norm_out": x, "residual_out": residual, "residual_in": residual, "rms_gamma": p.gamma}
        normed = comm.allreduce_fusion(x * 1.0, workspace, pattern, rms_eps=EPS, **given)
        return comm.allreduce_fusion(normed + 1.0, workspace, Pattern.kAllReduce)

    workspace.on(device)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, residual = p.inputs[rank].clone(), p.residual.clone()
    got = compiled(x, residual)
    within("norm_out", x, p.normed, p.norm_bound, rank)
    within("residual_out", residual, p.sum, p.sum_bound, rank)
    torch.testing.assert_close(got, ((x + 1).float() * world_size).to(FP16), rtol=2e-3, atol=2e-3)
    workspace.destroy()


def _refused(ranks: Ranks, seed: int) -> None:
    """What a rank alone can tell is refused before anything is sent: all go on afterwards."""
    rank, world_size, device = ranks
    workspace = _workspace(ranks, 8, 64, FP16)
    p = problem((4, 64), FP16, world_size, seed, device)
    norm, codes = Pattern.kARResidualRMSNorm, torch.empty(4, 64, dtype=FP8, device=device)
    wide = torch.empty(4, 128, dtype=FP16, device=device)

    def refused(match: str, pattern: int = norm, **given: Any) -> None:
        with pytest.raises(ValueError, match=match):
            fuse(p, rank, workspace, pattern, **given)

    refused("pattern: got 99", 99)
    refused("residual_in: got dtype", residual_in=p.residual.float())
    refused("residual_out: got shape", residual_out=p.residual[:2].clone())
    refused("norm_out: got strides", norm_out=wide[:, ::2])
    refused("rms_gamma: got None", rms_gamma=None)
    refused("rms_gamma: got shape", rms_gamma=p.gamma[:8])
    refused("quant_out: got dtype", Pattern.kARResidualRMSNormFP8Quant, quant_out=p.residual.clone())
    refused("scale_out: got None", Pattern.kARResidualRMSNormDynamicFP8Quant, quant_out=codes)
    refused("quant_out: got None", Pattern.kARResidualRMSNormFP4Quant)
    refused("scale_factor: got shape", Pattern.kARResidualRMSNormFP8Quant, scale_factor=torch.ones(2, device=device))
    few = torch.zeros(3, dtype=torch.uint8, device=device)
    refused("expanded_idx", Pattern.kMoEFinalizeARResidualRMSNorm)
    refused("moe_reduction_active", Pattern.kMoEReductionARResidualRMSNorm)
    if device.type == "cpu":
        beyond = torch.full((4, 1), 4, dtype=torch.int32)
        refused("values from 4 to 4", Pattern.kMoEFinalizeARResidualRMSNorm, expanded_idx_to_permuted_idx=beyond)
    with pytest.raises(ValueError, match="input: got 9 tokens"):
        comm.allreduce_fusion(torch.empty(9, 64, dtype=FP16, device=device), workspace, Pattern.kAllReduce)
    with pytest.raises(ValueError, match="input: got strides"):
        comm.allreduce_fusion(wide[:, ::2], workspace, Pattern.kAllReduce)
    with pytest.raises(ValueError, match="input: got dtype"):
        comm.allreduce_fusion(torch.empty(2, 64, dtype=torch.float64, device=device), workspace, Pattern.kAllReduce)
    assert not workspace.is_buffer_size_sufficient(world_size + 1, 1, 64, FP16)
    assert not workspace.is_buffer_size_sufficient(world_size, 8, 64, FP32)
    assert workspace.is_buffer_size_sufficient(world_size, 4, 64, FP32)
    with pytest.raises(ValueError, match="world_size and rank"):
        comm.create_allreduce_fusion_workspace("trtllm", world_size, (rank + 1) % world_size, 8, 64, FP16)
    with pytest.raises(ValueError, match="backend"):
        comm.create_allreduce_fusion_workspace("nccl", world_size, rank, 8, 64, FP16)
    with pytest.raises(NotImplementedError):
        workspace.checkpoint_prepare()
    check_all_outputs(p, rank, workspace, None, "after the errors")
    # Here the sum is made before the codes' place is looked at, on all ranks.
    refused("scale_out: got 3 bytes", Pattern.kARResidualRMSNormFP4Quant, quant_out=codes, scale_out=few)
    workspace.destroy()
    refused_after: Callable[[], object] = lambda: fuse(p, rank, workspace, norm)  # noqa: E731
    with pytest.raises(RuntimeError, match="destroyed"):
        refused_after()


def _everything(rank: int, world_size: int, device: torch.device, backend: str, seed: int) -> None:
    """All of the above in one process a rank: starting one takes longer."""
    collectives.CHOICE.auto = quantization.CHOICE.auto = backend
    ranks = (rank, world_size, device)
    with poisoned():
        for part in (_plain, _without_residual, _codes_of_rows, _fp4, _codes_of_groups, _experts, _trtllm, _vllm):
            part(ranks, seed)
        for part in (_by_group, _functions, _refused):
            part(ranks, seed)
    if backend == "torch" or device.type == "cuda":
        _compiled(ranks, seed)


@pytest.mark.parametrize(("backend", "world_size"), [("torch", 2), ("torch", 3), ("triton", 2), ("triton", 3)])
def test_fused_all_reduces(backend: str, world_size: int, rng: random.Random) -> None:
    skip_interpreter(backend)
    run_ranks(_everything, world_size, backend, rng.randrange(1000))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fused_all_reduces_on_gpus(backend: str, rng: random.Random) -> None:
    run_ranks(_everything, two_gpus(), backend, rng.randrange(1000), device="cuda")


def _disagreeing(rank: int, world_size: int, device: torch.device, backend: str, what: str) -> str:
    collectives.CHOICE.auto = backend
    other = {"dtype": FP32 if rank else FP16, "hidden": 32 + 32 * rank, "pattern": rank, "sizes": 8 + rank}
    try:
        max_token_num = other["sizes"] if what == "sizes" else 16
        workspace = comm.create_allreduce_fusion_workspace("auto", world_size, rank, max_token_num, 64, FP32)
        comm_workspace = workspace.on(device)
        comm_workspace.peers.timeout = 4.0
        hidden = other["hidden"] if what == "hidden" else 64
        dtype = other["dtype"] if what == "dtype" else FP32
        x = torch.ones(2, hidden, dtype=dtype)
        given = {"residual_in": x.clone(), "rms_gamma": torch.ones(hidden, dtype=dtype)}
        for _ in range(2):  # kernels tell of the first call when the next one is made
            pattern = other["pattern"] if what == "pattern" else Pattern.kARResidualRMSNorm
            comm.allreduce_fusion(x, workspace, pattern, **given)
    except PeerError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("what", ["dtype", "hidden", "pattern", "sizes"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ranks_that_disagree(backend: str, what: str) -> None:
    names = {
        "dtype": "dtype",
        "hidden": "hidden_size|num_bytes",
        "pattern": "what follows|num_bytes",
        "sizes": "max_token",
    }
    for rank, message in enumerate(run_ranks(_disagreeing, 2, backend, what)):
        assert any(name in message for name in names[what].split("|")), (rank, message)
        assert f"rank {1 - rank}" in message, message


def test_no_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        comm.CommWorkspace()
    with pytest.raises(RuntimeError, match="init_process_group"):
        TorchDistBackend()


def test_numbers_of_patterns() -> None:
    """FlashInfer's; clients spell some of them as numbers."""
    assert (Pattern.kAllReduce, Pattern.kMoEFinalizeARResidualRMSNorm) == (0, 7)
    assert (Layout.SWIZZLED_128x4, Layout.SWIZZLED_8x4, Layout.LINEAR) == (0, 1, 2)
