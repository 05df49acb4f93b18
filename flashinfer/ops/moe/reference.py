"""Mixture of experts in plain torch, expert by expert: what it means. On a GPU it waits for the sizes of groups."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashinfer.core.arch import Arch
from flashinfer.core.scratch import Scratch
from flashinfer.ops.gemm import Activation, Epilogue, Rows, grouped_gemm
from flashinfer.ops.moe.spec import BLOCK, MoE, MoESpec

E4M3 = torch.float8_e4m3fn


def bind(spec: MoESpec, arch: Arch) -> Callable[[MoE, Scratch], None]:
    """The call for one kind."""
    return run


@torch.no_grad()
def run(tensors: MoE, scratch: Scratch) -> None:
    """`out[t] = sum_j weights[t, j] * expert(ids[t, j])(x[t])` over the experts held here, sums in fp32.

    scratch: not used, its memory comes from torch.
    """
    out, _, routes, experts = tensors
    num_experts, top_k = experts.fc1.values.shape[0], routes.ids.shape[1]
    local = (routes.ids.long() - routes.first_expert).flatten()
    held = (local >= 0) & (local < num_experts)
    order = torch.where(held, local, num_experts).argsort(stable=True)
    pairs = order[: int(held.sum())]
    counts = torch.bincount(local[pairs], minlength=num_experts)
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    if len(pairs):
        tokens = pairs // top_k
        hidden = _hidden(tensors, tokens, indptr)
        y = _multiply(hidden, indptr, experts.fc2, Epilogue(experts.bias2))
        total.index_add_(0, tokens, y * routes.weights.flatten()[pairs, None])
    out.copy_(total)


def _hidden(tensors: MoE, tokens: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    """The activations of all pairs in x's dtype, or in e4m3 for "fp8_tensor"."""
    x, experts = tensors.x, tensors.experts
    rows = x.view(torch.uint8)[tokens].view(E4M3) if x.dtype == E4M3 else x[tokens]
    hidden = _multiply(rows, indptr, experts.fc1, Epilogue(experts.bias1, experts.activation))
    if experts.hidden_scale is None:
        return hidden.to(x.dtype)
    scale = experts.hidden_scale.reshape(-1).expand(experts.fc1.values.shape[0])
    hidden = hidden * torch.repeat_interleave(scale, indptr.diff().long(), output_size=len(hidden))[:, None]
    limit = torch.finfo(E4M3).max
    return hidden.clamp(-limit, limit).to(E4M3)


def _multiply(values: torch.Tensor, indptr: torch.Tensor, weights: object, epilogue: Epilogue) -> torch.Tensor:
    """fp32 rows of one product; "fp8_block" quantises its rows first."""
    scale = None
    if weights.kind == "fp8_block":  # type: ignore[attr-defined]
        values, scale = quantise(values)
    elif values.dtype != E4M3:
        values = values.float()
    epilogue = epilogue._replace(activation=epilogue.activation or Activation("identity"))
    return grouped_gemm(
        Rows(values, indptr, scale=scale),
        weights,  # type: ignore[arg-type]
        epilogue,
        out_dtype=torch.float32,
        backend="torch",
    )


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes of x `[rows, K]` and fp32 scales `[rows, ceil(K / 128)]`: largest |x| of a block / 448, 1 for 0."""
    limit = torch.finfo(E4M3).max
    rows, width = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -width % BLOCK)).view(rows, -(-width // BLOCK), BLOCK)
    scale = padded.abs().amax(-1) / limit
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (padded / scale[..., None]).clamp(-limit, limit).to(E4M3)
    return codes.flatten(1)[:, :width], scale
