"""What of the Hopper products a CPU can judge: when they are chosen, how they are configured, what they are given."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from flashinfer.core.arch import SMEM_BYTES, Arch
from flashinfer.core.config import config
from flashinfer.core.select import select
from flashinfer.ops import gemm
from flashinfer.ops.gemm import IMPLS, Activation, Epilogue, Gemm, GemmSpec, Rows, Weights
from flashinfer.ops.gemm.gluon_sm90 import configs, gate, launch, packed
from flashinfer.ops.gemm.gluon_sm90.schedule import tile_place
from flashinfer.ops.gemm.support import gluon_sm90_supports

HOPPER = Arch("sm90", 132, SMEM_BYTES["sm90"], "3.6.0")
E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("spec", "change", "reason"),
    [
        (gate.BASE, {"row_dtype": torch.float32, "weight_dtype": torch.float32}, "16-bit"),
        (gate.BASE, {"weight_dtype": torch.float16}, "16-bit"),
        (gate.BASE, {"out_dtype": torch.float32}, "16-bit"),
        (gate.BASE, {"gathered": True}, None),
        (gate.BASE, {"gathered": True, "k": 4128}, "64 elements at a time"),
        (gate.BASE, {"gathered": True, "row_map": False}, "rows: .* multiples of 16 bytes"),
        (gate.BLOCK, {"gathered": True}, "gathered"),
        (gate.BASE, {"row_map": False}, "rows: .* multiples of 16 bytes"),
        (gate.BASE, {"weight_map": False}, "weights: .* multiples of 16 bytes"),
        (gate.BASE, {"out_map": False}, "out: .* multiples of 16 bytes"),
        (gate.BASE, {"transposed": True, "activation": "swiglu"}, "one box"),
        (gate.BASE, {"n": 4104, "activation": "geglu"}, "blocks of 8"),
        (gate.BLOCK, {"transposed": True}, "along K"),
        (gate.BLOCK, {"n": 4352, "activation": "swiglu"}, None),
        (gate.BLOCK, {"n": 4224, "activation": "swiglu"}, "blocks of 128"),
        (gate.BLOCK, {"scale_cols": 1}, "block scales"),
        (gate.BLOCK, {"scale_rows": 0}, "block scales"),
        (gate.BLOCK, {"row_dtype": torch.float8_e5m2}, "e4m3"),
        (gate.BLOCK, {"row_dtype": torch.bfloat16}, "e4m3"),
        (gate.MXFP4, {"kind": "nvfp4", "gathered": True, "activation": "swiglu"}, None),
        (gate.MXFP4, {"row_dtype": torch.float16}, "decoded to bf16"),
        (gate.MXFP4, {"few_rows": True}, "more than 32 rows"),
        (gate.MXFP4, {"transposed": True}, "along K"),
        (gate.MXFP4, {"weight_map": False}, "weights: .* multiples of 16 bytes"),
    ],
)
def test_each_refusal_has_its_reason(spec: GemmSpec, change: dict[str, Any], reason: str | None) -> None:
    assert gluon_sm90_supports(spec, HOPPER) is None
    found = gluon_sm90_supports(spec._replace(**change), HOPPER)
    assert found is None if reason is None else re.search(reason, str(found))


def test_other_architectures_and_compilers_are_refused() -> None:
    assert "Hopper" in str(gluon_sm90_supports(gate.BASE, replace(HOPPER, name="sm80")))
    for release in ("3.9.0", None):
        assert f"Triton {release}" in str(gluon_sm90_supports(gate.BASE, replace(HOPPER, triton=release)))


def test_auto_prefers_it() -> None:
    assert select(IMPLS, gate.BASE, HOPPER).name == select(IMPLS, gate.BASE, HOPPER, "fa3").name == "gluon_sm90"
    assert select(IMPLS, gate.BASE._replace(gathered=True, row_map=False), HOPPER).name == "triton"


# ---- Configurations


def chosen(spec: GemmSpec, num_rows: int, num_groups: int) -> configs.Launch:
    return configs.choose(spec, HOPPER, num_rows, num_groups, False)


@pytest.mark.parametrize(
    ("spec", "rows_a_group", "tile"),
    [
        (gate.BASE, 4, "swap16"),
        (gate.BASE, 17, "swap32"),
        (gate.BASE, 64, "64x128x2"),
        (gate.BASE, 65, "128x256t"),
        (gate.BASE, 256, "128x256t"),
        (gate.BASE, 257, "128x256"),
        (gate.BASE, 5000, "128x256"),
        (gate.BLOCK, 64, "64x128"),
        (gate.BLOCK, 200, "128x256"),
        (gate.MXFP4, 64, "64x128x2"),
        (gate.MXFP4, 128, "128x128"),
        (gate.MXFP4, 600, "256x128"),
    ],
)
def test_tiles_by_rows_a_group(spec: GemmSpec, rows_a_group: int, tile: str) -> None:
    wanted = configs.TILES[tile, configs.bits_of(spec)]
    config = chosen(spec, rows_a_group * 64, 64).kernel
    assert (config.block_m, config.block_n, config.stages) == (wanted.block_m, wanted.block_n, wanted.stages)
    assert (config.split_rows, config.weights_first) == (wanted.split_rows, wanted.weights_first)
    assert (config.turns, config.tail) == (wanted.turns, wanted.tail)


def test_few_rows_of_packed_weights_are_not_its_own() -> None:
    """By what the caller expects, or the mean."""
    x, out = torch.zeros(66, 64, dtype=torch.bfloat16), torch.zeros(66, 128, dtype=torch.bfloat16)
    weights = Weights(torch.zeros(2, 128, 32, dtype=torch.uint8), scale=torch.zeros(2, 128, 2), kind="mxfp4")
    for rows, expected, few in ((66, 0, False), (64, 0, True), (64, 33, False), (66, 32, True)):
        spec = Gemm(out[:rows], Rows(x[:rows]), weights, Epilogue(), expected).spec
        assert spec.few_rows == few
        assert select(IMPLS, spec, HOPPER).name == ("triton" if few else "gluon_sm90")
    assert not Gemm(out, Rows(x), Weights(out[None]), Epilogue(), 1).spec.few_rows


def test_few_tiles_are_narrower() -> None:
    one = gate.BLOCK._replace(layout="one", n=7168)
    assert [chosen(one, rows, 1).kernel.block_n for rows in (64, 128, 200, 4096)] == [64, 64, 128, 256]


def test_turns_are_for_two_warpgroups_that_scale() -> None:
    """Without block scales nobody measured them; one warpgroup has nobody to take turns with."""
    one = gate.BLOCK._replace(layout="one")
    wide, narrow = configs.TILES["128x256", 8], configs.TILES["64x64", 8]
    assert configs.configured(one, wide, 0, False).turns
    assert not configs.configured(gate.TENSOR._replace(layout="one"), wide, 0, True).turns
    assert not configs.configured(one, narrow._replace(turns=True), 0, False).turns


def test_barriers_are_enough() -> None:
    """Of the 16 of the hardware the compiler takes six; a stage takes one, and a warpgroup that takes turns."""
    for (name, _), tile in configs.TILES.items():
        assert 6 + tile.stages + 2 * tile.turns <= 16, name


def test_who_counts_tiles() -> None:
    """Where warpgroups share tiles by their rows, of many groups, and programs have more than one each."""
    wide, narrow = (configs.configured(gate.BASE, configs.TILES[name, 16], 32, False) for name in ("128x256", "64x256"))
    cpu = torch.device("cpu")
    alone = configs.configured(gate.BLOCK, configs.TILES["64x64", 8], 32, False)
    counts = [launch.taken_of(wide, 16, 528, 132, cpu), launch.taken_of(wide, 15, 999, 132, cpu)]
    counts += [launch.taken_of(wide, 99, 527, 132, cpu), launch.taken_of(narrow, 99, 999, 132, cpu)]
    counts += [launch.taken_of(alone, 99, 999, 132, cpu)]
    assert [count is not None for count in counts] == [True, False, False, False, False]
    assert counts[0] is not None and counts[0].tolist() == [0]


def test_tails_are_for_rows_of_groups_and_weights_by_rows() -> None:
    tile = configs.TILES["128x256t", 16]
    for changes, tail in (({}, 32), ({"transposed": True}, 0), ({"layout": "one"}, 0)):
        made = configs.configured(gate.BASE._replace(**changes), tile, 32, False)
        assert made.tail == tail and made.out_part == (64 if tail else 128)


def test_one_launch_serves_equal_classes() -> None:
    """A number of rows or groups of its own is no kernel of its own."""
    made = {id(chosen(gate.BASE, rows, groups)) for rows, groups in ((300, 9), (1000, 32), (999, 17))}
    assert len(made) == 2, "17 to 32 rows a group, and 33 to 64"
    assert chosen(gate.BASE, 9000, 300).kernel.many_groups and not chosen(gate.BASE, 9000, 256).kernel.many_groups


def test_registers_fit_the_multiprocessor() -> None:
    for (consumers, per_sm), (start, consumer, producer) in configs.REGISTERS.items():
        # Each warp of a producer's warpgroup has what that asked for.
        threads = 128 * (consumers + 1)
        assert threads * start * per_sm <= 65536
        if consumers > 1:
            assert 128 * (consumer * consumers + producer) <= threads * start
    assert {(tile.consumers, tile.per_sm) for tile in configs.TILES.values()} <= set(configs.REGISTERS)


def test_an_imposed_tile_holds_inside_its_context_only() -> None:
    before = chosen(gate.BASE, 640, 10)
    with configs.imposed(configs.TILES["swap16", 16]):
        assert chosen(gate.BASE, 640, 10).kernel.block_m == 16
    assert chosen(gate.BASE, 640, 10) is before


# ---- What the kernel is given


def given(tensors: Gemm, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and arguments of the launch, by the kernel's names."""
    calls: list[Any] = []
    monkeypatch.setattr(launch, "_launch", lambda *args, **options: calls.append(args))
    launch.bind(tensors.spec, HOPPER)(tensors)
    ((grid, _, arguments, *_),) = calls
    return grid, dict(zip(launch.grouped_kernel.arg_names, arguments, strict=True))


