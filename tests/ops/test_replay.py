"""Repeated eager calls: the launch of a repetition is that of the call with checks, for every public function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch

import flashinfer
from flashinfer import activation, cascade, concat_ops, gemm, grouped_mm, norm, page, quantization, rope, sampling, topk
from flashinfer.core import replay
from flashinfer.core.scratch import Needs
from flashinfer.ops.gemm import Activation, Weights
from flashinfer.ops.moe import Experts, Routes, moe
from flashinfer.ops.sampling import Filters, scratch_for
from tests.ops.common import force

OPS = ("norm", "activation", "rope", "page", "quantization", "merge", "gemm", "moe")
F16, FP8 = torch.float16, torch.float8_e4m3fn
Problem = tuple[Callable[..., Any], tuple[Any, ...]]


def randn(*shape: int, dtype: torch.dtype = F16, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


class Fresh:
    """New tensors on a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def half(self, *shape: int) -> torch.Tensor:
        return randn(*shape, device=self.device)

    def fp8(self, *shape: int) -> torch.Tensor:
        return self.codes(*shape).view(FP8)

    def codes(self, *shape: int) -> torch.Tensor:
        return torch.randint(1, 99, shape, dtype=torch.uint8, device=self.device)

    def int32(self, *rows: list[int]) -> list[torch.Tensor]:
        return [torch.tensor(row, dtype=torch.int32, device=self.device) for row in rows]

    def heads(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and their positions."""
        return self.half(5, 4, 16), self.half(5, 2, 16), torch.randint(9, (5,), device=self.device)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of cosines and sines: for 8 components, for 16."""
        return torch.randn(9, 8, device=self.device), torch.randn(9, 16, device=self.device)

    def where(self) -> list[torch.Tensor]:
        """Requests and positions of 5 tokens."""
        return self.int32([0, 0, 1, 1, 1], [0, 1, 0, 1, 2])

    def pages(self) -> list[torch.Tensor]:
        """Page numbers, their prefix sums, tokens of last pages."""
        return self.int32([3, 0, 2], [0, 1, 3], [2, 1])

    def scale(self, size: int = 1) -> torch.Tensor:
        return torch.rand(size, device=self.device) + 0.5


def row_problems(fresh: Fresh) -> dict[str, Problem]:
    half, fp8 = fresh.half, fresh.fp8
    x, weight, scale = half(5, 64), half(64), fresh.scale()
    return {
        "rmsnorm": (norm.rmsnorm, (x, weight)),
        "rmsnorm_out": (norm.rmsnorm, (x, weight, 1e-5, half(5, 64))),
        "rmsnorm_in_place": (norm.rmsnorm, (x, weight, 1e-5, x)),
        "gemma_rmsnorm": (norm.gemma_rmsnorm, (half(2, 3, 8), half(8))),
        "fused_add_rmsnorm": (norm.fused_add_rmsnorm, (x, half(5, 64), weight)),
        "rmsnorm_quant": (norm.rmsnorm_quant, (fp8(5, 64), x, weight, scale)),
        "fused_add_rmsnorm_quant": (norm.fused_add_rmsnorm_quant, (fp8(5, 64), x, half(5, 64), weight, scale)),
        "layernorm": (norm.layernorm, (x, weight.float(), half(64).float())),
        "layernorm_quant": (norm.layernorm_quant, (fp8(5, 64), x, weight.float(), half(64).float(), scale)),
        "silu_and_mul": (activation.silu_and_mul, (x,)),
        "silu_and_mul_out": (activation.silu_and_mul, (x, half(5, 32))),
        "silu_and_mul_quant": (activation.silu_and_mul_quant, (fp8(5, 32), x, scale)),
        "group_quant": (quantization.per_token_group_quant_8bit, (x, 16)),
        "tensor_quant": (quantization.per_tensor_quant_8bit, (x, scale)),
        "concat_mla_k": (concat_ops.concat_mla_k, (half(5, 4, 24), half(5, 4, 16), half(5, 1, 8))),
    }


def rope_problems(fresh: Fresh) -> dict[str, Problem]:
    half, fp8, where, pages = fresh.half, fresh.fp8, fresh.where(), fresh.pages()
    (q, k, positions), (table, wide_table) = fresh.heads(), fresh.tables()
    (indptr,) = fresh.int32([0, 2, 5])
    return {
        "rope": (rope.apply_rope, (q, k, indptr, indptr[:2].clone())),
        "rope_partial": (rope.apply_rope_inplace, (q, k, indptr, indptr[:2].clone(), 8)),
        "rope_pos_ids_inplace": (rope.apply_rope_pos_ids_inplace, (q, k, positions)),
        "rope_pos_ids_partial": (rope.apply_rope_pos_ids, (q, k, positions, 8)),
        "llama31": (rope.apply_llama31_rope_pos_ids_inplace, (q, k, positions)),
        "rope_cached_inplace": (
            rope.apply_rope_with_cos_sin_cache_inplace,
            (positions, q.view(5, -1), k.view(5, -1), 16, table),
        ),
        "rope_cached": (rope.apply_rope_with_cos_sin_cache, (positions, q.view(5, -1), k.view(5, -1), 16, table)),
        "qk_rmsnorm_rope": (rope.qk_rmsnorm_rope_inplace, (q, k, half(16), half(16), positions, table)),
        "rope_quantize": (rope.rope_quantize_fp8, (q, k, half(5, 4, 8), half(5, 2, 8), wide_table, positions)),
        "mla_rope_quantize": (
            rope.mla_rope_quantize_fp8,
            (q, half(5, 16), half(5, 4, 32), half(5, 32), wide_table, positions),
        ),
        "rope_quantize_append": (
            rope.rope_quantize_fp8_append_paged_kv_cache,
            (
                *(q, k, half(5, 4, 8), half(5, 2, 8), half(5, 2, 16), wide_table, positions),
                *((fp8(4, 2, 2, 24), fp8(4, 2, 2, 16)), *pages[:2], *where),
                *(True, None, 1.0, 2.0, 2),
            ),
        ),
    }


def page_problems(fresh: Fresh) -> dict[str, Problem]:
    half, fp8, codes, where, pages = fresh.half, fresh.fp8, fresh.codes, fresh.where(), fresh.pages()
    caches, rows = (half(4, 2, 2, 16), half(4, 2, 2, 16)), (half(5, 2, 16), half(5, 2, 16))
    scale, scales = fresh.scale(), (fresh.scale(2), fresh.scale(2))
    slots = torch.tensor([3, -1, 0, 6, 7], device=fresh.device)
    return {
        "append": (page.append_paged_kv_cache, (*rows, *where, caches, *pages)),
        "append_joined": (page.append_paged_kv_cache, (*rows, *where, half(4, 2, 2, 2, 16), *pages)),
        "append_mla": (
            page.append_paged_mla_kv_cache,
            (half(5, 32), half(5, 8), *where, half(4, 2, 32), half(4, 2, 8), *pages),
        ),
        "append_slots": (page.append_paged_kv_cache_with_slot_mapping, (*rows, slots, caches)),
        "append_slots_scaled": (page.append_paged_kv_cache_with_slot_mapping, (*rows, slots, caches, *scales)),
        "append_quantized": (
            page.quantize_append_paged_kv_cache,
            (*rows, *where, (fp8(4, 2, 2, 16), fp8(4, 2, 2, 16)), *pages, 2.0, 3.0),
        ),
        "seq_lens": (page.get_seq_lens, (*pages[1:], 2)),
        "append_fp4": (
            page.nvfp4_quantize_append_paged_kv_cache,
            (*rows, *where, (codes(4, 2, 2, 8), codes(4, 2, 2, 8)), codes(4, 2, 2, 2, 1), *pages, 2.0, 3.0),
        ),
        "append_fp4_slots": (
            page.nvfp4_quantize_append_paged_kv_cache_with_slot_mapping,
            (*rows, slots, codes(4, 2, 2, 2, 8), codes(4, 2, 2, 2, 1), 2.0, 3.0),
        ),
        "dequantize_fp4_pages": (
            quantization.nvfp4_kv_dequantize_paged,
            (
                codes(4, 2, 2, 2, 8),
                codes(4, 2, 2, 2, 1),
                torch.tensor([[1], [3]], dtype=torch.int32, device=fresh.device),
                pages[2],
                *(scale, scale.clone()),
                half(2, 2, 2, 16).zero_(),
                half(2, 2, 2, 16).zero_(),
            ),
        ),
    }


def merge_problems(fresh: Fresh) -> dict[str, Problem]:
    half, pair = fresh.half, (fresh.half(5, 3, 16), fresh.scale(15).view(5, 3))
    states = (half(5, 4, 3, 16), fresh.scale(60).view(5, 4, 3))
    other = (states[0][:, 1], states[1][:, 1])
    mask = torch.tensor([True, False, True, True, False], device=fresh.device)
    return {
        "merge_state": (cascade.merge_state, (*pair, *other)),
        "merge_state_in_place": (cascade.merge_state_in_place, (*pair, *other)),
        "merge_state_masked": (cascade.merge_state_in_place, (*pair, *other, mask)),
        "merge_states": (cascade.merge_states, states),
    }


def segments(*arguments: Any) -> torch.Tensor:
    return gemm.SegmentGEMMWrapper(torch.empty(0)).run(*arguments)


def mixture(*arguments: torch.Tensor, kind: str = "plain") -> torch.Tensor:
    """Of x, ids, weights, both matrices, their scales, and scratch memory."""
    x, ids, weights, fc1, fc2, scale1, scale2, scratch = arguments
    blocks = [Weights(fc1, scale=scale1, kind=kind), Weights(fc2, scale=scale2, kind=kind)]
    plain = [Weights(fc1), Weights(fc2)]
    experts = Experts(*(plain if kind == "plain" else blocks), Activation("swiglu"))
    return moe(x, Routes(ids, weights), experts, scratch=scratch)


def block_mixture(*arguments: torch.Tensor) -> torch.Tensor:
    return mixture(*arguments, kind="fp8_block")


def gemm_problems(fresh: Fresh) -> dict[str, Problem]:
    half, fp8, scale = fresh.half, fresh.fp8, fresh.scale
    (indptr, lengths, indices) = fresh.int32([0, 2, 5], [2, 1], [1, 0])
    x, marks = half(5, 64), torch.zeros(128, dtype=torch.int32, device=fresh.device)
    a_scale, b_scale = scale(10).view(5, 2), scale(8).view(2, 2, 2)
    return {
        "segments": (segments, (x, half(2, 32, 64), 2, True, None, None, indptr)),
        "segments_row_major": (segments, (x, half(2, 64, 32), 2, False, half(5, 32), None, indptr, indices)),
        "grouped_mm": (grouped_mm.grouped_mm_bf16, (x, half(2, 32, 64), indptr, None, F16)),
        "fp8": (
            partial(gemm.gemm_fp8_nt_groupwise, out_dtype=F16),
            (fp8(5, 256), fp8(256, 256), a_scale, b_scale[0], "K"),
        ),
        "fp8_groups": (
            partial(gemm.group_gemm_fp8_nt_groupwise, out_dtype=F16),
            (fp8(5, 256), fp8(2, 256, 256), a_scale, b_scale, indptr, (1, 128, 128), "K"),
        ),
        "fp8_marked": (
            partial(gemm.group_deepgemm_fp8_nt_groupwise, out_dtype=F16),
            (fp8(128, 256), fp8(2, 256, 256), scale(256).view(128, 2), b_scale, marks),
        ),
        "fp8_masked": (
            partial(gemm.batch_deepgemm_fp8_nt_groupwise, out_dtype=F16),
            (fp8(2, 5, 256), fp8(2, 256, 256), scale(20).view(2, 5, 2), b_scale, lengths, 2),
        ),
    }


def moe_problems(fresh: Fresh) -> dict[str, Problem]:
    """Few tokens, sorted ones, many."""
    found: dict[str, Problem] = {}
    for tokens in (5, 33, 65):
        x, weights = fresh.half(tokens, 128), fresh.scale(2 * tokens).view(tokens, 2)
        ids = torch.randint(4, (tokens, 2), dtype=torch.int32, device=fresh.device)
        # Zeros are bounds of groups that those who read them on the CPU accept.
        scratch = torch.zeros(1 << 20, dtype=torch.uint8, device=fresh.device)
        blocks, sides = (fresh.scale(8).view(4, 2, 1), fresh.scale(4).view(4, 1, 1), scratch), (x, ids, weights)
        found[f"moe_{tokens}"] = (mixture, (*sides, fresh.half(4, 256, 128), fresh.half(4, 128, 128), *blocks))
        codes = (fresh.fp8(4, 256, 128), fresh.fp8(4, 128, 128))
        found[f"moe_fp8_{tokens}"] = (block_mixture, (*sides, *codes, *blocks))
    return found


def problems(device: str) -> dict[str, Problem]:
    """Fresh arguments of each function."""
    fresh = Fresh(device)
    kinds = (row_problems, rope_problems, page_problems, merge_problems, gemm_problems, moe_problems)
    parts = [kind(fresh) for kind in kinds]
    return {name: problem for part in parts for name, problem in part.items()}


NAMES = tuple(problems("cpu"))


class Compiled:
    """Stands for a compiled kernel, whose launches are noted in `log`."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.log.append(("again", grid, as_addresses(arguments)))


def as_addresses(x: Any) -> Any:
    """What a launch is given, with addresses for tensors."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    if type(x).__name__ == "TensorDescriptor":
        return "map", x.base.data_ptr(), *map(tuple, (x.shape, x.strides, x.block_shape)), x.padding
    return tuple(map(as_addresses, x)) if isinstance(x, tuple) else x


def log_launches(monkeypatch: pytest.MonkeyPatch, found: Compiled) -> None:
    """Launches, first and repeated ones, go to `found.log`; tensors look like those of a GPU."""
    from flashinfer.core import launch

    def call(self: Any, grid: Any, key: Any, arguments: tuple[Any, ...], device: Any, **options: Any) -> None:
        found.log.append(("first", grid, as_addresses(arguments)))
        if replay.recording.tensors is not None:
            replay.recording.launches.append(launch.again(found, grid, arguments, 0, False))

    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0, raising=False)
    monkeypatch.setattr(launch.Prebound, "__call__", call)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """The Triton implementations on tensors that look like those of a GPU, launching nothing."""
    pytest.importorskip("triton")
    for op in OPS:
        force(monkeypatch, op, "triton")
    found = Compiled()
    log_launches(monkeypatch, found)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_repetition_launches_what_a_call_with_checks_would(name: str, compiled: Compiled) -> None:
    function, arguments = problems("cpu")[name]
    function(*arguments)
    function, arguments = problems("cpu")[name]
    made = function(*arguments)
    launches = len(compiled.log) // 2
    again = compiled.log[launches:]
    assert launches > 0 and len(again) == launches
    replay.forget()
    made_with_checks = function(*arguments)
    for (kind, grid, repeated), (other, other_grid, checked) in zip(again, compiled.log[-launches:], strict=True):
        assert (kind, other) == ("again", "first") and grid == other_grid
        assert located(repeated, (arguments, made)) == located(checked, (arguments, made_with_checks))


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_first_call_leaves_no_trace_that_a_repetition_would_not(name: str, compiled: Compiled) -> None:
    """On tensors with gradients too: no version counter moves, nothing gets a history.

    And nothing is written but by launches, which do nothing here: a repetition makes those only.
    """
    for kind in ("first", "again"):
        function, arguments = problems("cpu")[name]
        tensors = flat(arguments)
        for x in tensors:
            x.requires_grad_(x.dtype in (torch.float32, torch.float16))
        before, contents = [(x._version, x.requires_grad) for x in tensors], [*map(bits, tensors)]
        compiled.log.clear()
        made = function(*arguments)
        assert [entry[0] for entry in compiled.log] == [kind] * len(compiled.log) and compiled.log
        assert [(x._version, x.requires_grad) for x in tensors] == before
        assert all(torch.equal(bits(x), content) for x, content in zip(tensors, contents, strict=True))
        assert all(x.grad_fn is None for x in [*tensors, *flat(made)])


