"""Sampling with FlashInfer's names and signatures.

Common to all functions:

- probs, logits: `[batch_size, vocab_size]`, fp32, fp16 or bf16. probs count relative to the sum of their row.
- top_k, top_p, min_p: one number for all rows, or a tensor `[batch_size]` with one for each row of probs or logits.
  top_k at or above the vocabulary size, top_p 1 and min_p 0 filter nothing. Tokens that tie with the last one kept are
  kept.
- indices: int32 or int64 `[num_samples]`, the row each sample is drawn from; default: one sample a row. The tokens have
  its dtype, else int32. Rows that do not exist are an error on the CPU; on a GPU nobody waits to look, so they must not
  come.
- generator: where the random numbers come from, default the device's own; seed and offset (both or neither; ints, or
  int64/uint64 tensors of length 1 or the number of samples) replace it. Equal seeds and offsets give equal tokens:
  `deterministic` is accepted and always true.
- check_nan: raise ValueError if the input holds NaN (waits for the device). Without it a NaN never comes
  (softmax hands it on). A row with nothing left to draw from, or of infinite weight, gives some token of the
  vocabulary.
- return_valid: also return bool `[num_samples]`, False for such rows.
- `enable_pdl` and `is_deterministic` are accepted and ignored: they change no result.

Raises ValueError for a wrong shape, dtype, device, range or parameter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from flashinfer.core import check
from flashinfer.core.replay import Number, replayed
from flashinfer.ops import sampling as ops
from flashinfer.ops.sampling import Parameter, Seed

Samples = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

FILTER_ORDERS = ("top_k_first", "joint")
PHILOX_STEPS = 32  # random numbers a row that FlashInfer's filtered samplers set aside in the generator


class _Source(NamedTuple):
    """What a call says about its draws; numbers: how many FlashInfer takes of a generator for a row, 0: one a token."""

    indices: torch.Tensor | None
    generator: torch.Generator | None
    seed: Seed | None
    offset: Seed | None
    numbers: int


def _check_rows(name: str, x: torch.Tensor, check_nan: bool = False) -> None:
    check.tensor(name, x, dtypes=check.FLOAT_DTYPES, shape=(None, None))
    if x.shape[1] == 0:
        raise ValueError(check.problem(name, f"shape {list(x.shape)}", "a vocabulary of at least 1", "Pass logits."))
    if check_nan and bool(x.isnan().any()):
        raise ValueError(check.problem(name, "NaN", "numbers only", "Look for the NaN in the model's output."))


def _check_parameter(name: str, value: Parameter, x: torch.Tensor, low: float, high: float) -> Parameter:
    """Check a number, or a tensor with one for each row of `x`; numbers must lie in [low, high]."""
    if not isinstance(value, torch.Tensor):
        if not low <= value <= high:
            raise ValueError(check.problem(name, value, f"a number from {low} to {high}", f"Correct {name}."))
        return value
    if value.dim() != 1:
        raise ValueError(
            f"Expected a 1D tensor or scalar for the sampling parameter {name}, got a {value.dim()}D tensor. "
            f"Pass one value for each row, shape [{x.shape[0]}]."
        )
    if value.shape[0] != x.shape[0]:
        raise ValueError(
            f"Sampling parameter {name} batch size mismatch: got {value.shape[0]} values for {x.shape[0]} rows. "
            f"Pass one value for each row."
        )
    return check.tensor(name, value, like=("the probabilities", x)).contiguous()


def _top_k(value: int | torch.Tensor, x: torch.Tensor) -> int | torch.Tensor:
    if isinstance(value, torch.Tensor):
        check.tensor("top_k", value, dtypes=check.POSITION_DTYPES)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(check.problem("top_k", repr(value), "an int or an int tensor", "Pass a whole number."))
    return _check_parameter("top_k", value, x, 1, torch.inf)  # type: ignore[return-value]


def _seed(name: str, value: Seed, x: torch.Tensor, num_samples: int) -> Seed:
    """A number, or an int64 tensor of length 1 or `num_samples`."""
    if not isinstance(value, torch.Tensor):
        return value
    check.tensor(name, value, dtypes=(torch.int64, torch.uint64), shape=(None,), like=("the input", x))
    if value.shape[0] not in (1, num_samples):
        raise ValueError(
            check.problem(name, f"{value.shape[0]} values", f"1 or {num_samples}", "Pass one, or one a sample.")
        )
    return value.contiguous().view(torch.int64)


def _from_generator(x: torch.Tensor, generator: torch.Generator | None, numbers: int) -> tuple[Seed, Seed]:
    """A seed and an offset; the generator moves on, a CUDA one by `numbers`, the count FlashInfer would use.

    In the capture of a CUDA graph the seed is a tensor drawn on the device, so that every replay draws another one.
    """
    if generator is None and x.is_cuda:
        index = x.device.index
        generator = torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]
    if generator is None or generator.device.type != "cuda":
        return int(torch.randint(2**63 - 1, (), generator=generator, device="cpu")), 0
    if torch.cuda.is_current_stream_capturing():
        return torch.randint(2**63 - 1, (1,), generator=generator, device=x.device), 0
    offset = generator.get_offset()
    generator.set_offset(offset + (numbers + 3) // 4 * 4)
    return generator.initial_seed(), offset


def _draws(x: torch.Tensor, source: _Source) -> ops.Draws:
    """Checked rows to draw from, and where the randomness comes from."""
    indices, generator, seed, offset, numbers = source
    if indices is not None:
        check.tensor("indices", indices, dtypes=check.POSITION_DTYPES, shape=(None,), like=("the input", x))
        check.index_range("indices", indices, 0, x.shape[0])
        indices = indices.contiguous()
    if (seed is None) != (offset is None):
        raise ValueError(
            check.problem("seed and offset", "one of the two", "both or neither", "Pass the missing one as well.")
        )
    num_samples = x.shape[0] if indices is None else indices.shape[0]
    if seed is None or offset is None:
        seed, offset = _from_generator(x, generator, num_samples * (numbers or x.shape[1]))
    return ops.Draws(_seed("seed", seed, x, num_samples), _seed("offset", offset, x, num_samples), num_samples, indices)


def _checked(filters: ops.Filters, x: torch.Tensor) -> ops.Filters:
    """Filters whose parameters are numbers in range, or contiguous tensors of one value for each row of `x`."""
    top_k, top_p, min_p, joint = filters
    return ops.Filters(
        None if top_k is None else _top_k(top_k, x),  # type: ignore[arg-type]
        None if top_p is None else _check_parameter("top_p", top_p, x, 0, 1),
        None if min_p is None else _check_parameter("min_p", min_p, x, 0, 1),
        joint,
    )


@replayed
def _draw(
    x: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor | None],
    scratch: torch.Tensor | None,
    filters: tuple[Parameter | None, ...],
    seed: tuple[int, int] | tuple[torch.Tensor],
    offset: tuple[int, int] | tuple[torch.Tensor],
    indices: torch.Tensor | None,
    logits: bool,
) -> None:
    """Check and draw; seed, offset: halves, or a tensor."""
    _check_rows("logits" if logits else "probs", x)
    key, counter = (part[0] if len(part) == 1 else ops.Halves(*part) for part in (seed, offset))
    draws = _draws(x, _Source(indices, None, key, counter, 0))
    ops.sample_into(ops.Samples(*out), x, logits, _checked(ops.Filters(*filters), x), draws, scratch)  # type: ignore


def _argument(value: Seed) -> tuple[int, int] | tuple[torch.Tensor]:
    """For `_draw`: what differs from call to call is no part of what it remembers a call by."""
    if isinstance(value, torch.Tensor):
        return (value,)
    low, high = ops.halves_of(value)  # type: ignore[arg-type]
    return Number(low), Number(high)


def _sampled(
    x: torch.Tensor,
    logits: bool,
    filters: ops.Filters,
    source: _Source,
    check_nan: bool = False,
    return_valid: bool = False,
) -> Samples:
    """Tokens drawn from the rows `x`, and whether those had weight if that is asked for."""
    name = "logits" if logits else "probs"
    indices, generator, seed, offset, numbers = source
    plain = x.__class__ is torch.Tensor and x.is_cuda and x.dim() == 2 and not check_nan
    if (
        not plain
        or (indices is not None and indices.__class__ is not torch.Tensor)
        or (seed is None) != (offset is None)
    ):
        _check_rows(name, x, check_nan)
        draws = _draws(x, source)
        tokens, valid = ops.sample(x, logits, _checked(filters, x), draws)
        return (tokens, valid) if return_valid else tokens
    num_samples = x.shape[0] if indices is None else indices.shape[0]
    if seed is None or offset is None:
        seed, offset = _from_generator(x, generator, num_samples * (numbers or x.shape[1]))
    out = ops.samples_like(x, indices, return_valid)
    scratch = ops.scratch_for(filters.kind, x, num_samples)
    _draw(x, tuple(out), scratch, tuple(filters), _argument(seed), _argument(offset), indices, logits)
    return (out.tokens, out.valid) if return_valid else out.tokens  # type: ignore[return-value]


@replayed
def _softmax(out: torch.Tensor, logits: torch.Tensor, temperature: Parameter, scratch: torch.Tensor | None) -> None:
    _check_rows("logits", logits)
    ops.softmax_into(out, logits, _check_parameter("temperature", temperature, logits, 0, torch.inf), scratch)


@replayed
def _keep(
    out: torch.Tensor,
    x: torch.Tensor,
    filters: tuple[Parameter | None, ...],
    scratch: torch.Tensor | None,
    logits: bool,
) -> None:
    _check_rows("logits" if logits else "probs", x)
    checked = _checked(ops.Filters(*filters), x)  # type: ignore[arg-type]
    (parameter,) = (value for value in checked[:3] if value is not None)
    ops.keep_into(out, x, checked.kind, parameter, logits, scratch)


def _kept(x: torch.Tensor, filters: ops.Filters, logits: bool = False) -> torch.Tensor:
    """What passes the one filter, of probs or logits."""
    if not isinstance(x, torch.Tensor):
        _check_rows("logits" if logits else "probs", x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _keep(out, x, tuple(filters), ops.scratch_for("keep_" + filters.kind, x) if x.is_cuda else None, logits)
    return out


def softmax(logits: torch.Tensor, temperature: Parameter | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """fp32 `softmax(logits / temperature)` over the vocabulary.

    temperature: a number or `[batch_size]`, default 1. 0 is the limit: the largest logits share all of the probability.
    """
    scale = 1.0 if temperature is None else temperature
    if not isinstance(logits, torch.Tensor):
        _check_rows("logits", logits)
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    _softmax(out, logits, scale, ops.scratch_for("softmax", logits) if logits.is_cuda else None)
    return out


def sampling_from_logits(
    logits: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed | None = None,
    offset: Seed | None = None,
) -> torch.Tensor:
    """Draw tokens with probability `softmax(logits)`."""
    source = _Source(indices, generator, seed, offset, 0)
    return _sampled(logits, True, ops.Filters(), source, check_nan)  # type: ignore[return-value]


def sampling_from_probs(
    probs: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed | None = None,
    offset: Seed | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw tokens with probability `probs`."""
    source = _Source(indices, generator, seed, offset, 1)
    return _sampled(probs, False, ops.Filters(), source, check_nan, return_valid)


