"""Ulysses sequence parallelism: tokens split over ranks become heads split over ranks for attention, and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from flashinfer.comm.ulysses_topology import device_of, resolve_ulysses_backend
from flashinfer.core import check
from flashinfer.ops.context_parallel import Facts, heads, ranks_of

__all__ = [
    "UlyssesCommunicator",
    "UlyssesWorkspace",
    "dispose_ulysses_a2a",
    "init_ulysses_a2a",
    "merge_ulysses_output_head_chunk",
    "pack_ulysses_qkv_head_chunk",
    "ulysses_a2a",
]

OptionalTensor = torch.Tensor | None
Want = tuple[list[int], int]


class UlyssesWorkspace:
    """Room to send from and to receive in, `max_elems` elements of dtype each, so that calls allocate nothing.

    For one call at a time. device: None is the current GPU if there is one, else the CPU. Raises ValueError.
    """

    def __init__(self, *, max_elems: int, dtype: torch.dtype, device: torch.device | str | int | None = None) -> None:
        self.max_elems = check.positive("max_elems", max_elems)
        self.dtype = check.choice("dtype", dtype, check.FLOAT_DTYPES)
        fallback = "cuda" if torch.cuda.is_available() else "cpu"
        where = torch.device(fallback if device is None else device)
        self.send, self.receive = (torch.empty(max_elems, dtype=dtype, device=where) for _ in range(2))
        self.device = self.send.device

    @property
    def staging(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.send, self.receive


class UlyssesCommunicator:
    """Exchanges heads for tokens among the ranks of `group` (None: the default group), which all make it alike.

    Below B is the batch, S_local the tokens of one rank (the same on all), S_global = world_size * S_local, H heads in
    all, H_local = H / world_size, D head_dim; tensors are of dtype, on the device, with any strides. max_elems: most
    elements that a call sends. backend, device: as in `resolve_ulysses_backend`. `.backend` says what was chosen,
    `.fallback_reason` why it is not NVLink (None if nccl was asked for).

    Results are in order of ranks and the bits that were sent. `out` is written if given; with `workspace` (from
    `create_workspace`) nothing else is allocated, and for B = 1 without `out` the result lies in the workspace. `out`
    may not overlap inputs or workspace. All ranks make the same calls in the same order. Raises TypeError, ValueError,
    UlyssesBackendError, and PeerError naming the rank that came with something else.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        max_elems: int,
        dtype: torch.dtype,
        backend: str = "auto",
        device: torch.device | str | int | None = None,
    ) -> None:
        self.device = device_of(group, device)
        self._ranks = ranks_of(group, self.device)

        def describe() -> Facts:
            check.positive("max_elems", max_elems)
            check.choice("dtype", dtype, check.FLOAT_DTYPES)
            return {"max_elems": max_elems, "dtype": str(dtype)}, {}

        self._ranks.agree("UlyssesCommunicator", describe)
        decision = resolve_ulysses_backend(backend, group, self.device)
        self.group, self.max_elems, self.dtype = self._ranks.peers.group, max_elems, dtype
        self.rank, self.world_size = self._ranks.peers.rank, self._ranks.peers.world_size
        self.backend = decision.backend
        self.fallback_reason = None if backend == "nccl" else decision.reason
        self._closed = False

    def __enter__(self) -> UlyssesCommunicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the use of this object; it holds no memory, the process group is the caller's. May be called again."""
        self._closed = True

    def create_workspace(self, *, max_elems: int | None = None) -> UlyssesWorkspace:
        """A workspace for calls that send up to max_elems (None: this communicator's) elements."""
        size = self.max_elems if max_elems is None else max_elems
        return UlyssesWorkspace(max_elems=size, dtype=self.dtype, device=self.device)

    def scatter_heads(
        self, x: torch.Tensor, *, out: OptionalTensor = None, workspace: UlyssesWorkspace | None = None
    ) -> torch.Tensor:
        """`[B, S_local, H, D]` -> `[B, S_global, H_local, D]`: all tokens of this rank's heads; x itself if alone."""
        size = self.world_size

        def want() -> Want:
            self._input("x", x)
            check.multiple("heads of x", x.shape[2], "world_size", size)
            return [x.shape[0], x.shape[1] * size, x.shape[2] // size, x.shape[3]], x.numel()

        self._agree("scatter_heads", want, (x,), out, workspace)
        if size == 1 and out is None:
            return x
        received = self._exchange(heads.blocks_by_heads(x, size), workspace)
        return _delivered(heads.tokens_of_blocks(received), out)

    def gather_heads(
        self, x: torch.Tensor, *, out: OptionalTensor = None, workspace: UlyssesWorkspace | None = None
    ) -> torch.Tensor:
        """`[B, S_global, H_local, D]` -> `[B, S_local, H, D]`: the way back; of one rank x itself."""
        size = self.world_size

        def want() -> Want:
            self._input("x", x)
            check.multiple("tokens of x", x.shape[1], "world_size", size)
            return [x.shape[0], x.shape[1] // size, x.shape[2] * size, x.shape[3]], x.numel()

        self._agree("gather_heads", want, (x,), out, workspace)
        if size == 1 and out is None:
            return x
        received = self._exchange(heads.blocks_by_tokens(x, size), workspace)
        return _delivered(heads.heads_of_blocks(received), out)

    def scatter_qkv_head_chunk(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        head_offset: int,
        head_count: int,
        out: OptionalTensor = None,
        workspace: UlyssesWorkspace | None = None,
    ) -> torch.Tensor:
        """All tokens of heads `[head_offset, + head_count)` of this rank's: `[B, S_global, head_count, 3 * D]`.

        query, key, value `[B, S_local, H, D]`, of one shape; the last dimension of the result holds the three side by
        side. One collective.
        """
        size, qkv = self.world_size, (query, key, value)

        def want() -> Want:
            self._input("query", query)
            _check_qkv(qkv, size, head_offset, head_count)
            shape = [query.shape[0], query.shape[1] * size, head_count, 3 * query.shape[3]]
            return shape, math.prod(shape)

        self._agree("scatter_qkv_head_chunk", want, qkv, out, workspace, head_offset, head_count)
        batch, tokens, _, head_dim = query.shape
        shape = (size, batch, tokens, head_count, 3 * head_dim)
        send, received = heads.room(shape, query, None if workspace is None else workspace.staging)
        heads.pack_band(qkv, (head_offset, head_count), size, send.permute(1, 2, 0, 3, 4))
        return _delivered(heads.tokens_of_blocks(heads.swap(send, received, self.group)), out)

    def gather_output_head_chunk(
        self,
        x: torch.Tensor,
        *,
        local_heads: int,
        head_offset: int,
        out: torch.Tensor,
        workspace: UlyssesWorkspace | None = None,
    ) -> torch.Tensor:
        """Write what attention gave for a band of heads, `[B, S_global, head_count, D]`, to its place in out.

        out `[B, S_local, H, D]` with H = world_size * local_heads: heads `[r * local_heads + head_offset, +
        head_count)` come from rank r; the others stay as they are. Returns out. One collective.
        """
        size = self.world_size

        def want() -> Want:
            self._input("x", x)
            check.multiple("tokens of x", x.shape[1], "world_size", size)
            _check_band(local_heads, head_offset, x.shape[2])
            return [x.shape[0], x.shape[1] // size, size * local_heads, x.shape[3]], x.numel()

        self._agree("gather_output_head_chunk", want, (x,), out, workspace, head_offset, local_heads)
        received = self._exchange(heads.blocks_by_tokens(x, size), workspace)
        heads.band_of(out, size, head_offset, x.shape[2]).copy_(received.permute(1, 2, 0, 3, 4))
        return out

    def _exchange(self, blocks: torch.Tensor, workspace: UlyssesWorkspace | None) -> torch.Tensor:
        return heads.exchange(blocks, self.group, None if workspace is None else workspace.staging)

    def _input(self, name: str, x: torch.Tensor) -> None:
        check.tensor(name, x, dtypes=(self.dtype,), shape=(None,) * 4)
        if x.device.type != self.device.type:
            raise ValueError(check.problem(name, f"a tensor on {x.device}", f"one on {self.device}", "Move it."))

    def _agree(
        self,
        what: str,
        want: Callable[[], Want],
        inputs: Sequence[torch.Tensor],
        out: OptionalTensor,
        workspace: UlyssesWorkspace | None,
        *numbers: int,
    ) -> None:
        """Check everything of a call here, and that the other ranks came with the same.

        want: checks the inputs; returns the shape of the result and how many elements are sent.
        """
        if self._closed:
            raise RuntimeError(f"{what}: this UlyssesCommunicator is closed. Make a new one.")

        def describe() -> Facts:
            shape, sent = want()
            if sent > self.max_elems:
                expected = f"at most max_elems = {self.max_elems}"
                raise ValueError(check.problem(what, f"{sent} elements to send", expected, "Raise max_elems."))
            if workspace is not None:
                self._check_workspace(workspace, sent)
            if out is not None:
                check.tensor("out", out, dtypes=(self.dtype,), shape=shape, like=("the input", inputs[0]))
                staging = () if workspace is None else workspace.staging
                if any(_overlap(out, other) for other in (*inputs, *staging)):
                    got = "memory of an input or of the workspace"
                    raise ValueError(check.problem("out", got, "memory of its own", "Allocate another tensor."))
            return {"shape": list(inputs[0].shape), "dtype": str(self.dtype), "heads": list(numbers)}, {}

        self._ranks.agree(what, describe)

    def _check_workspace(self, workspace: UlyssesWorkspace, sent: int) -> None:
        if workspace.dtype != self.dtype or workspace.device.type != self.device.type:
            got = f"{workspace.dtype} on {workspace.device}"
            expected = f"{self.dtype} on {self.device}"
            raise ValueError(check.problem("workspace", got, expected, "Use create_workspace()."))
        if workspace.max_elems < sent:
            got = f"{workspace.max_elems} elements"
            raise ValueError(check.problem("workspace", got, f"at least {sent}", "Create a larger one."))


def pack_ulysses_qkv_head_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    world_size: int,
    head_offset: int,
    head_count: int,
    out: OptionalTensor = None,
) -> torch.Tensor:
    """The band of heads for every rank, q, k and v side by side: `[B, S_local, world_size * head_count, 3 * D]`.

    query, key, value `[B, S_local, H, D]`, of one shape, any strides. Of each rank's H / world_size heads those in
    `[head_offset, + head_count)`. out: written if given, any strides that let its heads be split. Raises ValueError.
    """
    check.tensor("query", query, shape=(None,) * 4)
    _check_qkv((query, key, value), world_size, head_offset, head_count)
    shape = (*query.shape[:2], world_size * head_count, 3 * query.shape[3])
    packed = query.new_empty(shape) if out is None else out
    check.tensor("out", packed, dtypes=(query.dtype,), shape=shape, like=("query", query))
    by_rank = packed.unflatten(2, (world_size, head_count))
    heads.pack_band((query, key, value), (head_offset, head_count), world_size, by_rank)
    return packed


def merge_ulysses_output_head_chunk(
    received: torch.Tensor, *, world_size: int, local_heads: int, head_offset: int, out: torch.Tensor
) -> torch.Tensor:
    """Write a gathered band, `[B, S_local, world_size * head_count, D]`, to its heads of out, and return out.

    out `[B, S_local, world_size * local_heads, D]`: heads `[r * local_heads + head_offset, + head_count)` are those of
    rank r; the others stay as they are. Raises ValueError.
    """
    check.tensor("received", received, shape=(None,) * 4)
    check.multiple("heads of received", received.shape[2], "world_size", world_size)
    head_count = received.shape[2] // world_size
    _check_band(local_heads, head_offset, head_count)
    shape = (*received.shape[:2], world_size * local_heads, received.shape[3])
    check.tensor("out", out, dtypes=(received.dtype,), shape=shape, like=("received", received))
    heads.band_of(out, world_size, head_offset, head_count).copy_(received.unflatten(2, (world_size, head_count)))
    return out


_handles: dict[int, UlyssesCommunicator] = {}
_next_handle = itertools.count(1)
# Nothing bounds the raw calls: their caller allocated the memory that the pointers name.
_UNBOUNDED = 2**62


def init_ulysses_a2a(
    out_ipc_ptrs: list[int], signal_ipc_ptrs: list[int], rank: int, world_size: int, full_nvlink: bool
) -> int:
    """A handle for `ulysses_a2a` among the ranks of the default process group; prefer `UlyssesCommunicator`.

    rank, world_size: must be the group's. The pointers and full_nvlink are FlashInfer's; nothing here needs them, as
    the exchange goes through the group. Raises ValueError.
    """
    for name, got, want in (("rank", rank, dist.get_rank()), ("world_size", world_size, dist.get_world_size())):
        if got != want:
            raise ValueError(check.problem(name, got, f"{want}, as the default group has it", "Pass the group's."))
    handle = next(_next_handle)
    # The dtype is each call's own; see below.
    _handles[handle] = UlyssesCommunicator(max_elems=_UNBOUNDED, dtype=torch.float32)
    return handle


def ulysses_a2a(fa: int, inp: torch.Tensor, out: torch.Tensor, B: int, S_local: int, H: int, D: int, mode: int) -> None:
    """`UlyssesCommunicator.scatter_heads` (mode 0) or `.gather_heads` (mode 1) of inp, to out.

    fa: from `init_ulysses_a2a`. inp and out of one dtype, of shapes that B, S_local, H and D give. Raises ValueError.
    """
    communicator = _handles[check.choice("fa", fa, _handles)]
    size = communicator.world_size
    shapes = [[B, S_local, H, D], [B, S_local * size, H // size, D]]
    given, wanted = shapes if check.choice("mode", mode, (0, 1)) == 0 else reversed(shapes)
    check.tensor("inp", inp, dtypes=check.FLOAT_DTYPES, shape=given)
    check.tensor("out", out, dtypes=(inp.dtype,), shape=wanted, like=("inp", inp))
    communicator.dtype = inp.dtype
    (communicator.gather_heads if mode else communicator.scatter_heads)(inp, out=out)


def dispose_ulysses_a2a(fa: int) -> None:
    """End the use of a handle."""
    _handles.pop(check.choice("fa", fa, _handles)).close()


def _check_qkv(qkv: Sequence[Any], world_size: int, head_offset: int, head_count: int) -> None:
    for name, x in zip(("key", "value"), qkv[1:], strict=True):
        check.tensor(name, x, dtypes=(qkv[0].dtype,), shape=qkv[0].shape, like=("query", qkv[0]))
    check.multiple("heads of query", qkv[0].shape[2], "world_size", check.positive("world_size", world_size))
    _check_band(qkv[0].shape[2] // world_size, head_offset, head_count)


def _check_band(local_heads: int, head_offset: int, head_count: int) -> None:
    check.positive("head_count", head_count)
    if head_offset < 0 or head_offset + head_count > local_heads:
        got = f"{head_offset} with {head_count} heads"
        raise ValueError(check.problem("head_offset", got, f"a band of the {local_heads} local heads", "Shift it."))


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the ranges of addresses from the first to the last element meet."""
    (a_start, a_end), (b_start, b_end) = (_addresses(x) for x in (a, b))
    return a_start < b_end and b_start < a_end


def _addresses(x: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _delivered(result: torch.Tensor, out: OptionalTensor) -> torch.Tensor:
    return result if out is None else out.copy_(result)
