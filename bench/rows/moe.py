"""Mixture of experts of four models: few tokens cost what reading their experts costs, many what their products cost.

`of copy` is the ratio to reading the needed weights at copy bandwidth; the peer `cublas_same_flops` multiplies as many
rows by one dense pair of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch.nn.functional import pad, silu

from bench.record import COPY, Call, Peer, Row, Sample, nan_like, nothing
from flashinfer.fused_moe import cutlass_fused_moe

TOKENS = (1, 8, 64, 512, 4096, 16384)
# Up to so many tokens weights are what takes time.
FEW_TOKENS = 64
CHECKED_TOKENS = 6
BLOCK = 128
E4M3 = torch.float8_e4m3fn
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Bytes of a weight, scales included.
BYTES = {"bf16": 2.0, "fp8_block": 1 + 4 / BLOCK**2, "mxfp4": 17 / 32}


@dataclass(frozen=True)
class Model:
    """One layer's experts: each token goes to `top_k` of `experts`, swiglu between the products."""

    name: str
    experts: int
    top_k: int
    hidden: int
    inter: int


MIXTRAL = Model("mixtral", 8, 2, 4096, 14336)
QWEN = Model("qwen3_30b_a3b", 128, 8, 2048, 768)
DEEPSEEK = Model("deepseek_v3", 256, 8, 7168, 2048)
GPT_OSS = Model("gpt_oss", 32, 4, 2880, 2880)


@dataclass(frozen=True)
class MoEShape:
    """A model's experts with so many tokens; kind: of the weights, one of BYTES."""

    model: Model
    tokens: int
    kind: str = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @cached_property
    def ids(self) -> torch.Tensor:
        """int32 `[tokens, top_k]` on the CPU: different experts, all equally likely; the same in every run."""
        generator = torch.Generator().manual_seed(self.tokens * 1009 + self.model.experts)
        scores = torch.rand(self.tokens, self.model.experts, generator=generator)
        return scores.topk(self.model.top_k, dim=-1).indices.int()

    @property
    def num_bytes(self) -> int:
        """Weights of all experts that a token goes to, read once; tokens read and written."""
        m, used = self.model, len(self.ids.unique())
        return int(used * 3 * m.hidden * m.inter * BYTES[self.kind]) + 4 * self.tokens * m.hidden

    @property
    def num_flops(self) -> int:
        m = self.model
        return 2 * self.tokens * m.top_k * 3 * m.hidden * m.inter

    def fields(self) -> dict[str, Any]:
        """The parameters, for JSON."""
        m = self.model
        sizes = {"experts": m.experts, "top_k": m.top_k, "hidden_size": m.hidden, "intermediate_size": m.inter}
        return {"model": m.name, **sizes, "tokens": self.tokens, "dtype": self.kind, "used": len(self.ids.unique())}


@dataclass(frozen=True)
class MoEInputs:
    """fc1, fc2, scales: as `cutlass_fused_moe` takes them."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    fc1: torch.Tensor
    fc2: torch.Tensor
    scales: list[torch.Tensor]
    out: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.out.device


def make(shape: MoEShape, generator: torch.Generator) -> MoEInputs:
    """Normal tokens; weights that keep them near unit size."""
    m, device = shape.model, generator.device
    x = torch.randn(shape.tokens, m.hidden, generator=generator, device=device, dtype=torch.bfloat16)
    weights = torch.rand(shape.tokens, m.top_k, generator=generator, device=device)
    scales: list[torch.Tensor] = []
    sides = []
    for rows, depth in ((2 * m.inter, m.hidden), (m.hidden, m.inter)):
        w, scale = WEIGHTS[shape.kind](m.experts, rows, depth, generator)
        sides.append(w)
        scales += [] if scale is None else [scale]
    return MoEInputs(x, shape.ids.to(device), weights, *sides, scales, nan_like(x))


def _plain(experts: int, rows: int, depth: int, generator: torch.Generator) -> tuple[torch.Tensor, None]:
    w = torch.empty(experts, rows, depth, dtype=torch.bfloat16, device=generator.device)
    return w.normal_(std=depth**-0.5, generator=generator), None


def _fp8(experts: int, rows: int, depth: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    device = generator.device
    w = torch.empty(experts, rows, depth, dtype=E4M3, device=device)
    for part in w:  # one at a time: all of them in fp32 would not fit
        part.copy_(torch.randn(rows, depth, generator=generator, device=device) * 30)
    blocks = (experts, -(-rows // BLOCK), -(-depth // BLOCK))
    return w, (torch.rand(*blocks, generator=generator, device=device) + 0.5) / 30 * depth**-0.5


def _mxfp4(experts: int, rows: int, depth: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = partial(torch.randint, generator=generator, device=generator.device, dtype=torch.uint8)
    return drawn(256, (experts, rows, depth // 2)), drawn(118, 121, (experts, rows, depth // 32))


WEIGHTS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor | None]]] = {
    "bf16": _plain,
    "fp8_block": _fp8,
    "mxfp4": _mxfp4,
}


def call(shape: MoEShape, i: MoEInputs) -> Call:
    """`cutlass_fused_moe`."""
    run = partial(
        cutlass_fused_moe,
        i.x,
        i.ids,
        i.weights,
        i.fc1,
        i.fc2,
        torch.bfloat16,
        i.scales,
        output=i.out,
        use_deepseek_fp8_block_scale=shape.kind == "fp8_block",
        use_w4_group_scaling=shape.kind == "mxfp4",
    )
    return Call(nothing, run, i.out)


# ---- what it is checked with


def _quantised(x: torch.Tensor) -> torch.Tensor:
    """x as e4m3 with a scale for every 128 columns holds it, fp32."""
    blocks = pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-30)
    return ((blocks / scale).to(E4M3).float() * scale).flatten(-2)[..., : x.shape[-1]]


def _matrix(shape: MoEShape, i: MoEInputs, side: int, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """One expert's weights as numbers."""
    w = (i.fc1, i.fc2)[side][expert]
    if shape.kind == "bf16":
        return w.to(dtype)
    scale = i.scales[side][expert]
    if shape.kind == "fp8_block":
        spread = scale.repeat_interleave(BLOCK, 0)[: w.shape[0]].repeat_interleave(BLOCK, 1)[:, : w.shape[1]]
        return w.to(dtype) * spread.to(dtype)
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=dtype, device=w.device)
    numbers = table[torch.stack([w & 15, w >> 4], dim=-1).flatten(-2).long()]
    return numbers * torch.exp2(scale.to(dtype) - 127).repeat_interleave(32, 1)