BITS = {"half": 16, "fp8": 8, "fp4": 4}


def problem(kind: str, activation: str | None = None) -> Gemm:
    dtype = {"half": torch.float16, "fp8": E4M3, "fp4": torch.bfloat16}[kind]
    x, w = torch.zeros(300, 256).to(dtype), torch.zeros(5, 512, 256).to(dtype)
    indptr = torch.tensor([0, 10, 10, 200, 240, 300], dtype=torch.int32)
    epilogue = Epilogue(None, Activation(activation)) if activation else Epilogue()
    scale = torch.ones(300, 2) if kind == "fp8" else None
    weights = {
        "half": Weights(w),
        "fp8": Weights(w, scale=torch.ones(5, 4, 2), kind="fp8_block"),
        "fp4": Weights(
            torch.zeros(5, 512, 128, dtype=torch.uint8), scale=torch.ones(5, 512, 8).to(torch.uint8), kind="mxfp4"
        ),
    }[kind]
    out = torch.zeros(300, 256 if activation == "swiglu" else 512, dtype=torch.float16)
    return Gemm(out, Rows(x, indptr, scale=scale), weights, epilogue)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_the_launch_is_the_one_that_the_gate_compiles(kind, activation, monkeypatch) -> None:
    tensors = problem(kind, activation)
    name = "256x128" if kind == "fp4" else "128x256"
    with configs.imposed(configs.TILES[name, BITS[kind]]):
        _, arguments = given(tensors, monkeypatch)
    made = gate.Problem("x", tensors.spec)
    compiled = gate._case(made, name)
    assert list(compiled.signature) == list(arguments)
    cfg = compiled.constexprs[list(arguments).index("cfg"),]
    assert cfg == arguments["cfg"]
    for name in ("x_source", "w_desc", "o_desc"):
        made_map = arguments[name]
        assert str(list(made_map.block_shape)) in compiled.signature[name]
        assert repr(made_map.layout) in compiled.signature[name]


