"""Sampling, filters and selection of a vocabulary of 128256: one read of the rows is their floor, sorting their peer.

A new op is a line in `_OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import flashinfer
from bench.record import Peer, Row, Sample
from flashinfer import sampling, topk

VOCAB = 128_256
BATCHES = (1, 16, 64, 256, 512)
WORST_BATCHES = (1, 64, 512)
CHECKED_ROWS = 8
SELECTED = 2048
SEEDED = {"seed": 1, "offset": 2}


@dataclass(frozen=True)
class Inputs:
    """Random logits and their softmax, fp32 `[batch, VOCAB]`, and the parameters as one value a row."""

    logits: torch.Tensor
    probs: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor


@dataclass(frozen=True)
class SamplingOp:
    """One op as it is measured.

    run: `(inputs)` -> tokens `[batch]`, or rows. allowed: `(inputs of some rows)` -> bool, which tokens may come; or
    None where rows come out. reference: `(inputs of some rows)` -> these rows, in fp64 if the inputs are. sort:
    torch's way to the same, which sorts or selects. top_k, top_p: the parameters of all rows. scale: the deviation of
    the logits. writes: whether rows as large as the input come out. arrange: puts rows into the
    form they are compared in, outside of what is timed.
    """

    name: str
    run: Callable[[Inputs], torch.Tensor]
    sort: Callable[[Inputs], torch.Tensor]
    allowed: Callable[[Inputs], torch.Tensor] | None = None
    reference: Callable[[Inputs], torch.Tensor] | None = None
    top_k: int = 50
    top_p: float = 0.9
    scale: float = 2.0
    writes: bool = False
    arrange: Callable[[Inputs, torch.Tensor], torch.Tensor] | None = None
    batches: tuple[int, ...] = BATCHES


@dataclass(frozen=True)
class SamplingShape:
    """An op on so many rows."""

    op: SamplingOp
    batch_size: int
    dtype: torch.dtype = torch.float32

    @property
    def num_bytes(self) -> int:
        """The rows read once, and written once where they are."""
        return self.batch_size * VOCAB * self.dtype.itemsize * (2 if self.op.writes else 1)

    @property
    def num_flops(self) -> int:
        return 0

    def fields(self) -> dict[str, Any]:
        """The parameters, for JSON."""
        op = self.op
        numbers = {"top_k": op.top_k, "top_p": op.top_p, "scale": op.scale}
        return {"batch_size": self.batch_size, "vocab_size": VOCAB, **numbers, "dtype": str(self.dtype)}


class NewResult:
    """A call whose result is a new tensor each time. out: rows, or for each token 1 if it may come, else 0."""

    def __init__(self, op: SamplingOp, inputs: Inputs) -> None:
        self.op, self.inputs = op, inputs
        self._result: torch.Tensor | None = None

    def plan(self) -> None:
        """Nothing to plan."""

    def reset(self) -> None:
        self._result = None

    def run(self) -> None:
        self._result = self.op.run(self.inputs)

    @property
    def out(self) -> torch.Tensor:
        if self._result is None:
            return self.inputs.probs.new_full((self.inputs.probs.shape[0], 1), float("nan"))
        if self.op.allowed is None:
            return self._result if self.op.arrange is None else self.op.arrange(self.inputs, self._result)
        chosen = self._result.long()[:, None]
        return self.op.allowed(self.inputs).gather(1, chosen).to(self.inputs.probs.dtype)


def _make(shape: SamplingShape, generator: torch.Generator) -> Inputs:
    device, n = generator.device, shape.batch_size
    logits = torch.randn(n, VOCAB, generator=generator, device=device) * shape.op.scale
    top_k = torch.full((n,), shape.op.top_k, dtype=torch.int32, device=device)
    return Inputs(logits, logits.softmax(-1), top_k, torch.full((n,), shape.op.top_p, device=device))


def _rows(inputs: Inputs, rows: torch.Tensor, dtype: torch.dtype) -> Inputs:
    """Some rows in another dtype."""
    return Inputs(inputs.logits[rows].to(dtype), inputs.probs[rows].to(dtype), inputs.top_k[rows], inputs.top_p[rows])


def _samples(shape: SamplingShape, inputs: Inputs, generator: torch.Generator) -> Iterator[Sample]:
    """The first, the last and some other rows."""
    drawn = torch.randint(shape.batch_size, (CHECKED_ROWS,), generator=generator, device=inputs.probs.device)
    rows = torch.cat([drawn, drawn.new_tensor([0, shape.batch_size - 1])]).unique()
    if shape.op.reference is None:
        ones = torch.ones(len(rows), 1, device=inputs.probs.device)
        yield Sample("tokens", rows, ones.double(), ones, 1)
        return
    exact, same = (shape.op.reference(_rows(inputs, rows, dtype)) for dtype in (torch.float64, shape.dtype))
    yield Sample("rows", rows, exact.double(), same, VOCAB)


# ---- which tokens may come, in plain torch


def _above_kth(i: Inputs) -> torch.Tensor:
    return i.probs >= i.probs.topk(int(i.top_k[0])).values[:, -1:]


def _nucleus(i: Inputs) -> torch.Tensor:
    """Tokens above which less than top_p lies, with 1e-5 more for what rounding of the sum may decide."""
    ordered, order = i.probs.sort(-1, descending=True)
    before = ordered.double().cumsum(-1) - ordered
    keep = before < i.top_p[:, None].double() * ordered.double().sum(-1, keepdim=True) + 1e-5
    return torch.zeros_like(keep).scatter(1, order, keep)


def _both(i: Inputs) -> torch.Tensor:
    kept = torch.where(_above_kth(i), i.probs, 0.0)
    return _above_kth(i) & _nucleus(Inputs(i.logits, kept / kept.sum(-1, keepdim=True), i.top_k, i.top_p))


def _likely(i: Inputs) -> torch.Tensor:
    return i.probs >= 0.05 * i.probs.amax(-1, keepdim=True)


def _any(i: Inputs) -> torch.Tensor:
    return i.probs > 0


# ---- rows that come out, in plain torch


def _share(i: Inputs, keep: torch.Tensor) -> torch.Tensor:
    kept = torch.where(keep, i.probs, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _hot(i: Inputs) -> torch.Tensor:
    return (i.logits / 0.8).softmax(-1)


def _clear_of_edge(i: Inputs, x: torch.Tensor) -> torch.Tensor:
    """x with 0 for tokens above which top_p lies but for 2e-6: there the rounding of fp32 sums decides."""
    ordered, order = i.probs.double().sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    clear = (before - i.top_p[:, None] * ordered.sum(-1, keepdim=True)).abs() > 2e-6
    return torch.where(torch.zeros_like(clear).scatter(1, order, clear), x, 0.0)


def _clear_nucleus_share(i: Inputs) -> torch.Tensor:
    return _clear_of_edge(i, _nucleus_share(i))


def _nucleus_share(i: Inputs) -> torch.Tensor:
    ordered = i.probs.sort(-1, descending=True).values
    before = ordered.double().cumsum(-1) - ordered
    count = (before < i.top_p[:, None].double() * ordered.double().sum(-1, keepdim=True)).sum(-1, keepdim=True)
    return _share(i, i.probs >= ordered.gather(1, (count - 1).clamp(min=0)))


# ---- torch's way


def _multinomial(i: Inputs) -> torch.Tensor:
    return torch.multinomial(i.probs, 1)


def _sorted_draw(i: Inputs) -> torch.Tensor:
    """Sort, cut, draw, look up."""
    ordered, order = i.probs.sort(-1, descending=True)
    keep = (ordered.cumsum(-1) - ordered < i.top_p[:, None]) & (
        torch.arange(VOCAB, device=order.device) < i.top_k[:, None]
    )
    return order.gather(1, torch.multinomial(torch.where(keep, ordered, 0.0), 1))


@contextmanager
def _open_sort(shape: SamplingShape, inputs: Inputs) -> Iterator[Callable[[], torch.Tensor]]:
    yield lambda: shape.op.sort(inputs)


@contextmanager
def _open_read(shape: SamplingShape, inputs: Inputs) -> Iterator[Callable[[], torch.Tensor]]:
    yield lambda: inputs.logits.amax(-1)


PEERS = (Peer("torch", _open_sort, None), Peer("read_once", _open_read, None))


def _both_from_logits(i: Inputs) -> torch.Tensor:
    return sampling.top_k_top_p_sampling_from_logits(i.logits, i.top_k, i.top_p, **SEEDED)


def _top_k(i: Inputs) -> torch.Tensor:
    return sampling.top_k_sampling_from_probs(i.probs, i.top_k, **SEEDED)


def _top_p(i: Inputs) -> torch.Tensor:
    return sampling.top_p_sampling_from_probs(i.probs, i.top_p, **SEEDED)


def _in_order(i: Inputs, x: torch.Tensor) -> torch.Tensor:
    return x.sort(-1, descending=True).values


def _largest(i: Inputs) -> torch.Tensor:
    return i.logits.topk(SELECTED).values


_OPS = (
    SamplingOp("softmax", lambda i: flashinfer.softmax(i.logits, 0.8), _hot, reference=_hot, writes=True),
    SamplingOp("from_logits", lambda i: sampling.sampling_from_logits(i.logits, **SEEDED), _multinomial, _any),
    SamplingOp("from_probs", lambda i: sampling.sampling_from_probs(i.probs, **SEEDED), _multinomial, _any),
    SamplingOp("top_p", _top_p, _sorted_draw, _nucleus, top_k=VOCAB),
    SamplingOp("top_k", _top_k, _sorted_draw, _above_kth, top_p=1.0),
    SamplingOp("top_k_top_p_logits", _both_from_logits, _sorted_draw, _both),
    SamplingOp("min_p", lambda i: sampling.min_p_sampling_from_probs(i.probs, 0.05, **SEEDED), _multinomial, _likely),
    SamplingOp(
        "top_p_renorm",
        lambda i: flashinfer.top_p_renorm_probs(i.probs, i.top_p),
        _nucleus_share,
        reference=_clear_nucleus_share,
        writes=True,
        arrange=_clear_of_edge,
    ),
    SamplingOp(
        "top_k_renorm",
        lambda i: flashinfer.top_k_renorm_probs(i.probs, i.top_k),
        lambda i: _share(i, _above_kth(i)),
        reference=lambda i: _share(i, _above_kth(i)),
        writes=True,
    ),
    SamplingOp(
        "select2048",
        lambda i: topk.top_k(i.logits, SELECTED)[0],
        _largest,
        reference=_largest,
        arrange=_in_order,
    ),
    SamplingOp(
        "select2048_sorted",
        lambda i: topk.top_k(i.logits, SELECTED, sorted=True)[0],
        _largest,
        reference=_largest,
    ),
    # The worst cases: many tokens kept of a flat row, and few of one where most draws miss.
    SamplingOp("top_k_5000", _top_k, _sorted_draw, _above_kth, top_k=5000, top_p=1.0, batches=WORST_BATCHES),
    SamplingOp("both_5000", _both_from_logits, _sorted_draw, _both, top_k=5000, batches=WORST_BATCHES),
    SamplingOp("top_p_flat", _top_p, _sorted_draw, _nucleus, top_k=VOCAB, top_p=0.99, scale=0.1, batches=WORST_BATCHES),
    SamplingOp("top_p_low", _top_p, _sorted_draw, _nucleus, top_k=VOCAB, top_p=0.1, batches=WORST_BATCHES),
    SamplingOp(
        "top_p_low_flat", _top_p, _sorted_draw, _nucleus, top_k=VOCAB, top_p=0.1, scale=0.1, batches=WORST_BATCHES
    ),
)


def _call(shape: SamplingShape, inputs: Inputs) -> Any:
    """The public API; a `Call` but for its result being a new tensor."""
    return NewResult(shape.op, inputs)


ROWS: tuple[Row, ...] = tuple(
    Row(f"sampling_{op.name}_b{n}", "sampling", "cuda", SamplingShape(op, n), _make, _call, PEERS, _samples)
    for op in _OPS
    for n in op.batches
)
