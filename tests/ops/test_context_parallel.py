"""Attention over ranks against attention of one: merging states, rings of KV, heads for tokens, and what goes wrong."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import flashinfer
from flashinfer import comm
from flashinfer.core import peers
from flashinfer.ops import context_parallel
from flashinfer.testing import (
    AttentionOptions,
    assert_close_to_oracle,
    assert_lse_close_to_oracle,
    attention,
    attention_noise,
)
from tests.conftest import poisoning
from tests.ops.common import force, skip_unless_runs
from tests.ranks import outcomes, run_ranks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def poison() -> None:
    """What the fixture does for a test's own process."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, poisoning(getattr(owner, name)))


def shares(total: int, parts: int, empty: bool) -> list[int]:
    """Uneven lengths that add up to total, drawn alike on all ranks; the first is 0 if `empty`, else none is."""
    cuts = sorted(int(x) + 1 for x in torch.randperm(total - 1)[: parts - 1 - empty])
    lengths = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    return [0, *lengths] if empty else lengths


def rows_of(x: torch.Tensor, lengths: list[int], index: int) -> torch.Tensor:
    return x.split(lengths)[index]


def problem(qo_len: int, kv_len: int, dtype: torch.dtype, device: torch.device, dims: tuple[int, int]) -> QKV:
    """The whole problem, the same on all ranks; q has a stride of its own."""
    q = torch.randn(qo_len, 4, dims[0] + 8, device=device).to(dtype)[..., :-8]
    k, v = (torch.randn(kv_len, 2, dim, device=device).to(dtype) for dim in dims)
    return q, k, v


def compare(got: tuple[torch.Tensor, torch.Tensor], qkv: QKV, causal: bool, rows: torch.Tensor, name: str) -> None:
    """Rows of attention over everything; the twin is attention in one piece in the dtype."""
    options = AttentionOptions(causal=causal)
    (o, lse), (twin, twin_lse) = (attention(*qkv, options, dtype) for dtype in (torch.float64, qkv[0].dtype))
    noise, lse_noise = attention_noise(*qkv, options, qkv[0].dtype)
    # Parts are rounded before they are merged; their weighted sizes add up to at most attention over |v|.
    noise += torch.finfo(qkv[0].dtype).eps / 2 * attention(*qkv[:2], qkv[2].abs(), options, torch.float64)[0]
    assert got[0].dtype == qkv[0].dtype and got[1].dtype == torch.float32
    assert_close_to_oracle(got[0], o[rows], twin[rows], name, noise[rows])
    assert_lse_close_to_oracle(got[1], lse[rows], twin_lse[rows], name, lse_noise[rows])


# --- what each rank does in one run -----------------------------------------------------------------------------------


def check_ring(rank: int, world_size: int, device: torch.device) -> None:
    for dtype, empty in itertools.product(DTYPES, (False, True)):
        # With `empty` a rank has no queries and another no KV.
        qo_lens, kv_lens = shares(23, world_size, empty), shares(37, world_size, empty)[::-1]
        qkv = problem(23, 37, dtype, device, (24, 16))
        q, (k, v) = rows_of(qkv[0], qo_lens, rank), (rows_of(x, kv_lens, rank) for x in qkv[1:])
        first = sum(qo_lens[:rank])
        got = comm.ring_attention(q, k, v, return_lse=True)
        compare(got, qkv, False, torch.arange(first, first + len(q)), f"full, {dtype}")

        lengths = shares(35, world_size, empty)
        qkv = problem(35, 35, dtype, device, (16, 16))
        own = [rows_of(x, lengths, rank) for x in qkv]
        first = sum(lengths[:rank])
        before = [x.clone() for x in own]
        plan = comm.plan_ring(tuple(own), causal=True)
        for _ in range(2):
            got = comm.ring_attention(*own, plan=plan, return_lse=True)
            compare(got, qkv, True, torch.arange(first, first + len(own[0])), f"causal, {dtype}")
        assert all(x.equal(then) for x, then in zip(own, before, strict=True))

        pieces = [3 + (5 * i) % 4 for i in range(2 * world_size)]
        qkv = problem(sum(pieces), sum(pieces), dtype, device, (16, 16))
        chunks = comm.zigzag(pieces, rank, world_size)
        places = torch.arange(sum(pieces)).split(pieces)
        rows = torch.cat([places[number] for number, _ in chunks])
        got = comm.ring_attention(*(x[rows] for x in qkv), causal=True, chunks=chunks, return_lse=True)
        compare(got, qkv, True, rows, f"zigzag, {dtype}")