def _tokens(shape: MoEShape, i: MoEInputs, rows: torch.Tensor, dtype: torch.dtype, exact: bool) -> torch.Tensor:
    """The result of some tokens; not exact: rounded to bf16 where torch would."""
    rounded = (lambda x: x) if exact else (lambda x: x.bfloat16().to(dtype))
    quantised = (lambda x: _quantised(x.bfloat16()).to(dtype)) if shape.kind == "fp8_block" else rounded
    out = torch.zeros(len(rows), shape.model.hidden, dtype=dtype, device=i.device)
    for n, row in enumerate(rows.tolist()):
        x = i.x[row].to(dtype)
        for expert, weight in zip(i.ids[row].tolist(), i.weights[row].tolist(), strict=True):
            up, gate = (_matrix(shape, i, 0, expert, dtype) @ quantised(x)).chunk(2)
            hidden = quantised(silu(rounded(gate)) * rounded(up))
            out[n] += weight * rounded(_matrix(shape, i, 1, expert, dtype) @ hidden)
    return out


def samples(shape: MoEShape, i: MoEInputs, generator: torch.Generator) -> Iterator[Sample]:
    """The first, the last and random tokens."""
    picked = torch.randint(shape.tokens, (CHECKED_TOKENS,), generator=generator, device=i.device)
    rows = torch.cat([picked, picked.new_tensor([0, shape.tokens - 1])]).unique()
    exact = _tokens(shape, i, rows, torch.float64, True)
    same_dtype = _tokens(shape, i, rows, torch.float32, False).bfloat16()
    yield Sample("tokens", rows, exact, same_dtype, shape.model.hidden + shape.model.inter)


# ---- peers


@contextmanager
def _open_cublas(shape: MoEShape, i: MoEInputs) -> Iterator[Callable[[], torch.Tensor]]:
    """Both products of as many rows as there are pairs, with the matrices of one expert, in bf16."""
    m, pairs = shape.model, shape.tokens * shape.model.top_k
    normal = partial(torch.randn, dtype=torch.bfloat16, device=i.device)
    x, hidden, fc1, fc2 = (
        normal(pairs, m.hidden),
        normal(pairs, m.inter),
        normal(2 * m.inter, m.hidden),
        normal(m.hidden, m.inter),
    )
    out1, out2 = x.new_empty(pairs, 2 * m.inter), torch.empty_like(x)

    def run() -> torch.Tensor:
        torch.mm(x, fc1.T, out=out1)
        return torch.mm(hidden, fc2.T, out=out2)

    yield run


def _one_expert(shape: MoEShape) -> MoEShape:
    """All pairs at one expert: what `_open_cublas` multiplies."""
    m = shape.model
    return MoEShape(Model("one_expert", 1, 1, m.hidden, m.inter), shape.tokens * m.top_k)


CUBLAS = Peer("cublas_same_flops", _open_cublas, None, _one_expert)


def row(shape: MoEShape, device: str = "cuda") -> Row:
    """Few tokens against a copy, many against cuBLAS."""
    kind = "" if shape.kind == "bf16" else f"_{shape.kind}"
    peers = (COPY,) if shape.tokens <= FEW_TOKENS else (CUBLAS,)
    name = f"moe_{shape.model.name}{kind}_t{shape.tokens}"
    return Row(name, "moe", device, shape, make, call, peers, samples, graphs=True)


ROWS: tuple[Row, ...] = (
    *(row(MoEShape(model, tokens)) for model in (MIXTRAL, QWEN, DEEPSEEK, GPT_OSS) for tokens in TOKENS),
    *(row(MoEShape(DEEPSEEK, tokens, "fp8_block")) for tokens in TOKENS),
    *(row(MoEShape(GPT_OSS, tokens, "mxfp4")) for tokens in TOKENS),
)
COLD_ROWS = ("moe_qwen3_30b_a3b_t8",)