@pytest.mark.parametrize(("kind", "block"), [("half", 8), ("fp8", 128), ("fp4", 8)])
def test_pairs_of_up_and_gate_are_one_box(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The view that the map has of the weights puts blocks of up before those of their gates."""
    tensors = problem(kind, "swiglu")
    numbers = torch.arange(512)[None, :, None].expand(tensors.weights.values.shape)
    with configs.imposed(configs.TILES["256x128" if kind == "fp4" else "128x256", BITS[kind]]):
        _, arguments = given(tensors, monkeypatch)
    made = arguments["w_desc"]
    seen = numbers.contiguous().as_strided(made.shape, made.strides)
    box = seen[0, : made.block_shape[1], :, :, 0].reshape(-1)
    columns = arguments["cfg"].out_columns
    expected = [half * 256 + at + i for at in range(0, columns, block) for half in (0, 1) for i in range(block)]
    assert box.tolist() == expected and len(expected) == arguments["cfg"].block_n


def test_maps_of_transposed_weights_and_views(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = problem("half")
    stored = torch.zeros(5, 256, 520, dtype=torch.float16)[..., :512]
    tensors = tensors._replace(weights=Weights(stored.transpose(1, 2)))
    _, arguments = given(tensors, monkeypatch)
    assert arguments["w_desc"].shape == [5, 256, 512] and arguments["w_desc"].strides == [256 * 520, 520, 1]
    assert arguments["cfg"].n_major and arguments["scales"] is None and arguments["finish"] is None


def test_a_grid_is_no_larger_than_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = problem("half")
    few = tensors._replace(out=tensors.out[:3])
    grid, arguments = given(few, monkeypatch)
    assert grid == (3 * 512 // arguments["cfg"].out_columns, 1, 1)
    assert given(problem("half"), monkeypatch)[0][0] <= 2 * HOPPER.num_sms


def test_expected_rows_decide_about_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for many rows a group of which few exist."""
    tensors = problem("half")
    tall, low = (given(tensors._replace(expected_rows=n), monkeypatch)[1]["cfg"].block_m for n in (100, 10))
    assert (tall, low) == (64, 16)


def test_a_factor_of_the_sums_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """`global_scale` with weights of any kind."""
    tensors = problem("half")
    tensors = tensors._replace(weights=tensors.weights._replace(global_scale=torch.ones(5)))
    _, arguments = given(tensors, monkeypatch)
    assert arguments["cfg"].finishes and arguments["finish"].matrix_stride == 1


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_threads_load_the_codes_that_they_multiply(blocks: int) -> None:
    """Both numbers of a byte: PTX ISA, wgmma, register fragments of m64k16, for four of these side by side."""
    layout = packed.codes_layout(blocks)
    width = 32 // blocks
    for thread in range(128):
        warp, row, column = thread // 32, thread % 32 // 4, thread % 4 * 2
        columns = [16 * step + column + 8 * far for step in range(4) for far in (0, 1)]
        wanted = {(16 * warp + row + 8 * low, k // 2) for k in columns for low in (0, 1)}
        found = set()
        for register in range(16):
            bases = [layout.reg_bases[i] for i in range(4) if register >> i & 1]
            bases += [layout.lane_bases[i] for i in range(5) if thread >> i & 1]
            bases += [layout.warp_bases[i] for i in range(2) if warp >> i & 1]
            at = [0, 0, 0]
            for basis in bases:
                at = [a ^ b for a, b in zip(at, basis, strict=True)]
            found.add((at[0], at[1] * width + at[2]))
        assert found == wanted


# ---- The order of tiles


@triton.jit
def order_kernel(out, rows, column_tiles, count, BLOCK_M: tl.constexpr, BAND: tl.constexpr, TAIL: tl.constexpr):
    for n in range(count):
        row_tile, column_tile = tile_place(n, rows, column_tiles, BLOCK_M, BAND, TAIL)
        tl.store(out + 2 * n, row_tile)
        tl.store(out + 2 * n + 1, column_tile)


@pytest.mark.skipif(not (config().triton_interpret or torch.cuda.is_available()), reason="needs Triton to run")
def test_tiles_come_once_in_bands(rng: random.Random) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for _ in range(20):
        rows, column_tiles, block_m, band = (
            rng.randint(1, 900),
            rng.randint(1, 7),
            rng.choice([16, 64]),
            rng.choice([1, 8]),
        )
        tail = rng.choice([0, 8])
        row_tiles = max(1, -(-(rows - tail) // block_m))
        expected = [
            (row, column)
            for first in range(0, row_tiles, band)
            for column in range(column_tiles)
            for row in range(first, min(first + band, row_tiles))
        ]
        out = torch.full((len(expected), 2), -1, dtype=torch.int32, device=device)
        order_kernel[(1,)](out, rows, column_tiles, len(expected), block_m, band, tail)
        assert list(map(tuple, out.tolist())) == expected


def test_every_activation_is_known() -> None:
    for name in gemm.ACTIVATIONS:
        config = configs.configured(gate.BASE._replace(activation=name), configs.TILES["64x256", 16], 32, True)
        assert config.gated == (name in gemm.GATED) and (config.activation is None) == (name == "identity")
