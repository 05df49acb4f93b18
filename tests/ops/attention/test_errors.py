"""A wrong argument gets an error that names it: one mistake a case, everything else right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashinfer
from flashinfer.core.config import config
from flashinfer.core.select import BackendSupportedError

from .common import DEVICE, ON_GPU, workspace

F16, F32, I32 = torch.float16, torch.float32, torch.int32


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=I32)


def kv_pages(num_pages: int = 4, page_size: int = 4, heads: int = 2, dim: int = 16, dtype: torch.dtype = F16):
    return tuple(torch.randn(num_pages, page_size, heads, dim, device=DEVICE).to(dtype) for _ in range(2))


def normal(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def unaligned(*shape: int) -> torch.Tensor:
    """Innermost stride 2."""
    return normal(*shape[:-1], 2 * shape[-1])[..., ::2]


class Calls:
    """One right call of an entry point in two dictionaries; a case changes a few entries."""

    def single_prefill(self, **changes: Any) -> None:
        given = {"q": normal(3, 4, 16), "k": normal(9, 2, 16), "v": normal(9, 2, 16)}
        flashinfer.single_prefill_with_kv_cache(**{**given, **changes})

    def single_decode(self, **changes: Any) -> None:
        given = {"q": normal(4, 16), "k": normal(9, 2, 16), "v": normal(9, 2, 16)}
        flashinfer.single_decode_with_kv_cache(**{**given, **changes})

    def decode(self, new: dict | None = None, plan: dict | None = None, run: dict | None = None) -> None:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            **{"float_workspace_buffer": workspace(), **(new or {})}
        )
        indices = {"indptr": ints(0, 1, 3), "indices": ints(2, 0, 3).to(DEVICE), "last_page_len": ints(4, 1)}
        sizes = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 4}
        wrapper.plan(**{**indices, **sizes, "q_data_type": F16, **(plan or {})})
        wrapper.run(**{"q": normal(2, 4, 16), "paged_kv_cache": kv_pages(), **(run or {})})

    def paged(self, new: dict | None = None, plan: dict | None = None, run: dict | None = None) -> None:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            **{"float_workspace_buffer": workspace(), **(new or {})}
        )
        indices = {
            "qo_indptr": ints(0, 3, 5), "paged_kv_indptr": ints(0, 1, 3), "paged_kv_indices": ints(2, 0, 3).to(DEVICE),
            "paged_kv_last_page_len": ints(4, 1),
        }  # fmt: skip
        sizes = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim_qk": 16, "page_size": 4}
        wrapper.plan(**{**indices, **sizes, "q_data_type": F16, **(plan or {})})
        wrapper.run(**{"q": normal(5, 4, 16), "paged_kv_cache": kv_pages(), **(run or {})})

    def ragged(self, new: dict | None = None, plan: dict | None = None, run: dict | None = None) -> None:
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            **{"float_workspace_buffer": workspace(), **(new or {})}
        )
        indices = {"qo_indptr": ints(0, 3, 5), "kv_indptr": ints(0, 4, 9)}
        sizes = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim_qk": 16}
        wrapper.plan(**{**indices, **sizes, "q_data_type": F16, **(plan or {})})
        given = {"q": normal(5, 4, 16), "k": normal(9, 2, 16), "v": normal(9, 2, 16)}
        wrapper.run(**{**given, **(run or {})})


CALLS = Calls()
BAD = (ValueError,)
TYPE = (TypeError, ValueError)

SINGLE = {
    "layout": (KeyError, "kv_layout", {"kv_layout": "NDH"}),
    "pos_encoding_mode": (KeyError, "pos_encoding_mode", {"pos_encoding_mode": "ROPE"}),
    "q dtype": (BAD, r"\bq\b", {"q": "int"}),
    "k dtype": (BAD, r"\bk\b", {"k": normal(9, 2, 16, dtype=F32)}),
    "v dtype": (BAD, r"\bv\b", {"v": normal(9, 2, 16, dtype=F32)}),
    "k head_dim": (BAD, r"\bk\b", {"k": normal(9, 2, 24)}),
    "k dimensions": (BAD, r"\bk\b", {"k": normal(9, 32)}),
    "v length": (BAD, r"\bv\b", {"v": normal(8, 2, 16)}),
    "v heads": (BAD, r"\bv\b", {"v": normal(9, 1, 16)}),
    "head count": (BAD, "num_qo_heads", {"k": normal(9, 3, 16), "v": normal(9, 3, 16)}),
    "k stride": (BAD, r"\bk\b.*stride", {"k": unaligned(9, 2, 16)}),
    "v stride": (BAD, r"\bv\b.*stride", {"v": unaligned(9, 2, 16)}),
    "k no tensor": (TYPE, r"\bk\b", {"k": [1.0, 2.0]}),
    "window_left": (BAD, "window_left", {"window_left": -2}),
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("entry", ["single_prefill", "single_decode"])
def test_single(entry, name):
    error, match, changes = SINGLE[name]
    shape = (3, 4, 16) if entry == "single_prefill" else (4, 16)
    changes = {k: torch.zeros(shape, dtype=I32, device=DEVICE) if v == "int" else v for k, v in changes.items()}
    with pytest.raises(error, match=match):
        getattr(CALLS, entry)(**changes)


PREFILL_ONLY = {
    "mask shape": (BAD, "custom_mask", {"custom_mask": torch.ones(3, 8, dtype=torch.bool, device=DEVICE)}),
    "mask dtype": (BAD, "custom_mask", {"custom_mask": torch.ones(3, 9, device=DEVICE)}),
    "packed mask length": (BAD, "packed_custom_mask",
                           {"packed_custom_mask": torch.zeros(3, dtype=torch.uint8, device=DEVICE)}),
    "backend": (BAD, "backend", {"backend": "cuda"}),
    "q dimensions": (BAD, r"\bq\b", {"q": normal(4, 16)}),
    "q stride": (BAD, r"\bq\b.*stride", {"q": unaligned(3, 4, 16)}),
    "head_dim": (BAD, "head_dim", {"q": normal(3, 4, 12), "k": normal(9, 2, 12), "v": normal(9, 2, 12)}),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFILL_ONLY)
def test_single_prefill(name):
    error, match, changes = PREFILL_ONLY[name]
    with pytest.raises(error, match=match):
        CALLS.single_prefill(**changes)


def new(**x: Any) -> dict[str, Any]:
    return {"new": x}


def plan(**x: Any) -> dict[str, Any]:
    return {"plan": x}


def run(**x: Any) -> dict[str, Any]:
    return {"run": x}


# The names of an argument differ between the wrappers; the rest of the case is shared.
WRAPPERS = {
    "layout": (KeyError, "kv_layout", new(kv_layout="NDH")),
    "backend": (BAD, "backend", new(backend="cuda")),
    "pos_encoding_mode": (KeyError, "pos_encoding_mode", plan(pos_encoding_mode="ROPE")),
    "head count": (BAD, "num_qo_heads", plan(num_kv_heads=3)),
    "no heads": (BAD, "num_kv_heads", plan(num_kv_heads=0)),
    "window_left in plan": (BAD, "window_left", plan(window_left=-5)),
    "q_data_type": (BAD, "q_data_type", plan(q_data_type=torch.int8)),
    "q_data_type name": (BAD, "q_data_type|dtype", plan(q_data_type="half16")),
    "kv_data_type": (BAD, "kv_data_type", plan(kv_data_type=torch.int32)),
    "q dtype differs from plan": (BAD, r"\bq\b", run(q="f32")),
    "q heads": (BAD, r"\bq\b", run(q="heads")),
    "q head_dim": (BAD, r"\bq\b", run(q="dim")),
    "q rows": (BAD, r"\bq\b", run(q="rows")),
    "q stride": (BAD, r"\bq\b.*stride", run(q="stride")),
    "out shape": (BAD, r"\bout\b", run(out=normal(1, 4, 16))),
    "out dtype": (BAD, r"\bout\b", run(out="out f32")),
    "lse shape": (BAD, r"\blse\b", run(lse=normal(1, 4, dtype=F32), return_lse=True)),
    "lse dtype": (BAD, r"\blse\b", run(lse="lse f16", return_lse=True)),
}


def special(value: Any, rows: int) -> Any:
    """What depends on the number of query rows of the entry point."""
    made = {
        "f32": lambda: normal(rows, 4, 16, dtype=F32),
        "out f32": lambda: normal(rows, 4, 16, dtype=F32),
        "lse f16": lambda: normal(rows, 4),
        "heads": lambda: normal(rows, 2, 16),
        "dim": lambda: normal(rows, 4, 24),
        "rows": lambda: normal(rows + 1, 4, 16),
        "stride": lambda: unaligned(rows, 4, 16),
    }
    return made[value]() if isinstance(value, str) and value in made else value


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("entry", ["decode", "paged", "ragged"])
def test_wrapper(entry, name):
    error, match, parts = WRAPPERS[name]
    rows = 2 if entry == "decode" else 5
    parts = {part: {k: special(v, rows) for k, v in given.items()} for part, given in parts.items()}
    with pytest.raises(error, match=match):
        getattr(CALLS, entry)(**parts)


DECODE = {
    "indptr dtype": (BAD, "indptr", plan(indptr=ints(0, 1, 3).long())),
    "indptr dimensions": (BAD, "indptr", plan(indptr=ints(0, 1, 3)[None])),
    "indptr falls": (BAD, "indptr", plan(indptr=ints(0, 3, 1))),
    "indptr negative": (BAD, "indptr", plan(indptr=ints(-1, 1, 3))),
    "indptr past indices": (BAD, "ind(ptr|ices)", plan(indptr=ints(0, 1, 4))),
    "indices dtype": (BAD, "indices", plan(indices=ints(2, 0, 3).long().to(DEVICE))),
    "last_page_len dtype": (BAD, "last_page_len", plan(last_page_len=torch.tensor([4.0, 1.0]))),
    "last_page_len length": (BAD, "last_page_len", plan(last_page_len=ints(4))),
    "last_page_len 0": (BAD, "last_page_len", plan(last_page_len=ints(0, 1))),
    "last_page_len past page": (BAD, "last_page_len", plan(last_page_len=ints(4, 5))),
    "page_size": (BAD, "page_size", plan(page_size=0)),
    "head_dim not a multiple of 8": (BAD, "head_dim", plan(head_dim=12)),
    "head_dim too large": (BAD, "head_dim", plan(head_dim=1024)),
    "window_left in run": (BAD, "window_left", run(window_left=3)),
    "cache dtype differs from plan": (BAD, "paged_kv_cache|kv_cache", run(paged_kv_cache=kv_pages(dtype=F32))),
    "cache heads": (BAD, "paged_kv_cache", run(paged_kv_cache=kv_pages(heads=3))),
    "cache page size": (BAD, "paged_kv_cache", run(paged_kv_cache=kv_pages(page_size=8))),
    "cache head_dim": (BAD, "paged_kv_cache", run(paged_kv_cache=kv_pages(dim=24))),
    "cache dimensions": (BAD, "paged_kv_cache", run(paged_kv_cache=normal(4, 16))),
    "cache of three": (TYPE, "paged_kv_cache", run(paged_kv_cache=(*kv_pages(), kv_pages()[0]))),
    "cache stride": (BAD, "paged_kv_cache.*stride", run(paged_kv_cache=(unaligned(4, 4, 2, 16),) * 2)),
}


def renamed(parts: dict[str, Any]) -> dict[str, Any]:
    """A decode case in the names of the paged prefill wrapper."""
    names = {
        "indptr": "paged_kv_indptr", "indices": "paged_kv_indices", "last_page_len": "paged_kv_last_page_len",
        "head_dim": "head_dim_qk",
    }  # fmt: skip
    return {part: {names.get(k, k): v for k, v in given.items()} for part, given in parts.items()}


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("entry", ["decode", "paged"])
def test_page_table_and_cache(entry, name):
    error, match, parts = DECODE[name]
    with pytest.raises(error, match=match):
        getattr(CALLS, entry)(**(renamed(parts) if entry == "paged" else parts))


QO = {
    "qo_indptr dtype": (BAD, "qo_indptr", plan(qo_indptr=ints(0, 3, 5).float())),
    "qo_indptr falls": (BAD, "qo_indptr", plan(qo_indptr=ints(0, 5, 3))),
    "qo_indptr length": (BAD, "indptr", plan(qo_indptr=ints(0, 5))),
    "qo_indptr end": (BAD, r"\bq\b.*5 rows.*6", plan(qo_indptr=ints(0, 3, 6))),
    "mask length": (BAD, "custom_mask", plan(custom_mask=torch.ones(3, dtype=torch.bool, device=DEVICE))),
    "mask dtype": (BAD, "custom_mask", plan(custom_mask=torch.ones(22, device=DEVICE))),
    "packed mask dtype": (BAD, "packed_custom_mask", plan(packed_custom_mask=torch.ones(9, device=DEVICE))),
    "head_dim_vo": (BAD, "head_dim_vo", plan(head_dim_vo=20)),
}


@pytest.mark.parametrize("name", QO)
@pytest.mark.parametrize("entry", ["paged", "ragged"])
def test_prefill_wrappers(entry, name):
    error, match, parts = QO[name]
    with pytest.raises(error, match=match):
        getattr(CALLS, entry)(**parts)


RAGGED = {
    "kv_indptr dtype": (BAD, "kv_indptr", plan(kv_indptr=ints(0, 4, 9).long())),
    "kv_indptr falls": (BAD, "kv_indptr", plan(kv_indptr=ints(0, 9, 4))),
    "kv_indptr end": (BAD, r"kv_indptr|\bk\b", plan(kv_indptr=ints(0, 4, 10))),
    "k dtype": (BAD, r"\bk\b", run(k=normal(9, 2, 16, dtype=F32))),
    "k heads": (BAD, r"\bk\b", run(k=normal(9, 1, 16))),
    "v head_dim": (BAD, r"\bv\b", run(v=normal(9, 2, 24))),
    "v length": (BAD, r"\bv\b", run(v=normal(8, 2, 16))),
    "v stride": (BAD, r"\bv\b.*stride", run(v=unaligned(9, 2, 16))),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged(name):
    error, match, parts = RAGGED[name]
    with pytest.raises(error, match=match):
        CALLS.ragged(**parts)


@pytest.mark.parametrize("entry", ["decode", "paged", "ragged", "single_prefill", "single_decode"])
def test_the_right_calls_are_right(entry):
    """The cases above differ from these in one thing."""
    getattr(CALLS, entry)()


@pytest.mark.parametrize("owner", [
    flashinfer.BatchDecodeWithPagedKVCacheWrapper,
    flashinfer.BatchPrefillWithPagedKVCacheWrapper,
    flashinfer.BatchPrefillWithRaggedKVCacheWrapper,
])  # fmt: skip
def test_run_before_plan(owner):
    wrapper = owner(workspace())
    tensors = (normal(9, 2, 16),) * 2
    arguments = tensors if owner is flashinfer.BatchPrefillWithRaggedKVCacheWrapper else (kv_pages(),)
    with pytest.raises(RuntimeError, match="plan"):
        wrapper.run(normal(2, 4, 16), *arguments)


@pytest.mark.skipif(not ON_GPU, reason="needs two devices")
@pytest.mark.parametrize(("entry", "part", "argument"), [
    ("single_prefill", None, "k"),
    ("single_prefill", None, "v"),
    ("decode", "run", "paged_kv_cache"),
    ("paged", "run", "q"),
    ("ragged", "run", "v"),
])  # fmt: skip
def test_devices_mixed(entry, part, argument):
    """The error names both devices."""
    values = {"k": normal(9, 2, 16).cpu(), "v": normal(9, 2, 16).cpu(), "q": normal(5, 4, 16).cpu(),
              "paged_kv_cache": tuple(x.cpu() for x in kv_pages())}  # fmt: skip
    changes = {argument: values[argument]}
    with pytest.raises(ValueError, match=rf"(?s)\b{argument}\b.*cpu|cpu.*\b{argument}\b"):
        getattr(CALLS, entry)(**(changes if part is None else {part: changes}))


@pytest.mark.skipif(ON_GPU, reason="a CPU tensor beside a GPU is tested above")
def test_devices_mixed_with_meta():
    """Without a GPU the second device is "meta"."""
    with pytest.raises(ValueError, match=r"\bk\b.*meta"):
        CALLS.single_prefill(k=normal(9, 2, 16).to("meta"))
    with pytest.raises(ValueError, match=r"\bv\b.*meta"):
        CALLS.ragged(run={"v": normal(9, 2, 16).to("meta")})


@pytest.mark.skipif(ON_GPU, reason="on a GPU it runs")
def test_triton_on_the_cpu_says_why_not():
    if config().triton_interpret:
        pytest.skip("the interpreter runs Triton on the CPU")
    for entry in ("decode", "paged", "ragged"):
        with pytest.raises(BackendSupportedError, match=r"triton.*TRITON_INTERPRET"):
            getattr(CALLS, entry)(new={"backend": "triton"})
    with pytest.raises(BackendSupportedError, match=r"triton.*TRITON_INTERPRET"):
        CALLS.single_prefill(backend="triton")
