"""Launch of the collectives' kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton

from flashinfer.core.arch import Arch
from flashinfer.core.check import FP8_MANTISSA_BITS
from flashinfer.core.launch import Prebound, alignment, integer_classes, token
from flashinfer.device.mailbox import Greeting, Mailbox
from flashinfer.ops.collectives.plan import FP8_COLS, LAUNCH_BYTES
from flashinfer.ops.collectives.spec import CollectiveSpec, Mix, Reduce, Word, word_of
from flashinfer.ops.collectives.triton.fp8 import Fp8Config, reduce_fp8_kernel
from flashinfer.ops.collectives.triton.reduce import Mixed, ReduceConfig, Reduced, reduce_kernel
from flashinfer.ops.collectives.triton.share import ShareConfig, share_kernel
from flashinfer.ops.collectives.workspace import Room, Workspace

_reduce, _share, _reduce_fp8 = Prebound(reduce_kernel), Prebound(share_kernel), Prebound(reduce_fp8_kernel)
# Loads of 16 bytes that a thread has under way, of all ranks' rows; warps of a program.
LOADS, MIN_WARPS, MAX_WARPS = 8, 4, 32
# Warps that an SM surely holds of these kernels at once, at up to 128 registers a thread.
RESIDENT_WARPS = 16
# Of programs that send fp8: a thread holds 16 elements, one load of codes.
FP8_WARPS = FP8_COLS // 16 // 32


def bind(spec: CollectiveSpec, arch: Arch) -> Callable[..., None]:
    """The call for one kind of collective: launches only, no host sync."""
    return BINDERS[spec.kind](spec, arch)


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


def reduce_config(spec: CollectiveSpec, arch: Arch, cut: bool, mixed: bool = False) -> ReduceConfig:
    """The compiled form of an all-reduce."""
    return ReduceConfig(
        world_size=spec.world_size,
        cols=spec.cols,
        block=triton.next_power_of_2(spec.cols),
        cut=cut,
        two_shot=spec.two_shot,
        mixed=mixed,
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


def _rows_of(tensors: Reduce, begin: int, end: int, cols: int) -> Reduce:
    """Of the tensors of an all-reduce what belongs to some elements of the rows."""

    def cut(name: str, x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None or name in ("weight", "scale"):
            return x
        per_row = cols if name == "scales" else 1
        return x.view(-1)[begin // per_row : end // per_row]

    return Reduce(*map(cut, Reduce._fields, tensors))


def _bind_reduce(spec: CollectiveSpec, arch: Arch) -> Callable[[Reduce, Mix | None, Workspace, float], None]:
    forms = [[reduce_config(spec, arch, cut, mixed) for cut in (False, True)] for mixed in (False, True)]
    num_warps = warps_of(spec)

    def launch(tensors: Reduce, mix: Mix | None, room: Room, eps: float, first_row: int, num_elements: int) -> None:
        input, *others = tensors
        num_rows = triton.cdiv(num_elements, spec.cols)
        cfg = forms[mix is not None][num_elements < num_rows * spec.cols]
        greeting = greeting_of(room, word_of(spec, num_elements))
        box, outputs = mailbox_of(room, spec.two_shot), Reduced(*others)
        mixed, sizes = None, (0, 0)
        if mix is not None:
            mixed, sizes = Mixed(mix.table, mix.factors, mix.added, mix.scale), (mix.num_rows, mix.num_parts)
        pointers = [x for x in (*tensors, *(mixed or ())) if isinstance(x, torch.Tensor)]
        given = tuple(x is not None for x in (*others, *(mixed or ())))
        dtypes = tuple(x.dtype for x in pointers)
        key = token(spec, cfg, room.number, integer_classes((num_elements,)), given, dtypes)
        arguments = (input, outputs, mixed, box, greeting, num_rows, num_elements, first_row, *sizes, eps, cfg)
        grid = (programs_of(num_rows, num_warps, arch), 1, 1)
        _reduce(grid, (key, alignment(*pointers)), arguments, input.device, num_warps=num_warps)

    def run(tensors: Reduce, mix: Mix | None, workspace: Workspace, eps: float) -> None:
        room = workspace.room(spec.dtype, spec.cols)
        if tensors.quantised is not None:
            tensors = tensors._replace(quantised=tensors.quantised.view(torch.uint8))
        whole, places = tensors.input.numel(), room.regions[spec.two_shot].places
        if mix is not None:
            whole = mix.num_rows * spec.cols
        for begin, end in _pieces(whole, spec.cols, places):
            pieces = tensors if end - begin == whole else _rows_of(tensors, begin, end, spec.cols)
            pieces = pieces if mix is None else pieces._replace(input=tensors.input)
            launch(pieces, mix, room, eps, begin // spec.cols, end - begin)

    return run


def _bind_reduce_fp8(spec: CollectiveSpec, arch: Arch) -> Callable[[torch.Tensor, torch.Tensor, Workspace], None]:
    forms = [Fp8Config(spec.world_size, FP8_COLS, spec.group_size, cut, arch.converts_to_fp8) for cut in (False, True)]
    groups = FP8_COLS // spec.group_size

    def run(out: torch.Tensor, input: torch.Tensor, workspace: Workspace) -> None:
        num_bytes = min(workspace.max_bytes // spec.dtype.itemsize, LAUNCH_BYTES)
        rooms = (
            workspace.room(torch.float8_e4m3fn, FP8_COLS, num_bytes),
            workspace.room(torch.float32, groups, num_bytes * groups * 4 // FP8_COLS),
        )
        codes, scales = (mailbox_of(room, True) for room in rooms)
        codes = codes._replace(peers=tuple(x.view(torch.uint8) for x in codes.peers), own=codes.own.view(torch.uint8))
        for begin, end in _pieces(input.numel(), FP8_COLS, min(room.regions[True].places for room in rooms)):
            num_rows = triton.cdiv(end - begin, FP8_COLS)
            cfg = forms[end - begin < num_rows * FP8_COLS]
            greeting = greeting_of(rooms[0], word_of(spec, end - begin))
            pieces = out.view(-1)[begin:], input.view(-1)[begin:]
            key = token(spec, cfg, rooms[0].number, integer_classes((end - begin,)))
            arguments = (*pieces, codes, scales, greeting, num_rows, end - begin, cfg)
            grid = (programs_of(num_rows, FP8_WARPS, arch), 1, 1)
            _reduce_fp8(grid, (key, alignment(*pieces)), arguments, input.device, num_warps=FP8_WARPS)

    return run


def _bind_share(spec: CollectiveSpec, arch: Arch) -> Callable[[torch.Tensor, torch.Tensor, Workspace], None]:
    forms = [share_config(spec, cut) for cut in (False, True)]
    num_warps = warps_of(spec)

    def run(out: torch.Tensor, input: torch.Tensor, workspace: Workspace) -> None:
        room = workspace.room(spec.dtype, spec.cols)
        part, places = (out if forms[0].scatters else input).numel(), room.regions[0].places
        for begin, end in _pieces(part, spec.cols, places):
            greeting = greeting_of(room, word_of(spec, end - begin))
            num_rows = triton.cdiv(end - begin, spec.cols)
            cfg = forms[end - begin < num_rows * spec.cols]
            key = token(spec, cfg, room.number, integer_classes((part, end - begin)))
            pieces = out.view(-1)[begin:], input.view(-1)[begin:]
            arguments = (*pieces, mailbox_of(room, False), greeting, num_rows, end - begin, part, cfg)
            grid = (programs_of(num_rows, num_warps, arch), 1, 1)
            _share(grid, (key, alignment(*pieces)), arguments, input.device, num_warps=num_warps)

    return run


BINDERS: dict[str, Callable[[CollectiveSpec, Arch], Callable[..., None]]] = {
    "all_reduce": _bind_reduce,
    "all_reduce_fp8": _bind_reduce_fp8,
    "all_gather": _bind_share,
    "reduce_scatter": _bind_share,
}
