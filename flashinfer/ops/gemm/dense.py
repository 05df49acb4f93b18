"""Dense products: torch's, which are cuBLAS's on a GPU."""

from __future__ import annotations

import torch


@torch.no_grad()
def dense(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """`out = a @ b + bias`, summed in fp32; a `[..., m, k]`, b `[..., k, n]` with at most one leading dimension."""
    product = torch.mm if a.dim() == 2 else torch.bmm
    if out.dtype == a.dtype and not a.is_cpu:
        if bias is None:
            product(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)
        return
    wide = torch.float32
    sums = product(a.float(), b.float()) if a.is_cpu else product(a, b, out_dtype=wide)
    out.copy_(sums if bias is None else sums + bias)
