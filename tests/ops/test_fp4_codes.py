"""Codes of e2m1 decoded two at a time."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.gpu
def test_codes_decoded_in_pairs() -> None:
    """Of every scale, with the signs of zeros: what the GPU's bf16 makes of them is what fp32 does, rounded."""
    from tests.ops.fp4_codes import decoded

    pairs, singly = decoded(True), decoded(False)
    assert torch.equal(pairs.isnan(), singly.isnan())
    known = ~singly.isnan()
    assert int(known.sum()) == 255 * 512
    assert torch.equal(pairs[known].view(torch.int16), singly[known].view(torch.int16))
