"""Errors of sampling: which argument, what came, what was expected."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from flashinfer import sampling

Call = Callable[..., torch.Tensor]
SAMPLERS: dict[str, Call] = {
    "probs": sampling.sampling_from_probs,
    "logits": sampling.sampling_from_logits,
    "top_p": partial(sampling.top_p_sampling_from_probs, top_p=0.5),
    "top_k": partial(sampling.top_k_sampling_from_probs, top_k=2),
    "min_p": partial(sampling.min_p_sampling_from_probs, min_p=0.5),
    "probs_both": partial(sampling.top_k_top_p_sampling_from_probs, top_k=2, top_p=0.5),
    "logits_both": partial(sampling.top_k_top_p_sampling_from_logits, top_k=2, top_p=0.5),
}
PARAMETER_CALLS: dict[str, tuple[str, Call]] = {
    "top_p": ("top_p", sampling.top_p_sampling_from_probs),
    "top_k": ("top_k", sampling.top_k_sampling_from_probs),
    "min_p": ("min_p", sampling.min_p_sampling_from_probs),
    "joint_k": ("top_k", lambda x, k: sampling.top_k_top_p_sampling_from_probs(x, k, 0.5)),
    "joint_p": ("top_p", lambda x, p: sampling.top_k_top_p_sampling_from_probs(x, 5, p)),
    "logits_k": ("top_k", lambda x, k: sampling.top_k_top_p_sampling_from_logits(x, k, 0.5)),
    "logits_p": ("top_p", lambda x, p: sampling.top_k_top_p_sampling_from_logits(x, 5, p)),
    "renorm_p": ("top_p", sampling.top_p_renorm_probs),
    "renorm_k": ("top_k", sampling.top_k_renorm_probs),
    "mask_k": ("top_k", sampling.top_k_mask_logits),
    "temperature": ("temperature", sampling.softmax),
}


@pytest.mark.parametrize("which", PARAMETER_CALLS)
def test_parameter_errors(which: str, device: str) -> None:
    name, call = PARAMETER_CALLS[which]
    probs = torch.rand(4, 16, device=device)
    good = torch.ones(4, dtype=torch.int64 if name == "top_k" else torch.float32, device=device)
    call(probs, good)
    for bad in (good[None], good[0]):
        with pytest.raises(ValueError, match=rf"Expected a 1D tensor or scalar.*got a {bad.dim()}D tensor"):
            call(probs, bad)
    with pytest.raises(ValueError, match=r"Sampling parameter.*batch size mismatch"):
        call(probs, good[:3])
    with pytest.raises(ValueError, match=rf"{name}: got a tensor on meta"):
        call(probs, good.to("meta"))
    for number in (-1, float("nan")):
        with pytest.raises(ValueError, match=rf"{name}: got {number}"):
            call(probs, number)
    if name == "top_k":
        with pytest.raises(ValueError, match=r"top_k: got 2.5, expected an int"):
            call(probs, 2.5)
        with pytest.raises(ValueError, match=r"top_k: got dtype torch.float32"):
            call(probs, good.float())
    elif name != "temperature":
        with pytest.raises(ValueError, match=rf"{name}: got 1.5, expected a number from 0 to 1"):
            call(probs, 1.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_input_errors(name: str, device: str) -> None:
    call = SAMPLERS[name]
    probs = torch.rand(4, 16, device=device)
    with pytest.raises(ValueError, match=r"(probs|logits): got dtype torch.float64"):
        call(probs.double())
    with pytest.raises(ValueError, match=r"(probs|logits): got 1 dimensions"):
        call(probs[0])
    with pytest.raises(ValueError, match=r"(probs|logits): got shape \[4, 0\]"):
        call(probs[:, :0])
    with pytest.raises(ValueError, match=r"indices: got dtype torch.int16"):
        call(probs, indices=torch.zeros(2, dtype=torch.int16, device=device))
    with pytest.raises(ValueError, match=r"indices: got 2 dimensions"):
        call(probs, indices=torch.zeros(2, 2, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match=r"indices: got a tensor on meta"):
        call(probs, indices=torch.zeros(2, dtype=torch.int32, device="meta"))
    for half in ({"seed": 1}, {"offset": 1}):
        with pytest.raises(ValueError, match=r"seed and offset: got one of the two, expected both or neither"):
            call(probs, **half)
    with pytest.raises(ValueError, match=r"seed: got 3 values, expected 1 or 4"):
        call(probs, seed=torch.zeros(3, dtype=torch.int64, device=device), offset=0)
    with pytest.raises(ValueError, match=r"offset: got dtype torch.int32"):
        call(probs, seed=0, offset=torch.zeros(1, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match=r"seed: got a tensor on meta"):
        call(probs, seed=torch.zeros(1, dtype=torch.int64, device="meta"), offset=0)


def test_other_errors() -> None:
    probs = torch.rand(4, 16)
    with pytest.raises(TypeError, match=r"probs: got list"):
        sampling.sampling_from_probs([0.5])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"filter_apply_order: got 'top_p_first'"):
        sampling.top_k_top_p_sampling_from_probs(probs, 1, 0.5, filter_apply_order="top_p_first")
    with pytest.raises(ValueError, match=r"indices: got values from 0 to 4, expected values in \[0, 4\)"):
        sampling.sampling_from_probs(probs, indices=torch.tensor([0, 4]))
