"""The state behind a wrapper: what was planned, on which implementation, in which memory."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch

from flashinfer.core import check
from flashinfer.core.arch import arch_of
from flashinfer.core.select import BackendSupportedError, Impl, select, triton_missing, wanted_name
from flashinfer.core.workspace import Arena
from flashinfer.ops.attention import IMPLS
from flashinfer.ops.attention.options import Options
from flashinfer.ops.attention.spec import AttentionSpec, Batch, Scales, Tensors, Workload
from flashinfer.ops.attention.variant import Variant

_numbers = count()
# By `number`, which is what a compiled graph holds of a session.
SESSIONS: WeakValueDictionary[int, Session] = WeakValueDictionary()


class Session:
    """Plans a batch, then runs it any number of times.

    device: of the queries. backend: the name asked for; afterwards that of the implementation in use. buffer: the
    user's workspace or None. fixed_addresses: CUDA graphs replay this session's runs, so that plans keep to the first
    one's implementation and write to where it did. extra: a user's variant, composed after the one that the options
    mean. layout_problem: why the tensors of a run kept it from the first choice.
    """

    def __init__(
        self,
        device: torch.device,
        backend: str = "auto",
        buffer: torch.Tensor | None = None,
        fixed_addresses: bool = False,
        extra: Variant | None = None,
    ) -> None:
        self.arena = Arena(device, buffer)
        self.device = device
        self.request = backend
        self.backend = backend
        self.fixed_addresses = fixed_addresses
        self.extra = extra
        self.layout_problem: str | None = None
        self._row: Impl | None = None
        self._impl: ModuleType | None = None
        self._batch: Batch | None = None
        self._mask: Variant | None = None
        self._plan: Any = None
        self._rows: int | None = None
        self._override: Options | None = None
        self._expected_rows: int | None = None
        self._checked: list[Any] = []
        self._addresses: tuple[int, ...] = ()
        self._ran = False
        self.number = next(_numbers)
        SESSIONS[self.number] = self

    def plan(self, spec: AttentionSpec, batch: Batch, options: Options, mask: Variant | None = None) -> None:
        """Choose an implementation and schedule `batch`; waits for the first `run` where only that tells the rows.

        Nothing changes when it raises.
        """
        if self._override is not None:
            # A captured `forward` gave its own options: the tables it replays with are made for these.
            options = self._override
        variant = options.variant(spec, self.device, mask)
        if self.extra is not None:
            variant &= self.extra
        rotates = bool(variant.having("query") or variant.having("key"))
        spec = replace(spec, variant=variant.names, rotates=rotates)
        rows = batch.total_rows
        if self.fixed_addresses and self._rows is not None:
            # A captured run holds the first plan's tiles and tables: later batches fill them as far as they need.
            if rows is not None and rows > self._rows:
                want = f"at most {self._rows}, those of the first plan, which a CUDA graph may hold"
                raise ValueError(check.problem("qo_indptr", f"{rows} rows", want, "Plan the largest batch first."))
            rows = self._rows
        self._use(self._choice(spec, batch, rows))
        self.layout_problem = None
        self.spec, self.options, self.variant, self._batch, self._mask = spec, options, variant, batch, mask
        self._plan, self._checked, self._expected_rows = None, [], batch.total_rows
        if rows is not None:
            self._schedule(rows)

    def _choice(self, spec: AttentionSpec, batch: Batch, rows: int | None) -> Impl:
        """The row of the table for this batch of `rows` queries; what runs best only matters where nobody chose."""
        arch = arch_of(self.device)
        if self.fixed_addresses and self._rows is not None:
            # A captured run is one of this implementation, and holds its tables.
            assert self._row is not None
            return select((self._row,), spec, arch, self._row.name)
        if rows is not None and spec.split_kv and wanted_name(arch, self.request) == "auto":
            spec = replace(spec, workload=Workload.of(rows, batch.batch_size))
        return select(IMPLS, spec, arch, self.request)

    def _use(self, row: Impl) -> None:
        self._row, self._impl, self.backend = row, row.load(), row.name

    def invalidate(self) -> None:
        """Forget the plan: its memory is gone."""
        self._batch = self._plan = self._rows = self._override = None
        self._ran = self.arena.frozen = False

    def replan(self, options: Options) -> None:
        """Plan the same batch with other options, if they ask for another variant; sm_scale belongs to the run."""
        self.require_plan()
        if replace(options, sm_scale=self.options.sm_scale) != self.options:
            assert self._batch is not None
            self._override = options if self.fixed_addresses else None
            self.plan(self.spec, self._batch, options, self._mask)

    def _schedule(self, rows: int) -> None:
        assert self._impl is not None and self._batch is not None
        self._plan = self._impl.plan(self.spec, self._batch._replace(total_rows=rows), self.variant, self.arena)
        self._rows = rows
        self.arena.frozen = self.fixed_addresses

    def require_plan(self) -> None:
        if self._batch is None:
            raise RuntimeError("run() was called before plan(). Call plan(...) with this step's index arrays first.")

    def run(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scales: Scales,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        made: tuple[bool, bool] = (False, False),
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend: q `[rows, num_qo_heads, head_dim_qk]`, k and v NHD pages. `out`, `lse` are written where given.

        made: whether those given were made for this run, and are not the caller's own.
        """
        self.require_plan()
        assert self._impl is not None and self._batch is not None
        q, k, v = qkv
        # Layers of a model come with the same layouts: what was checked for one need not be checked for the next.
        layouts = [(x.shape, x.stride(), x.dtype, x.device) for x in (q, k, v, out, lse) if x is not None]
        addresses = tuple(x.data_ptr() % 16 for x in (*qkv, out) if x is not None)
        if layouts != self._checked or addresses != self._addresses:
            self._check(q, k, v, out, lse)
            self._settle(Tensors(q, k, v, q if out is None else out, lse))
            self._checked, self._addresses = layouts, addresses
        if self._plan is None:
            self._schedule(q.shape[0])
        rows, heads = q.shape[0], self.spec.num_qo_heads
        given = out is not None and not made[0], lse is not None and not made[1]
        if out is None:
            out = torch.empty((rows, heads, self.spec.head_dim_vo), dtype=self.spec.o_dtype, device=self.device)
        if return_lse and lse is None:
            lse = torch.empty((rows, heads), dtype=torch.float32, device=self.device)
        if not (self._batch.covers_rows and not self.fixed_addresses):
            self._fill_uncovered(None if given[0] else out, None if given[1] else lse)
        self._impl.run(self.spec, self._plan, Tensors(q, k, v, out, lse), self.variant, scales)
        self._ran = True
        return (out, lse) if return_lse and lse is not None else out

    def _fill_uncovered(self, out: torch.Tensor | None, lse: torch.Tensor | None) -> None:
        """Rows of our own tensors that belong to no request are 0 and -inf; the caller's are left alone."""
        assert self._batch is not None
        indptr = self._batch.qo_indptr
        if out is not None and out.is_cuda and indptr is not None and triton_missing(arch_of(self.device)) is None:
            from flashinfer.ops.attention.device.fill import fill_uncovered  # imports Triton

            fill_uncovered(out, lse, indptr)
            return
        covered = 0 if indptr is not None else self._batch.batch_size * (self.spec.uniform_qo_len or 0)
        if out is not None:
            out[covered:].zero_()
        if lse is not None:
            lse[covered:].fill_(-math.inf)

    def _settle(self, tensors: Tensors) -> None:
        """Choose for these tensors: by their number of rows where no plan knew it, and by their layout."""
        assert self._row is not None and self._batch is not None
        if self._plan is None:
            self._expected_rows = tensors.q.shape[0]
            self._use(self._choice(self.spec, self._batch, self._expected_rows))
        problem = self._row.layout(tensors)
        if problem is None:
            return
        arch = arch_of(self.device)
        if wanted_name(arch, self.request) != "auto":
            raise BackendSupportedError(f"backend {self.request!r}: {problem}. Leave the backend to 'auto'.")
        if self.fixed_addresses and self._ran:
            way = "Run every call with the layouts of the first, or make a new wrapper."
            raise ValueError(
                f"A CUDA graph may hold a run of {self.backend!r}, which cannot take this one: {problem}. {way}"
            )
        self.layout_problem = f"{self.backend}: {problem}"
        self._use(select(IMPLS[IMPLS.index(self._row) + 1 :], self.spec, arch))
        if self._plan is not None:
            assert self._rows is not None
            self.arena.frozen = False  # nothing ran yet
            self._schedule(self._rows)

    def _check(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor | None
    ) -> None:
        """Raise where a tensor differs from the plan."""
        self._check_inputs(q, k, v)
        rows, planned = q.shape[0], self._expected_rows
        if planned is None and self.fixed_addresses:
            planned = self._rows
        if planned is not None and rows != planned and not (self.fixed_addresses and rows > planned):
            raise ValueError(check.problem("q", f"{rows} rows", f"{planned}, as planned", "Plan again for this batch."))
        shape = (rows, self.spec.num_qo_heads)
        for name, x, dtype, size in (
            ("out", out, self.spec.o_dtype, (*shape, self.spec.head_dim_vo)),
            ("lse", lse, torch.float32, shape),
        ):
            if x is not None:
                check.tensor(name, x, dtypes=(dtype,), shape=size, like=("q", q), inner_contiguous=True)

    def _check_inputs(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        spec = self.spec
        wanted = (None, spec.num_qo_heads, spec.head_dim_qk)
        check.tensor("q", q, dtypes=(spec.q_dtype,), shape=wanted, inner_contiguous=True)
        if q.device != self.device:
            want = f"one on {self.device}, as the workspace"
            raise ValueError(check.problem("q", f"a tensor on {q.device}", want, "Use one device for both."))
        names = ("paged_kv_cache (k)", "paged_kv_cache (v)") if spec.paged else ("k", "v")
        for name, x, dim in ((names[0], k, spec.head_dim_qk), (names[1], v, spec.head_dim_vo)):
            shape = (None, spec.page_size, spec.num_kv_heads, dim)
            check.tensor(name, x, dtypes=(spec.kv_dtype,), shape=shape, like=("q", q), inner_contiguous=True)
        if k.shape[0] != v.shape[0]:
            raise ValueError(
                check.problem(names[1], f"{v.shape[0]} pages or tokens", f"{k.shape[0]}, as k has", "Pass both whole.")
            )
        least = self._batch.min_pages if self._batch is not None else None
        if least is not None and k.shape[0] < least:
            got = f"{k.shape[0]} pages (tokens if ragged)"
            raise ValueError(
                check.problem(names[0], got, f"at least {least}, as planned", "Check the planned indices.")
            )
