"""Launch of the collectives' kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton

from flashinfer.core.arch import Arch
from flashinfer.core.check import FP8_MANTISSA_BITS
from flashinfer.core.launch import Prebound, alignment, token
from flashinfer.device.mailbox import Greeting, Mailbox
from flashinfer.ops.collectives.spec import CollectiveSpec, Reduce, Word, word_of
from flashinfer.ops.collectives.triton.reduce import ReduceConfig, Reduced, reduce_kernel
from flashinfer.ops.collectives.triton.share import ShareConfig, share_kernel
from flashinfer.ops.collectives.workspace import Room, Workspace

_reduce, _share = Prebound(reduce_kernel), Prebound(share_kernel)
# Loads of 16 bytes that a thread has under way, of all ranks' rows; warps of a program.
LOADS, MIN_WARPS, MAX_WARPS = 8, 4, 32
# Warps that an SM surely holds of these kernels at once, at up to 128 registers a thread.
RESIDENT_WARPS = 16


def bind(spec: CollectiveSpec, arch: Arch) -> Callable[..., None]:
    """The call for one kind of collective: launches only, no host sync."""
    return (_bind_reduce if spec.kind == "all_reduce" else _bind_share)(spec, arch)


def warps_of(spec: CollectiveSpec) -> int:
    """Warps of a program that holds a row."""
    vectors = min(max(LOADS // spec.world_size, 1), 2)
    threads = triton.next_power_of_2(spec.cols) * spec.dtype.itemsize // (16 * vectors)
    return min(max(threads // 32, MIN_WARPS), MAX_WARPS)


def programs_of(num_rows: int, num_warps: int, arch: Arch) -> int:
    """Programs that a launch has: never more than run at once, since they wait for those of other ranks; one greets."""
    return min(num_rows, arch.num_sms * max(RESIDENT_WARPS // num_warps, 1)) + 1


def mailbox_of(room: Room, two_shot: bool) -> Mailbox:
    """A region of the room's mailboxes, for a kernel."""
    region, rank = room.regions[two_shot], room.peers.rank
    first, turn, uses = room.firsts[two_shot], region.turn * room.cols, room.uses[two_shot]
    return Mailbox(room.boxes, room.boxes[rank], first, turn, uses, room.broken, room.report.address, rank, room.limit)


def greeting_of(room: Room, word: Word) -> Greeting:
    return Greeting(room.greetings, room.greetings[room.peers.rank], room.greeted, word.packed)


def reduce_config(spec: CollectiveSpec, arch: Arch, cut: bool) -> ReduceConfig:
    """The compiled form of an all-reduce."""
    return ReduceConfig(
        world_size=spec.world_size,
        cols=spec.cols,
        block=triton.next_power_of_2(spec.cols),
        cut=cut,
        two_shot=spec.two_shot,
        weight_bias=spec.weight_bias or 0.0,
        mantissa_bits=FP8_MANTISSA_BITS.get(spec.quantised, 0) if spec.quantised else 0,
        native_fp8=arch.converts_to_fp8,
    )


def share_config(spec: CollectiveSpec, cut: bool) -> ShareConfig:
    """The compiled form of an exchange."""
    cols = spec.cols
    return ShareConfig(spec.world_size, cols, triton.next_power_of_2(cols), cut, spec.kind == "reduce_scatter")


def _pieces(num_elements: int, cols: int, places: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of what goes through `places` rows of the mailboxes at once, in elements."""
    for begin in range(0, num_elements, places * cols):
        yield begin, min(begin + places * cols, num_elements)


def _bind_reduce(spec: CollectiveSpec, arch: Arch) -> Callable[[Reduce, Workspace, float], None]:
    forms = [reduce_config(spec, arch, cut) for cut in (False, True)]
    num_warps = warps_of(spec)

    def launch(tensors: Reduce, room: Room, eps: float) -> None:
        input, *others = tensors
        num_elements = input.numel()
        num_rows = triton.cdiv(num_elements, spec.cols)
        cfg = forms[num_elements < num_rows * spec.cols]
        greeting = greeting_of(room, word_of(spec, num_elements))
        box, outputs = mailbox_of(room, spec.two_shot), Reduced(*others)
        given = tuple(x is not None for x in others)
        key = token(spec, cfg, room.number, num_elements % 16 == 0, given)
        arguments = (input, outputs, box, greeting, num_rows, num_elements, eps, cfg)
        grid = (programs_of(num_rows, num_warps, arch), 1, 1)
        aligned = alignment(*[x for x in tensors if x is not None])
        _reduce(grid, (key, aligned), arguments, input.device, num_warps=num_warps)

    def run(tensors: Reduce, workspace: Workspace, eps: float) -> None:
        room = workspace.room(spec.dtype, spec.cols)
        if tensors.quantised is not None:
            tensors = tensors._replace(quantised=tensors.quantised.view(torch.uint8))
        num_elements, places = tensors.input.numel(), room.regions[spec.two_shot].places
        workspace.last = word_of(spec, num_elements)
        if num_elements <= places * spec.cols:
            return launch(tensors, room, eps)
        for begin, end in _pieces(num_elements, spec.cols, places):
            rows = [x if x is None or x.numel() < num_elements else x.view(-1)[begin:end] for x in tensors]
            launch(Reduce(*rows), room, eps)

    return run


def _bind_share(spec: CollectiveSpec, arch: Arch) -> Callable[[torch.Tensor, torch.Tensor, Workspace], None]:
    forms = [share_config(spec, cut) for cut in (False, True)]
    num_warps = warps_of(spec)

    def run(out: torch.Tensor, input: torch.Tensor, workspace: Workspace) -> None:
        room = workspace.room(spec.dtype, spec.cols)
        part, places = (out if forms[0].scatters else input).numel(), room.regions[0].places
        workspace.last = word_of(spec, part)
        for begin, end in _pieces(part, spec.cols, places):
            greeting = greeting_of(room, word_of(spec, end - begin))
            num_rows = triton.cdiv(end - begin, spec.cols)
            cfg = forms[end - begin < num_rows * spec.cols]
            key = token(spec, cfg, room.number, part % 16 == 0, (end - begin) % 16 == 0)
            pieces = out.view(-1)[begin:], input.view(-1)[begin:]
            arguments = (*pieces, mailbox_of(room, False), greeting, num_rows, end - begin, part, cfg)
            grid = (programs_of(num_rows, num_warps, arch), 1, 1)
            _share(grid, (key, alignment(*pieces)), arguments, input.device, num_warps=num_warps)

    return run