class Kind(NamedTuple):
    """Calls that get their scratch memory by one name; more, less: one that takes more of it than the other."""

    memory: Callable[[], torch.Tensor | None]
    more: Callable[[torch.Tensor | None], None]
    less: Callable[[torch.Tensor | None], None]


def kinds_of_sampling(fresh: Fresh) -> dict[str, Kind]:
    x, (starts, lengths, tokens) = fresh.scale(6000).view(1, -1), fresh.int32([7], [5000], [0])
    largest, filters = (fresh.half(1, 4).float(), fresh.int32([0] * 4)[0].view(1, 4)), tuple(Filters(top_k=3))
    random = (replay.Number(1), replay.Number(2))

    def select(scratch: torch.Tensor | None, starts: torch.Tensor | None) -> None:
        topk._select(largest, x, (starts, lengths), scratch, 4, 0, torch.int32, "triton")

    def draw(scratch: torch.Tensor | None, logits: bool) -> None:
        sampling._draw(x, (tokens, None), scratch, tuple(Filters()), random, random, None, logits)

    def keep(scratch: torch.Tensor | None, logits: bool) -> None:
        sampling._keep(torch.empty_like(x), x, filters, scratch, logits)

    return {
        "select": Kind(
            partial(scratch_for, "select", x, 4), partial(select, starts=starts), partial(select, starts=None)
        ),
        "draw": Kind(partial(scratch_for, "", x, 1), partial(draw, logits=True), partial(draw, logits=False)),
        "keep": Kind(partial(scratch_for, "keep_k", x), partial(keep, logits=False), partial(keep, logits=True)),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
@pytest.mark.parametrize("name", kinds_of_sampling(Fresh("cpu")))
def test_a_call_that_takes_less_scratch_memory_leaves_enough_for_one_that_takes_more(
    name: str, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less than it takes, a call would make tensors of its own and could not be repeated."""
    triton = import_module("flashinfer.ops.sampling.triton")
    monkeypatch.setattr("flashinfer.ops.sampling._impl", lambda *_: triton)
    monkeypatch.setattr("flashinfer.ops.sampling._needs", Needs())
    memory, more, less = kinds_of_sampling(Fresh("cpu"))[name]
    for call in (less, less, more, more, less, more):
        compiled.log.clear()
        call(memory())
    assert {kind for kind, *_ in compiled.log} == {"again"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for several GPUs")
def test_a_repetition_goes_to_the_device_of_its_tensors(compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer.core import launch

    current, visited = [1], []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        visited.append(index)
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    x = torch.zeros(3)
    monkeypatch.setattr(replay.recording, "tensors", [x], raising=False)
    for index in (0, 1):
        repeat = launch.again(compiled, (1, 1, 1), (x, 2), index, False)
        assert repeat is not None
        repeat.launch([16])
    assert visited == [0] and compiled.log == [("again", (1, 1, 1), (16, 2))] * 2


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def flat(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for part in x for t in flat(part)] if isinstance(x, tuple) else []


def located(values: Any, tensors: Any) -> Any:
    """`values` with addresses inside of the storage of a tensor told as (which tensor, offset in bytes)."""
    if isinstance(values, tuple):
        return tuple(located(value, tensors) for value in values)
    for i, storage in enumerate(x.untyped_storage() for x in flat(tensors)):
        if type(values) is int and storage.data_ptr() <= values < storage.data_ptr() + storage.nbytes():
            return i, values - storage.data_ptr()
    return values


# ---- on a GPU: results


def clones(x: Any) -> Any:
    """Copies of tensors, one for one: what was the same tensor stays so."""
    known: dict[int, torch.Tensor] = {}

    def copy(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return known.setdefault(id(x), x.clone())
        return tuple(map(copy, x)) if isinstance(x, tuple) else x

    return copy(x)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_repetitions_give_the_same_bits(name: str) -> None:
    replay.forget()
    function, arguments = problems("cuda")[name]
    function(*arguments)
    _, arguments = problems("cuda")[name]
    other = clones(arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        repeated = function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    replay.forget()
    checked = function(*other)
    for ours, theirs in zip(flat((repeated, *arguments)), flat((checked, *other)), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.gpu
def test_checks_are_made_after_repetitions() -> None:
    x, weight, out = (torch.randn(*shape, device="cuda") for shape in ((4, 64), (64,), (4, 64)))
    for _ in range(3):
        flashinfer.rmsnorm(x, weight, out=out)
    for wrong in (out.half(), out[:3], out.cpu(), torch.randn(64, 4, device="cuda").t()):
        with pytest.raises(ValueError, match="out"):
            flashinfer.rmsnorm(x, weight, out=wrong)
    flashinfer.rmsnorm(x, weight, out=out)


def test_modules_have_their_choice() -> None:
    for op in OPS:
        assert import_module(f"flashinfer.ops.{op}").CHOICE.auto == "auto"
