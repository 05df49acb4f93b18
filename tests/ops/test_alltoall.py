"""All-to-all of expert parallelism: torch.distributed's against what each rank must get, and kernels against it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashinfer import comm
from flashinfer.core import replay
from flashinfer.core.arch import CPU
from flashinfer.core.peers import PeerError, Peers
from flashinfer.core.select import BackendSupportedError
from flashinfer.fused_moe import cutlass_fused_moe
from flashinfer.ops import alltoall as ops
from flashinfer.ops.alltoall import Room
from flashinfer.ops.alltoall.spec import CombineSpec, DispatchSpec, Row, row_of
from flashinfer.ops.alltoall.support import triton_supports
from tests.ranks import RankError, outcomes, run_ranks

E4M3 = torch.float8_e4m3fn
MAX_TOKENS = 9
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# Where ranks run, and what moves the rows: the interpreter runs kernels of two processes.
WAYS = [
    pytest.param(["torch"], 3, "cpu"),
    pytest.param(["torch"], 4, "cpu"),
    pytest.param(["triton"], 1, "cpu"),
    pytest.param(["torch", "triton"], 2, "cpu"),
    pytest.param(["torch", "triton"], 2, "cuda", marks=[pytest.mark.gpu, TWO_GPUS]),
]


def room_of(device: torch.device, backend: str, timeout: float = 20.0, max_tokens: int = MAX_TOKENS) -> Room:
    peers = Peers(None, device, timeout)
    return Room(peers, max_tokens, ops.room_bytes(peers.world_size, max_tokens, 2048, 1024), backend)


class Inputs:
    """What every rank sends, the same on all ranks; kinds of rows that differ in bytes, dtype and strides."""

    def __init__(self, rng: random.Random, world_size: int, device: torch.device, tokens: list[int]) -> None:
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        self.world_size, self.tokens = world_size, tokens
        self.top_k, self.hidden_size = rng.choice([1, 2, 5]), rng.choice([8, 24, 33, 80])
        self.num_experts = world_size * rng.choice([1, 3, 4])
        self.ids, self.payloads = [], []
        for n in tokens:
            low, high = rng.choice([(0, self.num_experts), (-2, self.num_experts + 3), (0, 1)])
            ids = torch.randint(low, high, (n, self.top_k), generator=generator, dtype=torch.int32)
            if low < 0:
                ids[::2, 0] = rng.choice([2**31 - 1, -(2**31), 32 * self.num_experts])
            wide = torch.randn(n, 2 * self.hidden_size, generator=generator)
            parts = [
                wide[:, : self.hidden_size],
                ids,
                wide[:, 3:20].half(),
                wide[:, : self.hidden_size].to(E4M3),
                torch.rand(n, generator=generator),
                torch.randint(0, 255, (n, 3, 1), generator=generator, dtype=torch.uint8),
            ]
            self.ids.append(ids.to(device))
            self.payloads.append([x.to(device) for x in parts])

    def goes(self, src: int, dst: int) -> list[int]:
        """Tokens that rank src sends to dst."""
        per_rank = self.num_experts // self.world_size
        held = range(dst * per_rank, (dst + 1) * per_rank)
        return [t for t, ids in enumerate(self.ids[src].tolist()) if any(e in held for e in ids)]


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and bool((x.view(torch.uint8) == y.view(torch.uint8)).all())


def check_call(room: Room, inputs: Inputs, rows: int, invalid: int) -> None:
    """One dispatch and its combine, against what they mean."""
    rank, world_size = room.peers.rank, room.peers.world_size
    sent = comm.dispatch(
        room,
        inputs.ids[rank],
        inputs.payloads[rank],
        inputs.num_experts,
        rows,
        invalid_token_expert_id=invalid,
        expert_id_payload_index=1,
    )
    results = torch.full((world_size, rows, inputs.hidden_size), float("nan"), device=room.peers.device)
    for src in range(world_size):
        tokens = inputs.goes(src, rank)
        assert sent.counts[src] == len(tokens)
        for x, received in zip(inputs.payloads[src], sent.received, strict=True):
            assert received.shape == (world_size, rows, *x.shape[1:]) and received.is_contiguous()
            taken = x.view(torch.uint8)[tokens].view(x.dtype) if x.dtype == E4M3 else x[tokens]
            assert same(received[src, : len(tokens)], taken.contiguous())
        assert (sent.received[1][src, len(tokens) :] == invalid).all()
        results[src, : len(tokens)] = sent.received[0][src, : len(tokens)] * (rank + 1.1)
    out = comm.combine(room, sent, results)
    # In the order of ranks, each product and sum rounded to fp32.
    expected = torch.zeros_like(out)
    for dst in range(world_size):
        tokens = inputs.goes(rank, dst)
        assert sent.slots[tokens, dst].tolist() == list(range(len(tokens)))
        expected[tokens] += inputs.payloads[rank][0][tokens] * (dst + 1.1)
    assert int((sent.slots >= 0).sum()) == sum(len(inputs.goes(rank, dst)) for dst in range(world_size))
    assert same(out, expected)


def _calls(rank: int, world_size: int, device: torch.device, backend: str, seed: int) -> None:
    rng, room = random.Random(seed), room_of(device, backend)
    for call in range(6 if backend == "torch" else 4):  # the interpreter is slow
        rows = rng.choice([1, 4, MAX_TOKENS])
        tokens = [rng.choice([0, 1, rows, rng.randint(0, rows)]) for _ in range(world_size)]
        if call == 0:
            tokens, rows = [0] * world_size, 1
        check_call(room, Inputs(rng, world_size, device, tokens), rows, rng.choice([-1, 77]))
    room.close()
    with pytest.raises(RuntimeError, match="closed"):
        room.check()


def _order(rank: int, world_size: int, device: torch.device, backend: str, seed: int) -> None:
    """Two dispatches before the first combine, halves of both kinds, dispatches without a combine."""
    rng, room = random.Random(seed), room_of(device, backend)
    inputs = [Inputs(rng, world_size, device, [rng.randint(0, 5) for _ in range(world_size)]) for _ in range(4)]

    def send(i: int) -> Any:
        return comm.dispatch(room, inputs[i].ids[rank], inputs[i].payloads[rank], inputs[i].num_experts, 5)

    def back(i: int, sent: Any, dtype: torch.dtype) -> None:
        out = comm.combine(room, sent, sent.received[0].to(dtype), out_dtype=torch.float32)
        copies = (sent.slots >= 0).sum(1, keepdim=True)
        # Added to 0, since what went nowhere gives 0, not -0.
        assert same(out, inputs[i].payloads[rank][0].to(dtype).float() * copies + 0.0)

    first, second = send(0), send(1)
    back(0, first, torch.float32)
    third = send(2)
    back(1, second, torch.float16)
    back(2, third, torch.float32)
    with pytest.raises(RuntimeError, match="not combined yet"):
        comm.combine(room, third, third.received[0])
    lost = [send(i) for i in (3, 1, 2)]
    with pytest.raises(RuntimeError, match="one of the last two dispatches"):
        comm.combine(room, lost[0], lost[0].received[0])
    back(2, lost[2], torch.float32)
    # Strides, a result of the caller's, and its dtype.
    sent = send(3)
    rows = sent.received[0]
    spread = torch.full((world_size, 7, rows.shape[2] + 3), float("nan"), device=device)[:, 1:6, :-3]
    spread.copy_(rows)
    out = torch.empty(len(sent.slots), 2 * rows.shape[2], dtype=torch.float16, device=device)[:, : rows.shape[2]]
    assert comm.combine(room, sent, spread, out=out) is out
    copies = (sent.slots >= 0).sum(1, keepdim=True)
    assert torch.equal(out, (inputs[3].payloads[rank][0] * copies).half())


def _rows(rank: int, world_size: int, device: torch.device, backend: str, seed: int) -> None:
    _calls(rank, world_size, device, backend, seed)
    if world_size > 1:
        _order(rank, world_size, device, backend, seed)


def _in_turn(rank: int, world_size: int, device: torch.device, *parts: tuple[Callable[..., Any], Any]) -> Any:
    """One part after the other on the same processes, since those that only begin take longest; what the last gave."""
    return [function(rank, world_size, device, *args) for function, *args in parts][-1]


@pytest.mark.parametrize(("backends", "world_size", "device"), WAYS)
def test_rows_arrive_and_come_back(backends: list[str], world_size: int, device: str, rng: random.Random) -> None:
    parts = [(_rows, backend, rng.randrange(1 << 30)) for backend in backends]
    run_ranks(_in_turn, world_size, *parts, device=device)


def _alone(rank: int, world_size: int, device: torch.device) -> None:
    """Only rank 0 takes part: what it would send to rank 1 is lost, and nothing waits for it.

    Nothing is left of the calls before either, in which ranks differ in how their rows lie.
    """
    room = room_of(device, "triton", timeout=60.0)
    ids = torch.tensor([[0, 5], [6, 7], [1, 2]], dtype=torch.int32, device=device)
    x = torch.randn(3, 16 + rank, device=device).half()[:, :16]
    for _ in range(2):
        sent = comm.dispatch(room, ids, [x, ids], 8, 4, invalid_token_expert_id=-1, expert_id_payload_index=1)
        assert sent.counts.tolist() == [2, 2]
        comm.combine(room, sent, sent.received[0])
    if rank == 1:
        return
    sent = comm.dispatch(room, ids, [x, ids], 8, 4, invalid_token_expert_id=-1, expert_id_payload_index=1, active=1)
    assert sent.slots.tolist() == [[0, -1], [-1, -1], [1, -1]] and sent.counts.tolist() == [2, 0]
    assert (sent.received[1][1] == -1).all()
    out = comm.combine(room, sent, sent.received[0])
    assert torch.equal(out, x * torch.tensor([[1.0], [0.0], [1.0]], device=device))
    with pytest.raises(ValueError, match="active"):
        comm.dispatch(room, ids, [x], 8, 4, active=2)
    room.backend = "torch"
    with pytest.raises(BackendSupportedError, match="mask without ranks"):
        comm.dispatch(room, ids, [x], 8, 4, active=1)


def _missing(rank: int, world_size: int, device: torch.device, dies: bool) -> float:
    """Rank 1 does not come to a call, or makes another one; the kernel finds out, not the host."""
    room = room_of(device, "triton")
    Room.agree = lambda *args, **kwargs: None  # type: ignore[method-assign]
    ids = torch.tensor([[0, 3]], dtype=torch.int32, device=device)
    x = torch.randn(1, 16, device=device)
    for payloads in ([x], [x, x]):  # compiled before patience runs out
        sent = comm.dispatch(room, ids, payloads, 4, 2)
        comm.combine(room, sent, sent.received[0])
    dist.barrier()
    room.peers.timeout, room.limit = 1.0, room.limit // 320 * 16
    replay.forget()
    if rank == 1 and dies:
        os._exit(3)
    begin = time.monotonic()
    comm.dispatch(room, ids, [x, x] if rank == 1 else [x], 4, 2)
    if device.type == "cuda":
        torch.cuda.synchronize()
    waited = time.monotonic() - begin
    with pytest.raises(PeerError) as error:
        comm.dispatch(room, ids, [x], 4, 2)
    text = str(error.value)
    assert f"dispatch on rank {rank}: rank {1 - rank}" in text
    here, there = (64, 128) if rank == 0 else (128, 64)
    expected = "sent nothing within about 1 s" if dies else f"bytes of a token: {here} here, {there} there"
    assert expected in text
    return waited


def _faults(rank: int, world_size: int, device: torch.device, backend: str) -> None:
    """What ranks disagree on is told on all, by rank and argument; what is wrong with a call, before it is made."""
    with pytest.raises(PeerError, match=r"all-to-all, max_tokens: got .* on rank . and .* on rank ."):
        room_of(device, backend, max_tokens=8 + rank)
    room = room_of(device, backend, timeout=5.0)
    ids, x = torch.zeros(2, 2, dtype=torch.int32, device=device), torch.randn(2, 16, device=device)
    with pytest.raises(PeerError, match=r"dispatch, tokens_per_rank: got . on rank . and . on rank ."):
        comm.dispatch(room, ids, [x], 4, 2 + rank)
    with pytest.raises(PeerError, match=r"dispatch, bytes_of_payloads: got \[64.* on rank . and \[64"):
        comm.dispatch(room, ids, [x, x][: 1 + rank], 4, 2)
    sent = comm.dispatch(room, ids, [x], 4, 2)
    with pytest.raises(PeerError, match="combine, hidden_size"):
        comm.combine(room, sent, sent.received[0][:, :, : 16 - rank])
    comm.combine(room, sent, sent.received[0])
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("runtime_max_tokens_per_rank: got 1 with 2", lambda: comm.dispatch(room, ids, [x], 4, 1)),
        ("runtime_max_tokens_per_rank: got 10", lambda: comm.dispatch(room, ids, [x], 4, 10)),
        ("num_experts", lambda: comm.dispatch(room, ids, [x], 4 * world_size + 1, 2)),
        ("dtype torch.int64", lambda: comm.dispatch(room, ids.long(), [x], 4, 2)),
        (r"input_payloads\[1\]", lambda: comm.dispatch(room, ids, [x, x[:1]], 4, 2)),
        (r"input_payloads\[0\].*contiguous", lambda: comm.dispatch(room, ids, [x.mT.contiguous().mT], 4, 2)),
        ("input_payloads: got 0", lambda: comm.dispatch(room, ids, [], 4, 2)),
        ("payloads: got room of", lambda: comm.dispatch(room, ids, [x.repeat(1, 64)], 4, 9)),
        ("expert_id_payload_index", lambda: comm.dispatch(room, ids, [x], 4, 2, invalid_token_expert_id=-1)),
    ]
    for match, call in wrong:
        with pytest.raises(ValueError, match=match):
            call()
    sent = comm.dispatch(room, ids, [x], 4, 2)
    for match, payload in (("payload", sent.received[0][:1]), ("dtype", sent.received[0].double())):
        with pytest.raises(ValueError, match=match):
            comm.combine(room, sent, payload)
    comm.combine(room, sent, sent.received[0])


def test_faults_are_told() -> None:
    run_ranks(_in_turn, 2, (_faults, "torch"), (_faults, "triton"))


DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dies", [True, False])
def test_kernels_wait_for_no_masked_rank_and_for_none_forever(device: str, dies: bool) -> None:
    first, second = outcomes(_in_turn, 2, *([] if dies else [(_alone,)]), (_missing, dies), device=device)
    assert not isinstance(first, RankError), first
    assert 0.2 < first < 20.0
    if dies:
        assert "exit code 3" in str(second)
    else:
        assert not isinstance(second, RankError), second


def mapping_of(rank: int, world_size: int) -> Any:
    return SimpleNamespace(moe_ep_size=world_size, moe_ep_rank=rank, moe_ep_group=list(range(world_size)))


def _facade(rank: int, world_size: int, device: torch.device, seed: int) -> None:
    rng, rows = random.Random(seed), MAX_TOKENS
    inputs = Inputs(rng, world_size, device, [rng.randint(0, rows) for _ in range(world_size)])
    size = comm.moe_a2a_get_workspace_size_per_rank(world_size, rows, 2048, 1024)
    made = (mapping_of(rank, world_size), rows, inputs.top_k, inputs.num_experts)
    a2a = comm.MoeAlltoAll(*made, size, eplb_stats_num_experts=3)
    other = comm.MoeAlltoAll(*made, size, eplb_stats_num_experts=3)
    assert other.workspace.data_ptr() == a2a.workspace.data_ptr()
    ids, payloads = inputs.ids[rank], inputs.payloads[rank]
    stats = torch.arange(3, dtype=torch.int32, device=device) + 10 * rank
    received = a2a.dispatch(ids, payloads, rows, 99, 1, eplb_local_stats=stats)
    with pytest.raises(RuntimeError, match="combine first"):
        a2a.dispatch(ids, payloads, rows)
    assert a2a.eplb_gathered_stats is not None
    assert a2a.eplb_gathered_stats.tolist() == [[10 * r, 10 * r + 1, 10 * r + 2] for r in range(world_size)]
    for src in range(world_size):
        tokens = inputs.goes(src, rank)
        assert same(received[0][src, : len(tokens)], inputs.payloads[src][0][tokens].contiguous())
        assert (received[1][src, len(tokens) :] == 99).all()
    payload = a2a.get_combine_payload_tensor_in_workspace(rows, inputs.hidden_size, torch.float32)
    payload.copy_(received[0])
    copies = torch.zeros(len(ids), 1, device=device)
    for dst in range(world_size):
        copies[inputs.goes(rank, dst)] += 1
    out = a2a.combine(payload, rows, payload_in_workspace=True)
    assert torch.equal(out, payloads[0] * copies)
    with pytest.raises(RuntimeError, match="Dispatch first"):
        a2a.combine(payload, rows)
    # The functions of the same workspace.
    metainfo = comm.moe_a2a_initialize(a2a.workspace, rank, world_size, rows)
    numbers = (rank, world_size, inputs.top_k)
    received, offset, none = comm.moe_a2a_dispatch(
        ids, payloads, a2a.workspace, metainfo, rows, *numbers, inputs.num_experts
    )
    assert none is None
    comm.moe_a2a_sanitize_expert_ids(received[1], a2a.workspace, metainfo, rank, -5)
    for src in range(world_size):
        assert (received[1][src, len(inputs.goes(src, rank)) :] == -5).all()
    num_bytes = 4 * world_size * rows * inputs.hidden_size
    payload = comm.moe_a2a_wrap_payload_tensor_in_workspace(
        a2a.workspace, [world_size, rows], offset, offset + num_bytes, torch.float32
    )
    payload.copy_(received[0])
    with pytest.raises(BackendSupportedError, match="use_low_precision"):
        comm.moe_a2a_combine(payload, len(ids), a2a.workspace, metainfo, rows, *numbers, offset, use_low_precision=True)
    out = comm.moe_a2a_combine(payload, len(ids), a2a.workspace, metainfo, rows, *numbers, offset, True, torch.float16)
    assert torch.equal(out, (payloads[0] * copies).half())
    with pytest.raises(ValueError, match="get_workspace"):
        comm.moe_a2a_initialize(torch.zeros(8, dtype=torch.uint8), rank, world_size, rows)
    other.close()


def _layer(rank: int, world_size: int, device: torch.device, backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, inner, experts, top_k, rows = 32, 16, 4 * world_size, 3, 6
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    fc1 = torch.randn(experts, 2 * inner, hidden, device=device).to(dtype) / 4
    fc2 = torch.randn(experts, hidden, inner, device=device).to(dtype) / 4
    room = room_of(device, backend)
    for call in range(2):
        x = torch.randn(world_size, rows, hidden, device=device).to(dtype)
        ids = torch.rand(world_size, rows, experts, device=device).argsort(-1)[..., :top_k].int()
        weights = torch.rand(world_size, rows, top_k, device=device)
        tokens = rows if call == 0 else rank * rows // world_size
        mine = (x[rank, :tokens], ids[rank, :tokens].contiguous(), weights[rank, :tokens].contiguous())
        own = slice(rank * 4, rank * 4 + 4)
        out = comm.expert_parallel_moe(room, *mine, fc1[own], fc2[own], rows)
        whole = cutlass_fused_moe(*mine, fc1, fc2, dtype, None) if tokens else mine[0]
        # The ranks' parts of a sum are rounded, then added.
        exact = 1e-5 if dtype == torch.float32 else 2.0**-7 * world_size
        torch.testing.assert_close(out, whole, rtol=exact, atol=exact * 4)


@pytest.mark.parametrize("device", DEVICES)
def test_facade_and_layer(device: str, rng: random.Random) -> None:
    parts = [(_facade, rng.randrange(1 << 30)), (_layer, "torch", rng.randrange(1 << 30))]
    run_ranks(_in_turn, 3 if device == "cpu" else 2, *parts, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_layer_of_kernels(device: str, rng: random.Random) -> None:
    run_ranks(_layer, 2, "triton", rng.randrange(1 << 30), device=device)


def _graph(rank: int, world_size: int, device: torch.device) -> None:
    """A captured dispatch and combine replay for other rows and experts, mixed with eager calls."""
    room = room_of(device, "triton", max_tokens=64)
    ids = torch.zeros(64, 4, dtype=torch.int32, device=device)
    x = torch.zeros(64, 16, device=device)

    def call() -> torch.Tensor:
        sent = comm.dispatch(room, ids, [x, ids], 8, 64, invalid_token_expert_id=-1, expert_id_payload_index=1)
        return comm.combine(room, sent, sent.received[0] * 2)

    call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for i in range(20):
        ids.random_(0, 8)
        x.normal_()
        copies = ((ids < 4).any(1).int() + (ids >= 4).any(1).int())[:, None]
        graph.replay()
        assert torch.equal(out, x * 2 * copies)
        if i % 3 == 0:
            assert torch.equal(call(), out)
        if i == 0 and rank == 0:
            time.sleep(0.1)
    room.check()


@pytest.mark.gpu
@TWO_GPUS
def test_graph() -> None:
    run_ranks(_graph, 2, device="cuda")


def test_support() -> None:
    spec = DispatchSpec(2, 8, 2, (Row(7168, 4),))
    assert "another host" in str(triton_supports(DispatchSpec(2, 8, 2, (), unreachable="on another host"), CPU))
    assert triton_supports(spec, CPU) is None
    assert "words" in str(triton_supports(DispatchSpec(2, 8, 2, (Row(40000, 4),)), CPU))
    assert "ranks" in str(triton_supports(DispatchSpec(17, 34, 2, ()), CPU))
    assert "more than 64" in str(triton_supports(DispatchSpec(2, 8, 65, ()), CPU))
    bf16 = torch.bfloat16
    assert "interpreter" in str(triton_supports(CombineSpec(2, 64, bf16, bf16), CPU))
    assert "elements" in str(triton_supports(CombineSpec(2, 20000, bf16, torch.float32), CPU))
    assert "sums of" in str(triton_supports(CombineSpec(2, 64, torch.int8, bf16), CPU))


def test_rows_are_words() -> None:
    assert row_of((7168,), 2, 7168) == Row(3584, 4)
    assert row_of((7,), 2, 7) == Row(7, 2)
    assert row_of((8,), 2, 9) == Row(8, 2)
    assert row_of((3, 1), 1, 3) == Row(3, 1)
    assert row_of((), 4, 1) == Row(1, 4)


def test_masks_of_ranks() -> None:
    assert comm.moe_a2a_active_rank_mask([0, 1, 3], 4).tolist() == [0b1011]
    assert comm.moe_a2a_active_rank_mask(torch.tensor([63]), 64).tolist() == [1 << 63]
    with pytest.raises(ValueError, match="active_ranks"):
        comm.moe_a2a_active_rank_mask([4], 4)
