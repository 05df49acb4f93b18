"""What the offline compile gate compiles of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from flashinfer.core.arch import SMEM_BYTES, Arch
from flashinfer.device.mailbox import Greeting, Mailbox
from flashinfer.ops.collectives.plan import FP8_COLS, ROW_BYTES
from flashinfer.ops.collectives.spec import CollectiveSpec
from flashinfer.ops.collectives.triton.fp8 import Fp8Config, reduce_fp8_kernel
from flashinfer.ops.collectives.triton.launch import FP8_WARPS, reduce_config, share_config, warps_of
from flashinfer.ops.collectives.triton.reduce import Mixed, Reduced, reduce_kernel
from flashinfer.ops.collectives.triton.share import share_kernel
from flashinfer.testing.gate import ALL_ARCHS, FP8_ARCHS, OTHER_ARCHS, Constant, GateCase, Typed, case_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NUM_SMS, ADDRESS = 132, Typed("i64")
# dtype, elements of a row, ranks, this rank (Triton takes 1 for a constant), two shots
PLAIN = ((BF16, 2, 0, False), (BF16, 2, 1, True), (FP16, 4, 3, True), (FP32, 8, 5, False), (FP32, 3, 2, True))
NORMS = ((BF16, 8192, 2, False), (BF16, 7168, 8, True), (FP16, 2880, 4, False), (FP32, 16384, 2, False))


def _arch(name: str) -> Arch:
    return Arch(name, NUM_SMS, SMEM_BYTES.get(name, 0))


def _mailbox(dtype: torch.dtype, world_size: int, rank: int) -> Mailbox:
    box, state = torch.empty(0, dtype=dtype), torch.empty(0, dtype=torch.int32)
    first, turn, limit = 1 << 20, 1 << 16, 1 << 26
    return Mailbox((box,) * world_size, box, first, turn, state, state, ADDRESS, rank, limit)  # type: ignore[arg-type]


def _greeting(world_size: int) -> Greeting:
    words = torch.empty(0, dtype=torch.int64)
    return Greeting((words,) * world_size, words, torch.empty(0, dtype=torch.int32), ADDRESS)  # type: ignore[arg-type]


def _reduce(
    name: str,
    spec: CollectiveSpec,
    rank: int,
    tensors: Reduced,
    archs: tuple[str, ...] = ALL_ARCHS,
    mixed: Mixed | None = None,
) -> GateCase:
    """An all-reduce with these tensors beside the input."""
    arguments = {
        "input": torch.empty(0, dtype=spec.dtype),
        "tensors": tensors,
        "mixed": mixed,
        "box": _mailbox(spec.dtype, spec.world_size, rank),
        "greeting": _greeting(spec.world_size),
        "num_rows": 7,
        "num_elements": 1 << 15,
        "first_row": 7,
        "num_tokens": 7,
        "num_parts": 7,
        "eps": 1e-6,
        "cfg": Constant(reduce_config(spec, _arch(archs[0]), spec.weight_bias is None, mixed is not None)),
    }
    options = {"num_warps": warps_of(spec)}
    return case_of(name, reduce_kernel, arguments, options=options, archs=archs, max_spill_bytes=_spills(spec))


def _spills(spec: CollectiveSpec) -> int | None:
    """What may be spilled: anything where the rows of many ranks, or wide rows, are read; it hides behind the link."""
    return 0 if spec.world_size == 2 and spec.cols <= 8192 else None


def _mixes() -> Iterator[GateCase]:
    """Sums over experts before the sum over ranks, and a norm with codes by rows after it."""
    table, scale = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=FP32)
    for (dtype, cols, world_size, two_shot), by_table in product(NORMS[:3], (True, False)):
        x, name = torch.empty(0, dtype=dtype), f"mixed_all_reduce.{str(dtype)[6:]}.{cols}.{world_size}"
        spec = CollectiveSpec("all_reduce", dtype, cols, world_size, two_shot, True, 0.0)
        mixed = Mixed(table if by_table else None, x if by_table else scale, x, 2.5)
        tensors = Reduced(None, x, x, x, x, None, None, None)
        yield _reduce(f"{name}.table" if by_table else name, spec, 0, tensors, mixed=mixed)
    for archs in (FP8_ARCHS, OTHER_ARCHS):
        x, codes = torch.empty(0, dtype=BF16), torch.empty(0, dtype=torch.uint8)
        spec = CollectiveSpec("all_reduce", BF16, 8192, 2, False, True, 0.0, torch.float8_e4m3fn)
        tensors = Reduced(None, x, x, None, x, codes, None, scale)
        yield _reduce(f"all_reduce_norm.rows.{archs[0]}", spec, 0, tensors, archs)


def _fp8() -> Iterator[GateCase]:
    """What is sent as fp8."""
    for archs, world_size, group, rank in ((FP8_ARCHS, 2, 256, 0), (OTHER_ARCHS, 2, 128, 0), (FP8_ARCHS, 8, 128, 3)):
        x = torch.empty(0, dtype=BF16)
        arguments = {
            "out": x,
            "input": x,
            "codes": _mailbox(torch.uint8, world_size, rank),
            "scales": _mailbox(FP32, world_size, rank),
            "greeting": _greeting(world_size),
            "num_rows": 7,
            "num_elements": 1 << 15,
            "cfg": Constant(Fp8Config(world_size, FP8_COLS, group, True, archs is FP8_ARCHS)),
        }
        options = {"num_warps": FP8_WARPS}
        name = f"all_reduce_fp8.{world_size}.{group}.{archs[0]}"
        yield case_of(name, reduce_fp8_kernel, arguments, options=options, archs=archs)


def cases() -> Iterator[GateCase]:
    """Sums alone, with what follows them, and the exchanges without sums."""
    for dtype, world_size, rank, two_shot in PLAIN:
        cols, x = ROW_BYTES // dtype.itemsize, torch.empty(0, dtype=dtype)
        spec = CollectiveSpec("all_reduce", dtype, cols, world_size, two_shot)
        name = f"all_reduce.{str(dtype)[6:]}.{world_size}.rank{rank}{'.two' if two_shot else ''}"
        yield _reduce(name, spec, rank, Reduced(x, *[None] * 7))
    for (dtype, cols, world_size, two_shot), quantised in product(NORMS, (None, torch.float8_e4m3fn)):
        x, codes = torch.empty(0, dtype=dtype), torch.empty(0, dtype=torch.uint8)
        spec = CollectiveSpec("all_reduce", dtype, cols, world_size, two_shot, True, 0.0, quantised)
        scale = torch.empty(0, dtype=FP32) if quantised else None
        tensors = Reduced(None, x, x, x, x, codes if quantised else None, scale, None)
        name = f"all_reduce_norm.{str(dtype)[6:]}.{cols}.{world_size}"
        yield from (
            _reduce(f"{name}.fp8.{archs[0]}" if quantised else name, spec, 0, tensors, archs)
            for archs in ((FP8_ARCHS, OTHER_ARCHS) if quantised else (ALL_ARCHS,))
        )
    yield from _mixes()
    yield from _fp8()
    for kind, (dtype, world_size, rank, _) in product(("all_gather", "reduce_scatter"), PLAIN[:4]):
        x = torch.empty(0, dtype=dtype)
        spec = CollectiveSpec(kind, dtype, ROW_BYTES // dtype.itemsize, world_size)
        arguments = {
            "out": x,
            "input": x,
            "box": _mailbox(dtype, world_size, rank),
            "greeting": _greeting(world_size),
            "num_rows": 7,
            "num_elements": 1 << 15,
            "part": 1 << 16,
            "cfg": Constant(share_config(spec, True)),
        }
        options = {"num_warps": warps_of(spec)}
        name = f"{kind}.{str(dtype)[6:]}.{world_size}.rank{rank}"
        yield case_of(name, share_kernel, arguments, options=options, max_spill_bytes=_spills(spec))
