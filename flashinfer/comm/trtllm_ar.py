"""TensorRT-LLM's all-reduce functions with FlashInfer's names: thin, over `allreduce.py`.

A workspace is handed around as an int64 tensor and as lists of addresses. Both are keys: the tensor's own address, and
the list itself, by which this package finds the object they stand for. So no copy of the tensor will do, and code that
is compiled as a whole graph takes `allreduce_fusion` instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from flashinfer.comm.allreduce import TRTLLMAllReduceFusionWorkspace, finalisation, fused, mixed, reduction
from flashinfer.comm.collectives import here, ready
from flashinfer.comm.comm_backend import CommBackend, group_of
from flashinfer.comm.dlpack_utils import memory_at
from flashinfer.comm.fusion import Codes, Norm, factor_of
from flashinfer.core import check

_by_tensor: dict[int, TRTLLMAllReduceFusionWorkspace] = {}
_by_handles: dict[int, tuple[Any, torch.Tensor]] = {}


def trtllm_create_ipc_workspace_for_all_reduce_fusion(
    tp_rank: int,
    tp_size: int,
    max_token_num: int,
    hidden_dim: int,
    use_fp32_lamport: bool = False,
    group: dist.ProcessGroup | None = None,
    create_metadata: bool = False,
    comm_backend: CommBackend | None = None,
    use_symm_dev_mem: bool = False,
) -> tuple[Any, ...]:
    """A workspace for the functions of this module, made by all ranks together.

    Returns (handles, tensor), with create_metadata (handles, tensor, metadata), with use_symm_dev_mem as well (handles,
    tensor, [], metadata): handles is what `trtllm_destroy_ipc_workspace_for_all_reduce_fusion` takes, three lists of
    one number a rank, tensor is `workspace_ptrs`, metadata a dict of the sizes. use_fp32_lamport: for fp32 instead of
    half precision. Errors as for `TRTLLMAllReduceFusionWorkspace`; ValueError for use_symm_dev_mem without metadata.
    """
    if use_symm_dev_mem and not create_metadata:
        got, fix = "True without create_metadata", "Pass create_metadata=True."
        raise ValueError(check.problem("use_symm_dev_mem", got, "both or none", fix))
    dtype = torch.float32 if use_fp32_lamport else torch.float16
    sizes = (max_token_num, hidden_dim, dtype)
    workspace = TRTLLMAllReduceFusionWorkspace(tp_size, tp_rank, *sizes, group=group_of(group, comm_backend))
    tensor = torch.zeros(3 * tp_size + 1, dtype=torch.int64, device=here())
    handles = [[tensor.data_ptr()] * tp_size for _ in range(3)]
    _by_tensor[tensor.data_ptr()] = workspace
    _by_handles[id(handles)] = (handles, tensor)
    metadata = {
        "tp_rank": tp_rank,
        "tp_size": tp_size,
        "max_token_num": max_token_num,
        "hidden_dim": hidden_dim,
        "use_fp32_lamport": use_fp32_lamport,
    }
    if not create_metadata:
        return handles, tensor
    return (handles, tensor, [], metadata) if use_symm_dev_mem else (handles, tensor, metadata)


def trtllm_destroy_ipc_workspace_for_all_reduce_fusion(
    workspace: list[list[int]], group: dist.ProcessGroup | None = None
) -> None:
    """Free a workspace by the handles that its making returned; all ranks call it. The second time it does nothing."""
    _, tensor = _by_handles.pop(id(workspace), (None, None))
    if tensor is not None:
        _by_tensor.pop(tensor.data_ptr()).destroy()


def trtllm_destroy_ipc_workspace_for_all_reduce(
    workspace: list[list[int]], group: dist.ProcessGroup | None = None
) -> None:
    """`trtllm_destroy_ipc_workspace_for_all_reduce_fusion` by its older name."""
    trtllm_destroy_ipc_workspace_for_all_reduce_fusion(workspace, group)


def _workspace(pointers: torch.Tensor, world_size: int, world_rank: int) -> TRTLLMAllReduceFusionWorkspace:
    found = _by_tensor.get(check.tensor("workspace_ptrs", pointers).data_ptr())
    if found is None:
        fix = "Pass the tensor that trtllm_create_ipc_workspace_for_all_reduce_fusion returned, not a copy."
        raise ValueError(check.problem("workspace_ptrs", "a tensor of no workspace", "that of one in use", fix))
    if (world_size, world_rank) != (found.world_size, found.rank):
        got, expected = f"rank {world_rank} of {world_size}", f"rank {found.rank} of {found.world_size}"
        raise ValueError(check.problem("world_size and world_rank", got, expected, "Pass those of the workspace."))
    return found


def _shaped(x: torch.Tensor | None, shape: tuple[int, int], name: str) -> torch.Tensor | None:
    """A tensor that may be flat in two dimensions; one of another size is left to the checks that follow."""
    if x is None or x.numel() != shape[0] * shape[1]:
        return x
    check.contiguous(**{name: x})
    return x.view(shape)


def _norm(
    rows: dict[str, torch.Tensor | None],
    shape: tuple[int, int],
    weight: torch.Tensor | None,
    eps: float,
    weight_bias: float | None,
) -> Norm:
    """rows: the sum, the residual, what it becomes, the norm."""
    output, residual, residual_out, out = (_shaped(x, shape, name) for name, x in rows.items())
    return Norm(output, residual, residual_out, out, weight, eps, weight_bias or 0.0)


def trtllm_allreduce_fusion(
    allreduce_in: torch.Tensor,
    world_size: int,
    world_rank: int,
    token_num: int,
    hidden_dim: int,
    workspace_ptrs: torch.Tensor,
    launch_with_pdl: bool,
    trigger_completion_at_end: bool,
    fp32_acc: bool,
    pattern_code: int,
    use_oneshot: bool | None,
    allreduce_out: torch.Tensor | None,
    residual_in: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    norm_out: torch.Tensor | None,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    rms_gamma: torch.Tensor | None,
    rms_eps: float | None,
    scale_factor: torch.Tensor | float | None,
    layout_code: int | None,
    metadata: dict[str, Any] | None = None,
    block_quant_group_size: int | None = None,
    weight_bias: float | None = None,
) -> None:
    """`allreduce_fusion` of rows `[token_num, hidden_dim]`, flat or not; writes to the outputs that are given.

    workspace_ptrs: of `trtllm_create_ipc_workspace_for_all_reduce_fusion`. metadata is accepted and ignored: the
    workspace knows its sizes. Errors as for `allreduce_fusion`; ValueError for a workspace of other ranks.
    """
    workspace = _workspace(workspace_ptrs, world_size, world_rank)
    comm, shape = workspace.on(allreduce_in.device), (token_num, hidden_dim)
    ready(comm)
    workspace.check_size(token_num, hidden_dim, allreduce_in.dtype)
    rows = {
        "allreduce_out": allreduce_out,
        "residual_in": residual_in,
        "residual_out": residual_out,
        "norm_out": norm_out,
    }
    norm = _norm(rows, shape, rms_gamma, 1e-6 if rms_eps is None else rms_eps, weight_bias)
    if quant_out is not None and quant_out.dtype in check.FP8_DTYPES:
        quant_out = _shaped(quant_out, shape, "quant_out")
    factor = factor_of(scale_factor, allreduce_in.device)
    codes = Codes(quant_out, scale_out, factor, layout_code, block_quant_group_size)
    input = _shaped(allreduce_in, shape, "allreduce_in")
    assert input is not None
    if tuple(input.shape) != shape:
        raise ValueError(check.problem("allreduce_in", f"shape {list(input.shape)}", f"{shape}", "Check token_num."))
    fused(input, pattern_code, norm, codes, comm, use_oneshot)


def trtllm_moe_allreduce_fusion(
    world_size: int,
    world_rank: int,
    token_num: int,
    hidden_dim: int,
    workspace_ptrs: torch.Tensor,
    launch_with_pdl: bool,
    residual_in: torch.Tensor,
    rms_gamma: torch.Tensor,
    rms_eps: float,
    scale_factor: float,
    moe_reduction_device_num_experts: int,
    moe_reduction_scale_input: torch.Tensor,
    moe_reduction_active_experts_token_input: torch.Tensor,
    moe_reduction_token_input: torch.Tensor,
    layout_code: int | None,
    moe_allreduce_out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    norm_out: torch.Tensor | None,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    weight_bias: float | None = None,
    *,
    backend: str = "trtllm",
) -> None:
    """`allreduce_fusion` of kMoEReductionARResidualRMSNorm, its tensors flat or not; backend is ignored.

    quant_out: None, or bytes of two codes of fp4 each, in any dtype, with scale_out and scale_factor.
    """
    workspace = _workspace(workspace_ptrs, world_size, world_rank)
    device, shape = moe_reduction_token_input.device, (token_num, hidden_dim)
    comm = workspace.on(device)
    ready(comm)
    workspace.check_size(token_num, hidden_dim, moe_reduction_token_input.dtype)
    rows = {
        "moe_allreduce_out": moe_allreduce_out,
        "residual_in": residual_in,
        "residual_out": residual_out,
        "norm_out": norm_out,
    }
    norm = _norm(rows, shape, rms_gamma, rms_eps, weight_bias)
    added = _shaped(moe_reduction_token_input, shape, "moe_reduction_token_input")
    experts = (moe_reduction_active_experts_token_input, moe_reduction_scale_input, added)
    codes = Codes(quant_out, scale_out, None if quant_out is None else factor_of(scale_factor, device), layout_code)
    mixed(*reduction(*experts, moe_reduction_device_num_experts), norm, codes, comm)


def trtllm_moe_finalize_allreduce_fusion(
    allreduce_in: torch.Tensor,
    residual_in: torch.Tensor,
    norm_weight: torch.Tensor,
    expanded_idx_to_permuted_idx: torch.Tensor,
    norm_out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    quant_out: torch.Tensor | None,
    scale_out: torch.Tensor | None,
    workspace_ptrs: torch.Tensor,
    launch_with_pdl: bool,
    world_rank: int,
    world_size: int,
    eps: float,
    shared_expert_output: torch.Tensor | None,
    expert_scale_factor: torch.Tensor | None,
    routed_scaling_factor: float | None,
    weight_bias: float | None = None,
    *,
    backend: str = "trtllm",
) -> None:
    """`allreduce_fusion` of kMoEFinalizeARResidualRMSNorm; backend is ignored.

    routed_scaling_factor: of the experts' sum, not of shared_expert_output. quant_out is left alone, as in FlashInfer,
    whose call has neither its scale nor its layout: quantise norm_out.
    """
    workspace = _workspace(workspace_ptrs, world_size, world_rank)
    comm = workspace.on(allreduce_in.device)
    ready(comm)
    factor = 1.0 if routed_scaling_factor is None else float(routed_scaling_factor)
    parts = (expanded_idx_to_permuted_idx, expert_scale_factor, shared_expert_output)
    rows, mix = finalisation(allreduce_in, *parts, factor)
    workspace.check_size(mix.num_rows, rows.shape[1], rows.dtype)
    norm = Norm(None, residual_in, residual_out, norm_out, norm_weight, eps, weight_bias or 0.0)
    mixed(rows, mix, norm, Codes(None, None, None), comm)


def compute_fp4_swizzled_layout_sf_size(total_row: int, total_column: int) -> int:
    """Scales of that many rows and blocks in tiles of 128 x 4, padding included."""
    return -(-total_row // 128) * 128 * (-(-total_column // 4) * 4)


def trtllm_lamport_initialize(buffer_ptr: int, size: int, dtype: torch.dtype) -> None:
    """Fill `size` numbers of `dtype` at an address with -0.0, on the current GPU, on the CPU where there is none.

    The workspaces of this package need no such call: they are made that way.
    """
    check.choice("dtype", dtype, check.FLOAT_DTYPES)
    memory_at(buffer_ptr, size * dtype.itemsize, here()).view(dtype).fill_(-0.0)


def trtllm_lamport_initialize_all(
    buffer_0_ptr: int, buffer_1_ptr: int, buffer_2_ptr: int, size: int, dtype: torch.dtype
) -> None:
    """`trtllm_lamport_initialize` of three buffers."""
    for address in (buffer_0_ptr, buffer_1_ptr, buffer_2_ptr):
        trtllm_lamport_initialize(address, size, dtype)
