"""Element-wise steps, the same on every device: temperature, and places in a cache of selected tokens."""

from __future__ import annotations

import torch

from flashinfer.ops.sampling.spec import PageTable, Parameter


def scale_logits(logits: torch.Tensor, temperature: Parameter) -> torch.Tensor:
    """fp32 logits over temperature, shifted so that the largest is 0; temperature 0 leaves only the largest."""
    x = logits.float()
    x = x - x.amax(dim=-1, keepdim=True)
    return torch.where(x == 0, x, x / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature))


def through_page_table(index: torch.Tensor, table: PageTable) -> torch.Tensor:
    """int32 like index: `page * page_size + slot` of each token number; -1 stays."""
    entry, slot = index.clamp(min=0) // table.page_size, index.clamp(min=0) % table.page_size
    if table.starts is not None:
        entry = entry + table.starts[:, None]
    rows = torch.arange(index.shape[0], device=index.device) if table.rows is None else table.rows
    place = table.pages[rows.long()[:, None], entry.long()] * table.page_size + slot
    return torch.where(index < 0, -1, place).int()


def plus_offsets(index: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """int32 like index: token numbers plus their row's offset; -1 stays."""
    return torch.where(index < 0, -1, index + offsets[:, None]).int()