def partial_state(qkv: QKV, lengths: list[int], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over this rank's KV; NaN where it has none, which nothing may read."""
    q, (k, v) = qkv[0], (rows_of(x, lengths, rank) for x in qkv[1:])
    if not len(k):
        return q.new_full((*q.shape[:2], v.shape[2]), math.nan), q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    return flashinfer.single_prefill_with_kv_cache(q, k, v, return_lse=True)


def check_merge(rank: int, world_size: int, device: torch.device) -> list[bytes]:
    bits = []
    for dtype, empty in itertools.product(DTYPES, (True, False)):
        lengths, heads = shares(41, world_size, empty), 4 * world_size
        q = torch.randn(6, heads, 16, device=device).to(dtype)
        k, v = (torch.randn(41, world_size, dim, device=device).to(dtype) for dim in (16, 24))
        qkv = (q, k, v)
        o, lse = partial_state(qkv, lengths, rank)
        got = comm.merge_over_ranks(o, lse)
        compare_merged(got, qkv, lengths, slice(None), f"all heads, {dtype}")
        bits.append(bytes(got[0].view(torch.uint8).flatten().tolist()))
        own = slice(rank * 4, rank * 4 + 4)
        got = comm.merge_over_ranks(o, lse, split_heads=True)
        assert got[0].shape == (6, 4, 24)
        compare_merged(got, qkv, lengths, own, f"own heads, {dtype}")

        # FlashInfer's calls: `[..., cp_size, head_dim]`, one slice for each rank.
        workspace = comm.decode_cp_a2a_lse_reduce_create_workspace(6, 5, world_size, 24, dtype, None)
        by_rank = o.unflatten(1, (world_size, 4)).transpose(1, 2)
        lse_by_rank = lse.unflatten(1, (world_size, 4)).transpose(1, 2)
        for mode, factor in (("base2", 1.0), ("basee", math.log(2))):
            out = comm.decode_cp_a2a_lse_reduce(by_rank, lse_by_rank * factor, workspace, rank, world_size, mode)
            compare_merged((out, got[1]), qkv, lengths, own, f"lse_reduce, {mode}, {dtype}")
        check_alltoall(rank, world_size, device, dtype)
    empty = comm.merge_over_ranks(o[:0], lse[:0], split_heads=True)
    assert empty[0].shape == (0, 4, 24) and empty[1].shape == (0, 4)
    return bits


def compare_merged(
    got: tuple[torch.Tensor, torch.Tensor], qkv: QKV, lengths: list[int], heads: slice, name: str
) -> None:
    """The twin rounds its partial results to the dtype, as they are sent."""
    options, dtype = AttentionOptions(), qkv[0].dtype
    o, lse = attention(*qkv, options, torch.float64)
    parts = []
    for index, length in enumerate(lengths):
        if length:
            mine = [rows_of(x, lengths, index) for x in qkv[1:]]
            part, part_lse = attention(qkv[0], *mine, options, torch.float64)
            parts.append((part.to(dtype).double(), part_lse))
    weights = torch.stack([torch.exp2(part_lse - lse) for _, part_lse in parts])
    twin = (torch.stack([part for part, _ in parts]) * weights[..., None]).sum(0).to(dtype)
    noise, lse_noise = attention_noise(*qkv, options, dtype)
    assert_close_to_oracle(got[0], o[:, heads], twin[:, heads], name, noise[:, heads])
    assert_lse_close_to_oracle(got[1], lse[:, heads], lse[:, heads].float(), name, lse_noise[:, heads])


def check_alltoall(rank: int, world_size: int, device: torch.device, dtype: torch.dtype) -> None:
    workspace = torch.ones(world_size, comm.decode_cp_a2a_workspace_size(world_size) // 8, dtype=torch.int64)
    comm.decode_cp_a2a_init_workspace(workspace, rank, world_size)
    assert not workspace[rank].any() and workspace.sum() == world_size - 1
    o = torch.randn(world_size, 3, 2, world_size, 8, device=device).to(dtype)
    stats = torch.randn(world_size, 3, 2, world_size, 2, device=device)
    want = [x.select(-2, rank).movedim(0, -2) for x in (o, stats)]
    got = comm.decode_cp_a2a_alltoall(o[rank], stats[rank], workspace, rank, world_size)
    out = tuple(torch.full_like(x[rank], math.nan) for x in (o, stats))
    again = comm.decode_cp_a2a_alltoall(o[rank], stats[rank], workspace, rank, world_size, out=out)
    assert all(x.equal(y) for x, y in zip((*got, *again), (*want, *want), strict=True))
    assert again[0] is out[0] and again[1] is out[1]


def check_ulysses(rank: int, world_size: int, device: torch.device) -> None:
    for dtype, batch in zip(DTYPES, (1, 2, 3), strict=True):
        local, heads, dim = 5, 3, 8
        full = torch.randn(3, batch, local * world_size, heads * world_size, dim, device=device).to(dtype)
        mine, own = full[:, :, rank * local : (rank + 1) * local], slice(rank * heads, (rank + 1) * heads)
        limit = 3 * mine[0].numel()
        with comm.UlyssesCommunicator(max_elems=limit, dtype=dtype, device=device) as ranks:
            assert (ranks.rank, ranks.world_size, ranks.backend) == (rank, world_size, "nccl")
            assert "kernels" in str(ranks.fallback_reason)
            workspace = ranks.create_workspace()
            for room in (None, workspace):
                got = ranks.scatter_heads(mine[0], workspace=room)
                assert got.equal(full[0][:, :, own])
                out = torch.full_like(mine[0], math.nan)
                assert ranks.gather_heads(full[0][:, :, own], out=out, workspace=room) is out
                assert out.equal(mine[0])
                assert ranks.gather_heads(full[0][:, :, own], workspace=room).equal(mine[0])
                check_bands(ranks, full, mine, own, room)
            end_to_end(ranks, rank, dtype, device)
        with pytest.raises(RuntimeError, match="closed"):
            ranks.scatter_heads(mine[0])
    handle = comm.init_ulysses_a2a([0] * world_size, [0] * world_size, rank, world_size, True)
    out = torch.full_like(full[0][:, :, own], math.nan)
    sizes = (batch, local, heads * world_size, dim)
    comm.ulysses_a2a(handle, mine[0].contiguous(), out, *sizes, 0)
    assert out.equal(full[0][:, :, own])
    back = torch.full_like(mine[0], math.nan)
    comm.ulysses_a2a(handle, out, back, *sizes, 1)
    assert back.equal(mine[0])
    comm.dispose_ulysses_a2a(handle)
    with pytest.raises(ValueError, match="fa"):
        comm.ulysses_a2a(handle, out, back, *sizes, 1)


def check_bands(ranks: Any, full: torch.Tensor, mine: torch.Tensor, own: slice, room: Any) -> None:
    """Uneven bands of heads, one after the other, make up the whole."""
    output = torch.full_like(mine[0], math.nan)
    for offset, count in ((0, 1), (1, 2)):
        band = slice(own.start + offset, own.start + offset + count)
        got = ranks.scatter_qkv_head_chunk(*mine, head_offset=offset, head_count=count, workspace=room)
        assert got.equal(torch.cat(list(full[:, :, :, band]), dim=-1))
        packed = comm.pack_ulysses_qkv_head_chunk(
            *mine, world_size=ranks.world_size, head_offset=offset, head_count=count
        )
        assert ranks.scatter_heads(packed).equal(got)
        x = full[0][:, :, band]
        given = {"local_heads": 3, "head_offset": offset, "out": output}
        assert ranks.gather_output_head_chunk(x, **given, workspace=room) is output
        again = torch.full_like(output, math.nan)
        gathered = ranks.gather_heads(x)
        comm.merge_ulysses_output_head_chunk(
            gathered, world_size=ranks.world_size, local_heads=3, head_offset=offset, out=again
        )
        written = ~torch.isnan(again[0, 0, :, 0])
        assert int(written.sum()) == count * ranks.world_size
        assert again[:, :, written].equal(mine[0][:, :, written])
    assert output.equal(mine[0])


def end_to_end(ranks: Any, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    """Attention by heads between the two exchanges is attention of the whole sequence."""
    local, heads = 6, 2 * ranks.world_size
    qkv = tuple(torch.randn(local * ranks.world_size, heads, 16, device=device).to(dtype) for _ in range(3))
    q, k, v = (ranks.scatter_heads(x[None, rank * local : (rank + 1) * local])[0] for x in qkv)
    o, lse = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True)
    got = ranks.gather_heads(o[None])[0]
    whole = attention(*qkv, AttentionOptions(causal=True), torch.float64)
    twin = attention(*qkv, AttentionOptions(causal=True), dtype)
    rows, own = slice(rank * local, (rank + 1) * local), slice(rank * 2, rank * 2 + 2)
    noise = attention_noise(*qkv, AttentionOptions(causal=True), dtype)
    assert_close_to_oracle(got, whole[0][rows], twin[0][rows], "ulysses", noise[0][rows])
    assert_lse_close_to_oracle(lse, whole[1][:, own], twin[1][:, own], "ulysses", noise[1][:, own])


def _everything(rank: int, world_size: int, device: torch.device) -> list[bytes]:
    poison()
    check_ring(rank, world_size, device)
    check_ulysses(rank, world_size, device)
    return check_merge(rank, world_size, device)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_do_what_one_would(world_size: int, rng: Any) -> None:
    results = run_ranks(_everything, world_size, seed=rng.randrange(2**31))
    assert all(bits == results[0] for bits in results), "ranks merged to different bits"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus_do_what_one_would(rng: Any) -> None:
    results = run_ranks(_everything, 2, device="cuda", seed=rng.randrange(2**31))
    assert results[0] == results[1], "ranks merged to different bits"


# --- one rank, and the merge of what came -----------------------------------------------------------------------------


def test_one_rank_alone() -> None:
    run_ranks(_alone, 1)


def _alone(rank: int, world_size: int, device: torch.device) -> None:
    qkv = problem(9, 9, torch.float32, device, (16, 16))
    compare(comm.ring_attention(*qkv, causal=True, return_lse=True), qkv, True, torch.arange(9), "ring")
    o, lse = partial_state(qkv, [9], 0)
    for split_heads in (False, True):
        got = comm.merge_over_ranks(o, lse, split_heads=split_heads)
        assert got[0].equal(o) and torch.allclose(got[1], lse)
    with comm.UlyssesCommunicator(max_elems=4096, dtype=torch.float32, backend="nccl") as ranks:
        x = torch.randn(2, 3, 4, 8)
        assert ranks.fallback_reason is None
        assert ranks.scatter_heads(x) is x and ranks.gather_heads(x) is x
        assert ranks.scatter_heads(x, out=torch.empty_like(x)).equal(x)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_of_received_messages(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Received parts are views into messages, with strides of their own."""
    force(monkeypatch, "merge", backend)
    skip_unless_runs(backend, dtype)
    shapes = [((7, 3, 24), dtype), ((7, 3), torch.float32)]
    message = torch.empty(3, context_parallel.message_bytes(shapes), dtype=torch.uint8, device=device)
    assert message.shape[1] % 16 == 0
    o, lse = context_parallel.exchange._views(message, shapes)
    o.copy_(torch.randn(o.shape))
    lse.copy_(torch.randn(lse.shape) * 4)
    lse[1, 2], o[1, 2] = -math.inf, math.nan
    got, total = context_parallel.merge_ranks(o, lse)
    weights = torch.softmax(lse.double() * math.log(2), dim=0)
    want = (torch.nan_to_num(o.double()) * weights[..., None]).sum(0)
    assert_close_to_oracle(got, want, want.to(dtype), "o", noise=torch.full_like(want, 1e-6))
    want_total = torch.logsumexp(lse.double() * math.log(2), dim=0) / math.log(2)
    assert_lse_close_to_oracle(total, want_total, want_total.float(), "lse")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def faults(rank: int, world_size: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """A name, and a call in which rank 1 differs from the others."""
    odd = int(rank == 1)
    o, lse = torch.randn(4, 6, 16), torch.randn(4, 6)
    yield "head_dim", lambda: comm.merge_over_ranks(torch.randn(4, 6, 16 + 8 * odd), lse)
    yield "dtype", lambda: comm.merge_over_ranks(o.half() if odd else o, lse)
    yield "lse", lambda: comm.merge_over_ranks(o, lse[: 4 - odd])
    q, k = torch.randn(5, 6, 16), torch.randn(5, 3, 16)
    wide = torch.randn(5, 6 if odd else 3, 16)
    yield "kv heads", lambda: comm.ring_attention(q, wide, wide)
    yield "causal", lambda: comm.ring_attention(q[: 5 - odd], k, k, causal=True)
    yield "chunks", lambda: comm.ring_attention(q, k, k, chunks=[(min(rank, 1), 5)])
    ranks = comm.UlyssesCommunicator(max_elems=1000, dtype=torch.float32)
    x = torch.randn(1, 4 + odd, 6, 8)
    yield "tokens", lambda: ranks.scatter_heads(x)
    y = torch.randn(1, 9 if odd else 4, 6, 24)
    yield "max_elems", lambda: ranks.scatter_heads(y)
    same_memory = x.flatten()[:144].view(1, 1, 18, 8)
    yield "overlap", lambda: ranks.gather_heads(x[:, :3], out=same_memory if odd else None)
    yield "nvlink", lambda: comm.resolve_ulysses_backend("nvlink")
    yield "backends", lambda: comm.resolve_ulysses_backend("nccl" if odd else "auto")
    workspace = comm.decode_cp_a2a_lse_reduce_create_workspace(1, 1, world_size, 16, torch.float32, None)
    many = torch.randn(2, world_size, 16)
    yield "room", lambda: comm.decode_cp_a2a_lse_reduce(many, many[..., 0], workspace, rank, world_size)


def _faults(rank: int, world_size: int, device: torch.device) -> dict[str, str]:
    seen = {}
    for name, call in faults(rank, world_size, device):
        try:
            call()
            seen[name] = "nothing was raised"
        except Exception as error:
            seen[name] = f"{type(error).__name__}: {error}"
    return seen


# Of each fault: what rank 1 raises, and what the others do.
RAISED = {
    "head_dim": ("PeerError: merge_over_ranks, o.shape: got [4, 6, 24] on rank 1", "[4, 6, 24] on rank 1"),
    "dtype": ("PeerError: merge_over_ranks, o.dtype: got torch.float16", "torch.float16 on rank 1"),
    "lse": ("ValueError: lse: got shape [3, 6]", "PeerError: merge_over_ranks: rank 1 refused its arguments: lse"),
    "kv heads": ("PeerError: ring_attention, k.shape[1:]", "[6, 16] on rank 1"),
    "causal": ("ValueError: causal: got 4 rows of q and 5 of k", "rank 1 refused its arguments: causal"),
    "chunks": ("ValueError: chunks", "ValueError: chunks: got [0, 1, 1]"),
    "tokens": ("PeerError: scatter_heads, shape", "[1, 5, 6, 8] on rank 1"),
    "max_elems": ("ValueError: scatter_heads: got 1296 elements", "rank 1 refused its arguments: scatter_heads"),
    "overlap": ("ValueError: out: got memory of an input", "rank 1 refused its arguments: out"),
    "nvlink": ("UlyssesBackendError", "UlyssesBackendError"),
    "backends": ("PeerError: resolve_ulysses_backend, backend", "nccl on rank 1"),
    "room": ("ValueError: workspace: got", "ValueError: workspace: got"),
}


def test_every_rank_hears_of_a_fault() -> None:
    results = run_ranks(_faults, 3)
    for rank, seen in enumerate(results):
        for name, (at_fault, others) in RAISED.items():
            assert (at_fault if rank == 1 else others) in seen[name], f"rank {rank}, {name}: {seen[name]}"
        assert set(seen) == set(RAISED)


def _missing(rank: int, world_size: int, device: torch.device) -> tuple[float, str]:
    peers.TIMEOUT = 1.0
    begin = time.monotonic()
    if rank == 1:
        return 0.0, ""
    try:
        comm.ring_attention(*problem(3, 3, torch.float32, device, (16, 16)))
    except peers.PeerError as error:
        return time.monotonic() - begin, str(error)
    return -1.0, "nothing was raised"


def test_a_rank_that_does_not_come_is_named_in_time() -> None:
    seconds, message = outcomes(_missing, 2)[0]
    assert "ring_attention" in message and "rank 1" in message and 1.0 <= seconds < 5.0


def test_without_process_groups() -> None:
    x = torch.randn(2, 4, 16)
    with pytest.raises(RuntimeError, match="init_process_group"):
        comm.merge_over_ranks(x, x[..., 0])
    with pytest.raises(ValueError, match="workspace: got a tensor of no known group"):
        comm.decode_cp_a2a_alltoall(x, x[..., :2], x, 0, 4)
    with pytest.raises(ValueError, match="lengths"):
        comm.zigzag([1, 2, 3], 0, 2)
    y = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="head_offset"):
        comm.pack_ulysses_qkv_head_chunk(y, y, y, world_size=2, head_offset=1, head_count=2)


def topology(rank: int, joined: bool = True, **changed: Any) -> comm.UlyssesRankTopology:
    peers_seen = {f"gpu{other}": joined for other in range(2) if other != rank}
    given = {"hostname": "a", "device_uuid": f"gpu{rank}", "peer_p2p": peers_seen, "peer_nvlink": peers_seen}
    return comm.UlyssesRankTopology(rank, **{**given, **changed})


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (topology(1, hostname="b"), "host b"),
        (topology(1, joined=False), "rank 1 and rank 0"),
        (topology(1, peer_nvlink={}), "rank 1 and rank 0"),
        (topology(1, device_uuid="gpu0"), "share a GPU"),
        (topology(1, probe_error="no driver"), "no driver"),
    ],
)
def test_nvlink_is_chosen_only_where_all_is_known(second: comm.UlyssesRankTopology, reason: str) -> None:
    assert comm.decide_ulysses_backend("auto", [topology(0), topology(1)]).backend == "nvlink"
    assert comm.decide_ulysses_backend("nccl", [topology(0), topology(1)]).reason == "requested"
    refused = comm.decide_ulysses_backend("auto", [topology(0), second])
    assert refused.backend == "nccl" and reason in refused.reason
    with pytest.raises(comm.UlyssesBackendError, match=reason):
        comm.decide_ulysses_backend("nvlink", [topology(0), second])
    assert comm.decide_ulysses_backend("auto", [topology(0), topology(1)], ()).backend == "nccl"


def test_the_probe_never_raises() -> None:
    assert comm.probe_ulysses_rank_topology("cpu", 3).rank == 3
    assert comm.probe_ulysses_rank_topology("no such device", 0).probe_error
