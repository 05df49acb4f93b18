"""FlashInfer's communication API on torch.distributed process groups; see docs/communication.md."""

from flashinfer.comm.all_gather_matmul import (
    all_gather_matmul,
    prepare_all_gather_matmul,
)
from flashinfer.comm.allreduce import (
    AllReduceFusionWorkspace,
    MNNVLAllReduceFusionWorkspace,
    TRTLLMAllReduceFusionWorkspace,
    allreduce_fusion,
    create_allreduce_fusion_workspace,
)
from flashinfer.comm.alltoall import combine, dispatch, expert_parallel_moe, make_room
from flashinfer.comm.collectives import (
    CommWorkspace,
    all_gather,
    all_reduce,
    all_reduce_fp8,
    reduce_scatter,
)
from flashinfer.comm.cuda_ipc import (
    CudaRTLibrary,
    create_shared_buffer,
    free_shared_buffer,
)
from flashinfer.comm.decode_cp import (
    decode_cp_a2a_alltoall,
    decode_cp_a2a_init_workspace,
    decode_cp_a2a_lse_reduce,
    decode_cp_a2a_lse_reduce_create_workspace,
    decode_cp_a2a_lse_reduce_workspace_size,
    decode_cp_a2a_workspace_size,
    merge_over_ranks,
)
from flashinfer.comm.dlpack_utils import (
    pack_strided_memory,
)
from flashinfer.comm.mapping import Mapping
from flashinfer.comm.moe_alltoall import (
    MoeAlltoAll,
    moe_a2a_active_rank_mask,
    moe_a2a_combine,
    moe_a2a_dispatch,
    moe_a2a_get_workspace_size_per_rank,
    moe_a2a_initialize,
    moe_a2a_sanitize_expert_ids,
    moe_a2a_wrap_payload_tensor_in_workspace,
)
from flashinfer.comm.patterns import (
    AllReduceFusionOp,
    AllReduceFusionPattern,
    AllReduceStrategyConfig,
    AllReduceStrategyType,
    QuantizationSFLayout,
)
from flashinfer.comm.quantized_allreduce import (
    quantized_all_reduce,
)
from flashinfer.comm.ring import RingPlan, plan_ring, ring_attention, zigzag
from flashinfer.comm.trtllm_ar import (
    compute_fp4_swizzled_layout_sf_size,
    trtllm_allreduce_fusion,
    trtllm_create_ipc_workspace_for_all_reduce_fusion,
    trtllm_destroy_ipc_workspace_for_all_reduce,
    trtllm_destroy_ipc_workspace_for_all_reduce_fusion,
    trtllm_lamport_initialize,
    trtllm_lamport_initialize_all,
    trtllm_moe_allreduce_fusion,
    trtllm_moe_finalize_allreduce_fusion,
)
from flashinfer.comm.ulysses import (
    UlyssesCommunicator,
    UlyssesWorkspace,
    dispose_ulysses_a2a,
    init_ulysses_a2a,
    merge_ulysses_output_head_chunk,
    pack_ulysses_qkv_head_chunk,
    ulysses_a2a,
)
from flashinfer.comm.ulysses_topology import (
    UlyssesBackendDecision,
    UlyssesBackendError,
    UlyssesRankTopology,
    decide_ulysses_backend,
    probe_ulysses_rank_topology,
    resolve_ulysses_backend,
)
from flashinfer.comm.vllm_ar import (
    all_reduce as vllm_all_reduce,
)
from flashinfer.comm.vllm_ar import (
    dispose as vllm_dispose,
)
from flashinfer.comm.vllm_ar import (
    get_graph_buffer_ipc_meta as vllm_get_graph_buffer_ipc_meta,
)
from flashinfer.comm.vllm_ar import (
    init_custom_ar as vllm_init_custom_ar,
)
from flashinfer.comm.vllm_ar import (
    meta_size as vllm_meta_size,
)
from flashinfer.comm.vllm_ar import (
    register_buffer as vllm_register_buffer,
)
from flashinfer.comm.vllm_ar import (
    register_graph_buffers as vllm_register_graph_buffers,
)

__all__ = [
    "AllReduceFusionOp",
    "AllReduceFusionPattern",
    "AllReduceFusionWorkspace",
    "AllReduceStrategyConfig",
    "AllReduceStrategyType",
    "CommWorkspace",
    "CudaRTLibrary",
    "MNNVLAllReduceFusionWorkspace",
    "Mapping",
    "MoeAlltoAll",
    "QuantizationSFLayout",
    "RingPlan",
    "TRTLLMAllReduceFusionWorkspace",
    "UlyssesBackendDecision",
    "UlyssesBackendError",
    "UlyssesCommunicator",
    "UlyssesRankTopology",
    "UlyssesWorkspace",
    "all_gather",
    "all_gather_matmul",
    "all_reduce",
    "all_reduce_fp8",
    "allreduce_fusion",
    "combine",
    "compute_fp4_swizzled_layout_sf_size",
    "create_allreduce_fusion_workspace",
    "create_shared_buffer",
    "decide_ulysses_backend",
    "decode_cp_a2a_alltoall",
    "decode_cp_a2a_init_workspace",
    "decode_cp_a2a_lse_reduce",
    "decode_cp_a2a_lse_reduce_create_workspace",
    "decode_cp_a2a_lse_reduce_workspace_size",
    "decode_cp_a2a_workspace_size",
    "dispatch",
    "dispose_ulysses_a2a",
    "expert_parallel_moe",
    "free_shared_buffer",
    "init_ulysses_a2a",
    "make_room",
    "merge_over_ranks",
    "merge_ulysses_output_head_chunk",
    "moe_a2a_active_rank_mask",
    "moe_a2a_combine",
    "moe_a2a_dispatch",
    "moe_a2a_get_workspace_size_per_rank",
    "moe_a2a_initialize",
    "moe_a2a_sanitize_expert_ids",
    "moe_a2a_wrap_payload_tensor_in_workspace",
    "pack_strided_memory",
    "pack_ulysses_qkv_head_chunk",
    "plan_ring",
    "prepare_all_gather_matmul",
    "probe_ulysses_rank_topology",
    "quantized_all_reduce",
    "reduce_scatter",
    "resolve_ulysses_backend",
    "ring_attention",
    "trtllm_allreduce_fusion",
    "trtllm_create_ipc_workspace_for_all_reduce_fusion",
    "trtllm_destroy_ipc_workspace_for_all_reduce",
    "trtllm_destroy_ipc_workspace_for_all_reduce_fusion",
    "trtllm_lamport_initialize",
    "trtllm_lamport_initialize_all",
    "trtllm_moe_allreduce_fusion",
    "trtllm_moe_finalize_allreduce_fusion",
    "ulysses_a2a",
    "vllm_all_reduce",
    "vllm_dispose",
    "vllm_get_graph_buffer_ipc_meta",
    "vllm_init_custom_ar",
    "vllm_meta_size",
    "vllm_register_buffer",
    "vllm_register_graph_buffers",
    "zigzag",
]
