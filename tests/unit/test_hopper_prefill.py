"""What of the Hopper prefill a CPU can judge: when it is chosen, and the order in which its work is taken."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from flashinfer.core.arch import SMEM_BYTES, Arch
from flashinfer.core.config import config
from flashinfer.core.select import select
from flashinfer.core.workspace import Arena
from flashinfer.ops.attention import IMPLS, support
from flashinfer.ops.attention.spec import AttentionSpec, Batch, Tensors, Workload
from flashinfer.ops.attention.variants import causal

HOPPER = Arch("sm90", 132, SMEM_BYTES["sm90"], "3.6.0")
SPEC = AttentionSpec(32, 8, 128, 128, 16, True, *[torch.bfloat16] * 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim_qk": 192}, "head_dim"),
        ({"head_dim_qk": 80, "head_dim_vo": 80}, "head_dim"),
        ({"kv_dtype": torch.float8_e4m3fn}, "16-bit"),
        ({"q_dtype": torch.float16}, "16-bit"),
        ({"rotates": True}, "rotated"),
        ({"uniform_qo_len": 1}, "decode"),
        ({"workload": Workload(64, 1 << 20)}, "fewer than 128 queries"),
        ({"workload": Workload(128, 128)}, "too few query tiles"),
    ],
)
def test_each_refusal_has_its_reason(change, reason):
    assert support.gluon_sm90_supports(SPEC, HOPPER) is None
    assert reason in support.gluon_sm90_supports(replace(SPEC, **change), HOPPER)


def test_other_architectures_and_compilers_are_refused():
    assert "warpgroup" in support.gluon_sm90_supports(SPEC, replace(HOPPER, name="sm80"))
    for release in ("3.9.0", None):
        assert f"Triton {release}" in support.gluon_sm90_supports(SPEC, replace(HOPPER, triton=release))


def test_auto_prefers_it_and_names_mean_it():
    assert select(IMPLS, SPEC, HOPPER).name == select(IMPLS, SPEC, HOPPER, "fa3").name == "gluon_sm90"
    assert select(IMPLS, SPEC, HOPPER, "fa2").name == "triton"
    assert select(IMPLS, replace(SPEC, workload=Workload(16, 4096)), HOPPER).name == "triton"


def test_layouts_for_tma():
    def problem(k: torch.Tensor) -> str | None:
        q = torch.empty(4, 8, 128, dtype=torch.float16)
        return support.gluon_sm90_layout(Tensors(q, k, torch.empty_like(q)[:, None], q, None))

    cache = torch.empty(4, 16, 2, 136, dtype=torch.float16)
    assert problem(cache[..., :128]) is None
    assert problem(cache[:1, ..., 8:]) is None
    assert "k:" in problem(cache[..., 4:132])
    assert "k:" in problem(torch.empty(4, 16, 2, 129, dtype=torch.float16)[..., :128])
    assert "k:" in problem(torch.empty(1, 16, 2, 128, dtype=torch.float16).expand(4, -1, -1, -1))
    q, far = (
        torch.empty(4, 8, 128, dtype=torch.float16),
        torch.empty(8, 1 << 21, 128, dtype=torch.float16, device="meta"),
    )
    tensors = Tensors(q, cache[..., :128], cache[..., :128], far.transpose(0, 1), None)
    assert "32 bits" in str(support.gluon_sm90_layout(tensors))


@pytest.mark.skipif(not (config().triton_interpret or torch.cuda.is_available()), reason="needs Triton to run")
@pytest.mark.parametrize("seed", range(4))
def test_work_is_every_record_once_longest_first_in_sections(seed):
    from flashinfer.ops.attention.gluon_sm90.launch import plan

    rng = random.Random(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kv = torch.tensor([rng.randint(0, 90_000 if seed % 2 else 3000) for _ in range(9)])
    qo = torch.tensor([rng.randint(0, min(700, int(n) + 5)) for n in kv])
    indptrs = [torch.cat([torch.zeros(1), x.cumsum(0)]).int().to(device) for x in (qo, kv)]
    spec = replace(SPEC, page_size=1, paged=False)
    batch = Batch(indptrs[0], indptrs[1], None, None, len(kv), int(qo.sum()))
    arena = Arena(device)
    made = plan(spec, batch, causal(), arena)
    count = int(made.work.num_tiles)
    assert count == sum(-(-int(n) // 128) for n in qo)
    capacity = -(-batch.total_rows // 128) + batch.batch_size
    records = arena.private("records", (capacity + 1, 8), torch.int64)[:count].cpu()
    tiles = made.work.tiles[:count].cpu()
    assert sorted(map(tuple, tiles.tolist())) == sorted(map(tuple, records.tolist()))
    longest = int(tiles[:, 3].max())
    tokens = (24 << 20) // (2 * 2 * 128 * 2)  # K and V of two KV heads in 24 MiB of L2
    keys = [(int(t[5]) // tokens, 63 - int(t[3]) * 63 // longest) for t in tiles]
    assert keys == sorted(keys)


@pytest.mark.skipif(not config().triton_interpret, reason="stands in for a Hopper GPU")
@pytest.mark.parametrize("rows_known", [True, False])
def test_plans_of_a_graph_keep_the_implementation_that_ran(rows_known, monkeypatch):
    """Strides sent the first run to Triton: later plans must fill Triton's tables, which a captured run reads."""
    from flashinfer.ops.attention import session
    from flashinfer.ops.attention.options import Options, scales_of

    monkeypatch.setattr(session, "arch_of", lambda device: replace(HOPPER, num_sms=1))
    spec = AttentionSpec(4, 2, 64, 64, 1, False, *[torch.float16] * 3)
    options = Options.of(64, True, None, None, "NONE", None, (None, None))
    lens = [(256, 150), (150, 256)]
    indptr = torch.tensor([0, 256, 406], dtype=torch.int32)
    batch = Batch(indptr, indptr, None, None, 2, 406 if rows_known else None)
    made = session.Session(torch.device("cpu"), fixed_addresses=True)
    q, wide, v = (torch.randn(406, *x).half() for x in ((4, 64), (1, 2, 65), (1, 2, 64)))
    scales = scales_of(options.sm_scale, spec, q, None, None, None)
    for turn, (first, second) in enumerate(lens):
        indptr.copy_(torch.tensor([0, first, first + second]))
        made.plan(spec, batch, options)
        if turn == 0:
            out = made.run((q, wide[..., :64], v), scales)
            assert made.backend == "triton" and "multiples of 16 bytes" in str(made.layout_problem)
            held, implementation = made._plan, made._impl
        else:
            out = torch.full_like(q, float("nan"))
            assert implementation is not None
            implementation.run(made.spec, held, Tensors(q, wide[..., :64], v, out, None), made.variant, scales)
        assert made.backend == "triton"
        begin = 0
        for n in (first, second):
            k, values = (x[begin : begin + n, 0].repeat_interleave(2, 1).transpose(0, 1) for x in (wide[..., :64], v))
            expected = torch.nn.functional.scaled_dot_product_attention(
                q[begin : begin + n].transpose(0, 1).double(), k.double(), values.double(), is_causal=True
            )
            torch.testing.assert_close(out[begin : begin + n].transpose(0, 1).double(), expected, atol=4e-3, rtol=0)
            begin += n


def test_a_layout_that_comes_after_a_graph_is_refused(monkeypatch):
    """What ran may be captured: another implementation would write over its tables."""
    from flashinfer.ops.attention import session

    monkeypatch.setattr(session, "arch_of", lambda device: HOPPER)
    made = session.Session(torch.device("cpu"), fixed_addresses=True)
    made._row, made._batch, made._plan, made._ran = IMPLS[0], object(), object(), True  # type: ignore[assignment]
    q = torch.empty(4, 8, 128, dtype=torch.float16)
    k = torch.empty(4, 16, 2, 129, dtype=torch.float16)[..., :128]
    with pytest.raises(ValueError, match="CUDA graph may hold"):
        made._settle(Tensors(q, k, k, q, None))
