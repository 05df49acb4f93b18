"""FlashInfer's communication API on torch.distributed process groups; see docs/communication.md."""

from flashinfer.comm.decode_cp import (
    decode_cp_a2a_alltoall,
    decode_cp_a2a_init_workspace,
    decode_cp_a2a_lse_reduce,
    decode_cp_a2a_lse_reduce_create_workspace,
    decode_cp_a2a_lse_reduce_workspace_size,
    decode_cp_a2a_workspace_size,
    merge_over_ranks,
)
from flashinfer.comm.mapping import Mapping
from flashinfer.comm.ring import RingPlan, plan_ring, ring_attention, zigzag
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

__all__ = [
    "Mapping",
    "RingPlan",
    "UlyssesBackendDecision",
    "UlyssesBackendError",
    "UlyssesCommunicator",
    "UlyssesRankTopology",
    "UlyssesWorkspace",
    "decide_ulysses_backend",
    "decode_cp_a2a_alltoall",
    "decode_cp_a2a_init_workspace",
    "decode_cp_a2a_lse_reduce",
    "decode_cp_a2a_lse_reduce_create_workspace",
    "decode_cp_a2a_lse_reduce_workspace_size",
    "decode_cp_a2a_workspace_size",
    "dispose_ulysses_a2a",
    "init_ulysses_a2a",
    "merge_over_ranks",
    "merge_ulysses_output_head_chunk",
    "pack_ulysses_qkv_head_chunk",
    "plan_ring",
    "probe_ulysses_rank_topology",
    "resolve_ulysses_backend",
    "ring_attention",
    "ulysses_a2a",
    "zigzag",
]
