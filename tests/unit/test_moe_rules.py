"""How a mixture of few tokens is cut: heights and depths of tiles, and whose measurements count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the rules stand beside Triton's kernels")

from flashinfer.core import tuning
from flashinfer.core.arch import SMEM_BYTES, Arch
from flashinfer.ops.moe.triton import configs
from flashinfer.ops.moe.triton.gate import BF16, spec_of

HOPPER = Arch("sm90", 132, SMEM_BYTES["sm90"])
GPT_OSS = spec_of("gpt_oss", "plain", BF16, BF16)
DEEPSEEK = spec_of("deepseek", "plain", BF16, BF16)


def test_rows_of_tiles() -> None:
    """As many as an expert hardly has more of; all of them where there is one expert."""
    alone = DEEPSEEK._replace(num_experts=1, top_k=1)
    assert [configs.block_m(DEEPSEEK, HOPPER, tokens) for tokens in (1, 8, 64)] == [16, 16, 16]
    assert [configs.block_m(alone, HOPPER, tokens) for tokens in (1, 17, 64)] == [16, 32, 64]
    assert configs.block_m(alone._replace(kind="fp8_block"), HOPPER, 64) == 32


@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize("first", [True, False])
def test_tiles_fill_rows_that_some_width_divides(tokens: int, first: bool) -> None:
    """2880 = 45 * 64; of 2888 nothing does, and tiles are as wide as ever."""
    tiles = configs.default_tiles(GPT_OSS, HOPPER, tokens, first)
    assert GPT_OSS.hidden_size == GPT_OSS.intermediate_size == 2880
    assert 2880 % (tiles.block_k * tiles.splits) == 0
    odd = GPT_OSS._replace(hidden_size=2888, intermediate_size=2888)
    assert configs.default_tiles(odd, HOPPER, tokens, first).block_k == 128


def test_tiles_of_a_file_are_those_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other rules measured and nobody compiles today is as if it had not been measured."""
    default, other = configs.candidates(DEEPSEEK, HOPPER, 8, False)[:2]
    for stored, used in ((tuple(other), other), ((7, *other[1:]), default), (tuple(other)[:3], default)):
        monkeypatch.setattr(tuning, "tuned", lambda key, arch, stored=stored: stored)
        assert configs._tiles_of.__wrapped__(DEEPSEEK, HOPPER, 8, False, 0) == used


@pytest.mark.parametrize("early", [False, True])
def test_nothing_is_asked_for_early_where_no_launch_begins_early(early: bool) -> None:
    """And by the first product only where a launch of the same call goes before it."""
    blocks = DEEPSEEK._replace(kind="fp8_block", scale_rows=(128, 128))
    for spec, first, asks in ((DEEPSEEK, True, False), (DEEPSEEK, False, True), (blocks, True, True)):
        tiles = configs.default_tiles(spec, HOPPER, 1, first)
        made = configs.few_config(spec, HOPPER, 1, tiles, first, early)
        assert made.early == early and (made.ahead > 0) == (early and asks)


def test_rows_side_by_side_are_for_wide_products_of_many() -> None:
    wide, narrow = GPT_OSS, spec_of("qwen", "plain", BF16, BF16)
    assert wide.fc1_rows >= configs.NEIGHBOUR_COLUMNS > narrow.fc1_rows
    pairs = configs.NEIGHBOUR_ROWS * 128
    asked = [(wide, HOPPER, pairs), (wide, HOPPER, 32 * configs.NEIGHBOUR_ROWS - 1), (narrow, HOPPER, pairs)]
    asked += [(wide, replace(HOPPER, name="sm89"), pairs), (wide._replace(dtype=torch.float32), HOPPER, pairs)]
    asked += [(wide._replace(hidden_size=2884), HOPPER, pairs)]
    assert [configs.pays_for_neighbours(*x) for x in asked] == [True, False, False, False, False, False]