def top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_p: Parameter,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed | None = None,
    offset: Seed | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw among the fewest most probable tokens that together hold top_p (nucleus sampling)."""
    source = _Source(indices, generator, seed, offset, PHILOX_STEPS)
    return _sampled(probs, False, ops.Filters(top_p=top_p), source, check_nan, return_valid)


def top_k_sampling_from_probs(
    probs: torch.Tensor,
    top_k: int | torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed | None = None,
    offset: Seed | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw among the top_k most probable tokens."""
    source = _Source(indices, generator, seed, offset, PHILOX_STEPS)
    return _sampled(probs, False, ops.Filters(top_k=top_k), source, check_nan, return_valid)


def min_p_sampling_from_probs(
    probs: torch.Tensor,
    min_p: Parameter,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed | None = None,
    offset: Seed | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw among the tokens at least min_p times as probable as the most probable one."""
    source = _Source(indices, generator, seed, offset, 1)
    return _sampled(probs, False, ops.Filters(min_p=min_p), source, check_nan, return_valid)


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: Parameter,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed | None = None,
    offset: Seed | None = None,
    return_valid: bool = False,
) -> Samples:
    """Draw among the tokens that pass both filters.

    filter_apply_order: "top_k_first" measures top_p on what top_k kept, "joint" on the whole row.
    """
    filters = _both_filters(top_k, top_p, filter_apply_order)
    source = _Source(indices, generator, seed, offset, PHILOX_STEPS)
    return _sampled(probs, False, filters, source, check_nan, return_valid)


def _both_filters(top_k: int | torch.Tensor, top_p: Parameter, order: str) -> ops.Filters:
    check.choice("filter_apply_order", order, FILTER_ORDERS)
    return ops.Filters(top_k, top_p, joint=order == "joint")


def top_k_top_p_sampling_from_logits(
    logits: torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: Parameter,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Seed | None = None,
    offset: Seed | None = None,
) -> torch.Tensor:
    """`top_k_top_p_sampling_from_probs` of `softmax(logits)`."""
    filters = _both_filters(top_k, top_p, filter_apply_order)
    source = _Source(indices, generator, seed, offset, PHILOX_STEPS)
    return _sampled(logits, True, filters, source, check_nan)  # type: ignore[return-value]


def top_p_renorm_probs(probs: torch.Tensor, top_p: Parameter, is_deterministic: bool = False) -> torch.Tensor:
    """probs with all but the fewest most probable tokens that hold top_p set to 0, rows summing to 1; dtype kept."""
    return _kept(probs, ops.Filters(top_p=top_p))


def top_k_renorm_probs(probs: torch.Tensor, top_k: int | torch.Tensor, is_deterministic: bool = False) -> torch.Tensor:
    """probs with all but the top_k most probable tokens set to 0, rows summing to 1; dtype kept."""
    return _kept(probs, ops.Filters(top_k=top_k))


def min_p_renorm_probs(probs: torch.Tensor, min_p: Parameter) -> torch.Tensor:
    """probs with all below min_p times the largest set to 0, rows summing to 1; dtype kept. Not in FlashInfer."""
    return _kept(probs, ops.Filters(min_p=min_p))


def scale_logits(logits: torch.Tensor, temperature: Parameter) -> torch.Tensor:
    """fp32 `logits / temperature`, shifted so that each row's largest is 0, which changes no softmax of them.

    temperature: a number or `[batch_size]`; 0 is the limit: all but the largest become -inf. Not in FlashInfer.
    """
    _check_rows("logits", logits)
    return ops.scale_logits(logits, _check_parameter("temperature", temperature, logits, 0, torch.inf))


def top_k_mask_logits(logits: torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor:
    """logits with all but the top_k largest set to -inf; dtype kept."""
    return _kept(logits, ops.Filters(top_k=top_k), logits=True)


def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    maybe_output_accepted_token_num: torch.Tensor | None = None,
    maybe_output_emitted_draft_token_num: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: Seed | None = None,
    offset: Seed | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accept drafted tokens one after the other, then draw one token more; all are distributed as the target's.

    draft_probs `[batch_size, n, vocab_size]`, draft_token_ids int32 or int64 `[batch_size, n]`, target_probs
    `[batch_size, n + 1, vocab_size]`. Returns (tokens `[batch_size, n + 1]`: the accepted ones, the drawn one, -1;
    int32 `[batch_size]`: how many drafts would be accepted each for itself; how many were in a row). The last two are
    added to the given tensors, if any (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding").
    """
    check.tensor("target_probs", target_probs, dtypes=check.FLOAT_DTYPES, shape=(None, None, None))
    batch_size, length, vocab_size = target_probs.shape
    like = ("target_probs", target_probs)
    shape = (batch_size, length - 1, vocab_size)
    check.tensor("draft_probs", draft_probs, dtypes=check.FLOAT_DTYPES, shape=shape, like=like)
    check.tensor("draft_token_ids", draft_token_ids, dtypes=check.POSITION_DTYPES, shape=shape[:2], like=like)
    check.index_range("draft_token_ids", draft_token_ids, 0, vocab_size)
    totals = (maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num)
    for name, total in zip(("accepted_token_num", "emitted_draft_token_num"), totals, strict=True):
        if total is not None:
            check.tensor(f"maybe_output_{name}", total, dtypes=check.POSITION_DTYPES, shape=(batch_size,), like=like)
    draws = _draws(target_probs[:, 0], _Source(None, generator, seed, offset, length))
    inputs = (draft_probs.contiguous(), draft_token_ids.contiguous(), target_probs.contiguous())
    tokens, *counts = ops.verify_chain(*inputs, draws)
    accepted, emitted = (new if t is None else t.add_(new) for t, new in zip(totals, counts, strict=True))
    return tokens, accepted, emitted


def tree_speculative_sampling(
    draft_token_ids: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    target_probs: torch.Tensor,
    generator: torch.Generator | None = None,
    seed: Seed | None = None,
    offset: Seed | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Verify trees of drafted tokens (Medusa, EAGLE); the tokens are distributed as the target's. Not in FlashInfer.

    draft_token_ids, first_child, next_sibling: int32 or int64 `[batch_size, num_nodes]`: the nodes' tokens and links,
    -1 for none. Node 0 is the root, whose token is certain; children have higher numbers than their parent and other
    tokens than their siblings. target_probs `[batch_size, num_nodes, vocab_size]`: the target's probabilities after
    each node, rows summing to 1. Returns (tokens `[batch_size, num_nodes]`: the accepted ones, the one drawn after
    them, -1; accepted nodes int32 `[batch_size, num_nodes - 1]`, -1 after them; their number int32 `[batch_size]`).
    """
    check.tensor("target_probs", target_probs, dtypes=check.FLOAT_DTYPES, shape=(None, None, None))
    shape, vocab_size = target_probs.shape[:2], target_probs.shape[2]
    given = {"draft_token_ids": draft_token_ids, "first_child": first_child, "next_sibling": next_sibling}
    for name, x in given.items():
        check.tensor(name, x, dtypes=check.POSITION_DTYPES, shape=shape, like=("target_probs", target_probs))
    check.index_range("draft_token_ids", draft_token_ids[:, 1:], 0, vocab_size)
    check.index_range("first_child", first_child, -1, shape[1])
    check.index_range("next_sibling", next_sibling, -1, shape[1])
    draws = _draws(target_probs[:, 0], _Source(None, generator, seed, offset, shape[1]))
    tree = ops.Tree(*(x.contiguous() for x in given.values()))
    return ops.verify_tree(tree, target_probs.contiguous(), draws)


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs
