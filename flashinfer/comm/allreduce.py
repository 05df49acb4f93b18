"""All-reduce with what goes around it, with FlashInfer's names and signatures.

`launch_with_pdl`, `trigger_completion_at_end` and `fp32_acc` are accepted and ignored: nothing here is launched early,
and sums are fp32 anyway. All kinds of workspace are one implementation (`flashinfer.ops.collectives`), without
multicast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from flashinfer.comm.collectives import CommWorkspace, here, ready
from flashinfer.comm.comm_backend import CommBackend, TorchDistBackend, group_of
from flashinfer.comm.fusion import Codes, Norm, factor_of, run, run_mixed, two_shot
from flashinfer.comm.mapping import Mapping
from flashinfer.comm.patterns import FUSIONS, MOE_PATTERNS, AllReduceFusionPattern
from flashinfer.core import check
from flashinfer.core.peers import Peers
from flashinfer.ops import collectives as ops

FP8 = torch.float8_e4m3fn


class AllReduceFusionWorkspace:
    """What the ranks of a group hold between calls of `allreduce_fusion`; all of them make it and destroy it together.

    One for tensors on a GPU is made at once where there are GPUs, one for the CPU at the first call with its tensors.
    """

    backend = ""

    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.rank = world_size, rank
        self.max_token_num = self.hidden_dim = 0
        self.dtype = torch.float16
        self.group: dist.ProcessGroup | None = None
        self._places: dict[str, CommWorkspace] = {}
        self._destroyed = False

    def _open(self, group: dist.ProcessGroup | None, max_token_num: int, hidden_dim: int, dtype: torch.dtype) -> None:
        check.positive("max_token_num", max_token_num)
        check.positive("hidden_dim", hidden_dim)
        check.choice("dtype", dtype, check.FLOAT_DTYPES)
        self.max_token_num, self.hidden_dim, self.dtype, self.group = max_token_num, hidden_dim, dtype, group
        device = here()
        peers = Peers(group, device)
        if (self.world_size, self.rank) != (peers.world_size, peers.rank):
            got = f"rank {self.rank} of {self.world_size}"
            expected = f"the group's: rank {peers.rank} of {peers.world_size}"
            raise ValueError(check.problem("world_size and rank", got, expected, "Pass the group they are of."))
        values = {"max_token_num": max_token_num, "hidden_dim": hidden_dim, "dtype": dtype}
        peers.exchange("create_allreduce_fusion_workspace", **values)
        if device.type == "cuda":
            ops.reserve(self.on(device), dtype, hidden_dim)

    def on(self, device: torch.device) -> CommWorkspace:
        """The memory for tensors on `device`."""
        if self._destroyed:
            raise RuntimeError(check.problem("workspace", "a destroyed one", "one in use", "Make a new workspace."))
        found = self._places.get(device.type)
        if found is None:
            found = self._places[device.type] = CommWorkspace(self.group, device, self._max_bytes)
        return found

    @property
    def _max_bytes(self) -> int:
        return self.max_token_num * self.hidden_dim * self.dtype.itemsize

    def is_buffer_size_sufficient(
        self, tp_size: int, num_tokens: int, hidden_dim: int, dtype: torch.dtype, use_oneshot: bool | None = None
    ) -> bool:
        """Whether it was made for that many ranks and for tensors of that many bytes."""
        num_bytes = num_tokens * hidden_dim * dtype.itemsize
        return tp_size == self.world_size and num_bytes <= self._max_bytes

    def check_size(self, num_tokens: int, hidden_dim: int, dtype: torch.dtype) -> None:
        """Raise ValueError for more than it was made for."""
        if not self.is_buffer_size_sufficient(self.world_size, num_tokens, hidden_dim, dtype):
            got = f"{num_tokens} tokens of {hidden_dim} {dtype}"
            expected = f"at most {self.max_token_num} tokens of {self.hidden_dim} {self.dtype}, as many bytes"
            raise ValueError(check.problem("input", got, expected, "Make the workspace for the largest tensor."))

    def checkpoint_prepare(self) -> None:
        """Not there: memory of torch's symmetric allocator cannot be given back and keep its addresses."""
        fix = "Destroy the workspace before the checkpoint, make a new one after it, and capture graphs again."
        raise NotImplementedError(f"checkpoints of a workspace that keep its addresses are not possible here. {fix}")

    def checkpoint_restore(self, comm_backend: CommBackend) -> None:
        """Not there: see `checkpoint_prepare`."""
        self.checkpoint_prepare()

    def destroy(self) -> None:
        """Wait for the work of all ranks and free the memory; the second time it does nothing."""
        if not self._destroyed:
            self._destroyed = True
            for workspace in self._places.values():
                workspace.destroy()
            self._places.clear()


class TRTLLMAllReduceFusionWorkspace(AllReduceFusionWorkspace):
    """The workspace of backend "trtllm"; group or comm_backend name the ranks, by default the whole world.

    max_token_num, hidden_dim, dtype: of the largest tensor; smaller ones and others of as many bytes fit as well.
    Raises RuntimeError without a process group, ValueError where tp_size and tp_rank are not the group's.
    """

    backend = "trtllm"

    def __init__(
        self,
        tp_size: int,
        tp_rank: int,
        max_token_num: int,
        hidden_dim: int,
        dtype: torch.dtype = torch.float16,
        comm_backend: CommBackend | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(tp_size, tp_rank)
        self._open(group_of(group, comm_backend), max_token_num, hidden_dim, dtype)


class MNNVLAllReduceFusionWorkspace(AllReduceFusionWorkspace):
    """The workspace of backend "mnnvl": the same memory as that of "trtllm", without multicast.

    buffer_size_in_bytes: in place of the three before it. Errors as for `TRTLLMAllReduceFusionWorkspace`.
    """

    backend = "mnnvl"

    def __init__(
        self,
        mapping: Mapping,
        max_num_tokens: int | None = None,
        hidden_dim: int | None = None,
        dtype: torch.dtype | None = None,
        buffer_size_in_bytes: int | None = None,
        comm_backend: CommBackend | None = None,
    ) -> None:
        super().__init__(mapping.tp_size, mapping.tp_rank)
        dtype = torch.float16 if dtype is None else dtype
        if buffer_size_in_bytes is not None:
            hidden_dim = hidden_dim or 8
            max_num_tokens = max(buffer_size_in_bytes // (hidden_dim * dtype.itemsize), 1)
        self._open(group_of(None, comm_backend), max_num_tokens or 0, hidden_dim or 0, dtype)


BACKENDS = ("auto", "trtllm", "mnnvl")


def create_allreduce_fusion_workspace(
    backend: str = "auto",
    world_size: int | None = None,
    rank: int | None = None,
    max_token_num: int | None = None,
    hidden_dim: int | None = None,
    dtype: torch.dtype | None = None,
    gpus_per_node: int | None = None,
    comm_backend: CommBackend | None = None,
    force_oneshot_support: bool = False,
    group: dist.ProcessGroup | None = None,
    *,
    top_k: int | None = None,
    rms_eps: float | None = None,
    weight_bias: float | None = None,
    routed_scaling_factor: float | None = None,
    include_shared_expert: bool | None = None,
    add_residual: bool | None = None,
    write_residual_output: bool | None = None,
    apply_rms_norm: bool | None = None,
    output_dtype: torch.dtype | None = None,
    dynamic_fp8: bool | None = None,
    write_norm_output: bool | None = None,
    config: Any = None,
) -> AllReduceFusionWorkspace:
    """The workspace for `allreduce_fusion`; every rank makes it at the same time, outside of CUDA graphs.

    backend: "trtllm" or "mnnvl" (the same implementation here), "auto" is "trtllm". world_size, rank: of the group, and
    by default its. max_token_num, hidden_dim, dtype (by default fp16): of the largest tensor. group, comm_backend: the
    ranks, by default the whole world; a gloo group will do for tensors on GPUs. gpus_per_node and force_oneshot_support
    are accepted and ignored, as are the keyword-only arguments, which FlashInfer compiles its "mnnvl-cutedsl" backend
    for. Raises ValueError for another backend and for sizes that are missing, PeerError where ranks disagree.
    """
    check.choice("backend", backend, BACKENDS)
    group = group_of(group, comm_backend)
    world_size = dist.get_world_size(group) if world_size is None else world_size
    rank = dist.get_rank(group) if rank is None else rank
    dtype = torch.float16 if dtype is None else dtype
    sizes = (max_token_num or 0, hidden_dim or 0, dtype)
    if backend == "mnnvl":
        mapping = Mapping(world_size, rank, tp_size=world_size)
        return MNNVLAllReduceFusionWorkspace(mapping, *sizes, comm_backend=TorchDistBackend(group))
    return TRTLLMAllReduceFusionWorkspace(world_size, rank, *sizes, group=group)


def allreduce_fusion(
    input: torch.Tensor,
    workspace: AllReduceFusionWorkspace,
    pattern: int,
    launch_with_pdl: bool = False,
    trigger_completion_at_end: bool = True,
    output: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    quant_out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    residual_in: torch.Tensor | None = None,
    rms_gamma: torch.Tensor | None = None,
    rms_eps: float = 1e-6,
    scale_factor: torch.Tensor | float | None = None,
    layout_code: int | None = None,
    use_oneshot: bool | None = None,
    fp32_acc: bool = False,
    moe_reduction_device_num_experts: int | None = None,
    moe_reduction_scale_input: torch.Tensor | None = None,
    moe_reduction_active_experts_token_input: torch.Tensor | None = None,
    moe_reduction_token_input: torch.Tensor | None = None,
    expanded_idx_to_permuted_idx: torch.Tensor | None = None,
    expert_scale_factor: torch.Tensor | None = None,
    shared_expert_output: torch.Tensor | None = None,
    block_quant_group_size: int | None = None,
    weight_bias: float = 0.0,
    *,
    moe_finalize_backend: str = "trtllm",
) -> torch.Tensor:
    """The sum of `input` over the ranks, and what `pattern` (`AllReduceFusionPattern`) asks for, in one kernel.

    With s the sum in fp32: `output = s`; `residual_out = r = s + residual_in`; `norm_out = y = r / sqrt(mean(r^2) +
    eps) * (rms_gamma + weight_bias)`; fp8: `quant_out = y / scale_factor`; fp8 by rows: `quant_out = y / scale_out`,
    chosen for the largest of a row; fp4 and fp8 by groups take y as rounded into norm_out, in launches of their own.
    Of the patterns for experts what is summed is made before: `kMoEReduction...` takes `moe_reduction_token_input + sum
    over experts e of scale_input[e] * active_experts_token_input[e]`, `kMoEFinalize...` takes `shared_expert_output +
    sum over k of expert_scale_factor[:, k] * input[expanded_idx_to_permuted_idx[:, k]]`, entries below 0 left out.

    input: `[num_tokens, hidden_size]`, of the last pattern `[rows, hidden_size]`; fp32, fp16 or bf16. residual_in and
    the outputs but quant_out and scale_out: of `[num_tokens, hidden_size]` and input's dtype. rms_gamma:
    `[hidden_size]`, any float dtype. All contiguous. norm_out and output may be input, residual_out may be residual_in
    or input. residual_in: None adds nothing. residual_out, output: written if given. quant_out: fp8 of input's shape,
    made where it is missing and one scale will do; fp4: bytes of two codes each. scale_factor: fp32 of one element, or
    a number, which costs a launch; None: 1. scale_out: fp32 `[num_tokens, 1]` (by rows), bytes of e4m3 in the order
    `layout_code` (fp4; `QuantizationSFLayout`, by default 128x4), int32 exponents of strides `(1, num_tokens rounded up
    to 4)` (by groups of `block_quant_group_size`). moe_reduction_scale_input: fp32 `[experts, num_tokens]`,
    active_experts_token_input `[experts * num_tokens, hidden_size]`; expert_scale_factor and
    expanded_idx_to_permuted_idx (int32): `[num_tokens, top_k]`. use_oneshot: None leaves the algorithm to the size.
    moe_finalize_backend is accepted and ignored.

    Returns quant_out of a pattern with codes, else norm_out, of kAllReduce output; made where they are missing.
    Raises ValueError for wrong arguments and more than the workspace was made for, PeerError for what other ranks did
    wrong (on a GPU: in an earlier call), RuntimeError for a destroyed workspace.
    """
    check.tensor("input", input)
    comm = workspace.on(input.device)
    ready(comm)
    norm = Norm(output, residual_in, residual_out, norm_out, rms_gamma, rms_eps, weight_bias)
    codes = Codes(quant_out, scale_out, factor_of(scale_factor, input.device), layout_code, block_quant_group_size)
    if pattern in MOE_PATTERNS:
        if pattern == AllReduceFusionPattern.kMoEReductionARResidualRMSNorm:
            experts = (moe_reduction_active_experts_token_input, moe_reduction_scale_input, moe_reduction_token_input)
            rows, mix = reduction(*experts, moe_reduction_device_num_experts)
        else:
            rows, mix = finalisation(input, expanded_idx_to_permuted_idx, expert_scale_factor, shared_expert_output)
        workspace.check_size(mix.num_rows, rows.shape[-1], rows.dtype)
        return mixed(rows, mix, norm, codes, comm)
    check.tensor("input", input, shape=(None, None))
    workspace.check_size(input.shape[0], input.shape[1], input.dtype)
    return fused(input, pattern, norm, codes, comm, use_oneshot)


def _given(**tensors: torch.Tensor | None) -> None:
    """Check that what a pattern needs is there."""
    for name, x in tensors.items():
        if x is None:
            raise ValueError(check.problem(name, "None", "a tensor, which this pattern needs", f"Pass {name}."))


def fused(
    input: torch.Tensor, pattern: int, norm: Norm, codes: Codes, comm: ops.Workspace, use_oneshot: bool | None
) -> torch.Tensor:
    """`allreduce_fusion` of the patterns that sum up input's rows as they are."""
    fusion = FUSIONS.get(pattern)
    if fusion is None:
        known = ", ".join(map(str, (*FUSIONS, *MOE_PATTERNS)))
        fix = "Pass one of AllReduceFusionPattern."
        raise ValueError(check.problem("pattern", repr(pattern), f"one of {known}", fix))
    result = norm.output
    if not fusion.norm:
        result = torch.empty_like(input) if result is None else result
        run(fusion, input, Norm(result, None, None, None, None), codes, comm, two_shot(use_oneshot))
        return result
    _given(rms_gamma=norm.weight)
    if fusion.keeps_norm and norm.out is None:
        norm = norm._replace(out=torch.empty_like(input))
    if fusion.codes == "fp8" and codes.out is None:
        codes = codes._replace(out=torch.empty_like(input, dtype=FP8))
    if fusion.codes:
        _given(quant_out=codes.out)
    if fusion.codes not in ("", "fp8"):
        _given(scale_out=codes.scales)
    run(fusion, input, norm, codes, comm, two_shot(use_oneshot))
    result = codes.out if fusion.codes else norm.out
    assert result is not None
    return result


def reduction(
    rows: torch.Tensor | None, scales: torch.Tensor | None, added: torch.Tensor | None, num_experts: int | None
) -> tuple[torch.Tensor, ops.Mix]:
    """(the experts' rows in two dimensions, how they are summed up) of the reduction over a rank's active experts."""
    names = ("active_experts_token_input", "scale_input", "token_input")
    _given(**{f"moe_reduction_{name}": x for name, x in zip(names, (rows, scales, added), strict=True)})
    assert rows is not None and scales is not None and added is not None
    count = check.positive("moe_reduction_device_num_experts", num_experts or 0)
    check.tensor("moe_reduction_token_input", added, shape=(None, None))
    num_tokens, hidden_size = added.shape
    for name, x, size in ((names[0], rows, added.numel()), (names[1], scales, num_tokens)):
        if x.numel() != count * size:
            expected = f"{count * size}: {count} experts, {num_tokens} tokens, hidden_size {hidden_size}"
            fix = "Check moe_reduction_device_num_experts."
            raise ValueError(check.problem(f"moe_reduction_{name}", f"{x.numel()} elements", expected, fix))
    if scales.dim() > 1:
        check.tensor("moe_reduction_scale_input", scales, shape=(count, num_tokens))
    check.contiguous(moe_reduction_active_experts_token_input=rows, moe_reduction_scale_input=scales)
    mix = ops.Mix(num_tokens, count, None, scales.view(count, num_tokens), added)
    return rows.view(-1, hidden_size), mix


def finalisation(
    rows: torch.Tensor,
    table: torch.Tensor | None,
    scales: torch.Tensor | None,
    shared: torch.Tensor | None,
    factor: float = 1.0,
) -> tuple[torch.Tensor, ops.Mix]:
    """(rows, how they are summed up) of the gathering of each token's experts; factor: of all of them."""
    _given(expanded_idx_to_permuted_idx=table)
    assert table is not None
    check.tensor("expanded_idx_to_permuted_idx", table, shape=(None, None))
    check.tensor("input", rows, shape=(None, None))
    return rows, ops.Mix(table.shape[0], table.shape[1], table, scales, shared, factor)


def mixed(rows: torch.Tensor, mix: ops.Mix, norm: Norm, codes: Codes, comm: ops.Workspace) -> torch.Tensor:
    """`allreduce_fusion` of the patterns for experts; fp4 codes of the norm where quant_out is given."""
    _given(residual_in=norm.residual, rms_gamma=norm.weight)
    if codes.out is not None:
        _given(scale_out=codes.scales)
    elif norm.out is None:
        norm = norm._replace(out=rows.new_empty(mix.num_rows, rows.shape[1]))
    run_mixed(rows, mix, norm, codes if codes.out is not None else None, comm)
    result = codes.out if norm.out is None else norm.out
    assert result is not None
    return result
