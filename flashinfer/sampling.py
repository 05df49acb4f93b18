"""Sampling with FlashInfer's names and signatures.

Common to all functions:

- probs, logits: `[batch_size, vocab_size]`, fp32, fp16 or bf16. probs count relative to the sum of their row.
- top_k, top_p, min_p: one number for all rows, or a tensor `[batch_size]` with one for each row of probs or logits.
  top_k at or above the vocabulary size, top_p 1 and min_p 0 filter nothing. Tokens that tie with the last one kept are
  kept.
- indices: int32 or int64 `[num_samples]`, the row each sample is drawn from; default: one sample a row. The tokens have
  its dtype, else int32.
- generator: where the random numbers come from, default the device's own; seed and offset (both or neither; ints, or
  int64/uint64 tensors of length 1 or the number of samples) replace it. Equal seeds and offsets give equal tokens:
  `deterministic` is accepted and always true.
- check_nan: raise ValueError if the input holds NaN (waits for the device). Without it a row of NaN, or one with
  nothing left to draw from, gives some token of the vocabulary.
- return_valid: also return bool `[num_samples]`, False for such rows.
- `enable_pdl` and `is_deterministic` are accepted and ignored: they change no result.

Raises ValueError for a wrong shape, dtype, device, range or parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashinfer.core import check
from flashinfer.ops import sampling as ops

Parameter = float | torch.Tensor
Seed = int | torch.Tensor
Samples = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

INDEX_DTYPES = (torch.int32, torch.int64)
FILTER_ORDERS = ("top_k_first", "joint")
PHILOX_STEPS = 32  # random numbers a row that FlashInfer's filtered samplers set aside in the generator


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
    return check.tensor(name, value, like=("the probabilities", x))


def _top_k(value: int | torch.Tensor, x: torch.Tensor) -> int | torch.Tensor:
    if isinstance(value, torch.Tensor):
        check.tensor("top_k", value, dtypes=INDEX_DTYPES)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(check.problem("top_k", repr(value), "an int or an int tensor", "Pass a whole number."))
    return _check_parameter("top_k", value, x, 1, torch.inf)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Draw:
    """The rows to draw from and where the randomness comes from; checked, with `indices` not yet applied."""

    rows: torch.Tensor
    indices: torch.Tensor | None
    generator: torch.Generator | None
    seed: Seed | None
    offset: Seed | None

    def __post_init__(self) -> None:
        if self.indices is not None:
            check.tensor("indices", self.indices, dtypes=INDEX_DTYPES, shape=(None,), like=("the input", self.rows))
            check.index_range("indices", self.indices, 0, self.rows.shape[0])
        if (self.seed is None) != (self.offset is None):
            raise ValueError(
                check.problem("seed and offset", "one of the two", "both or neither", "Pass the missing one as well.")
            )

    @property
    def num_samples(self) -> int:
        return self.rows.shape[0] if self.indices is None else self.indices.shape[0]

    def _seed_tensor(self, name: str, value: Seed) -> torch.Tensor:
        device = self.rows.device
        if isinstance(value, torch.Tensor):
            check.tensor(name, value, dtypes=(torch.int64, torch.uint64), shape=(None,), like=("the input", self.rows))
            if value.shape[0] not in (1, self.num_samples):
                raise ValueError(
                    check.problem(
                        name, f"{value.shape[0]} values", f"1 or {self.num_samples}", "Pass one, or one a sample."
                    )
                )
            return value.view(torch.int64)
        bits = value & (2**64 - 1)
        return torch.full((1,), bits - 2**64 if bits >> 63 else bits, dtype=torch.int64, device=device)

    def _from_generator(self, numbers_per_row: int) -> tuple[int, int]:
        """A seed and an offset; the generator moves on, a CUDA one by the count of numbers FlashInfer would use."""
        generator = self.generator
        if generator is None and self.rows.is_cuda:
            index = self.rows.device.index
            generator = torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]
        if generator is None or generator.device.type != "cuda":
            return int(torch.randint(2**63 - 1, (), generator=generator, device="cpu")), 0
        offset = generator.get_offset()
        generator.set_offset(offset + (self.num_samples * numbers_per_row + 3) // 4 * 4)
        return generator.initial_seed(), offset

    def uniform(self, numbers_per_row: int) -> torch.Tensor:
        seed, offset = self.seed, self.offset
        if seed is None or offset is None:
            seed, offset = self._from_generator(numbers_per_row)
        return ops.uniform(self.num_samples, self._seed_tensor("seed", seed), self._seed_tensor("offset", offset))

    def sample(self, keep: torch.Tensor | None, numbers_per_row: int, return_valid: bool) -> Samples:
        rows, indices = self.rows, self.indices
        if indices is not None:
            rows, keep = rows[indices], None if keep is None else keep[indices]
        tokens, valid = ops.sample(rows, keep, self.uniform(numbers_per_row))
        tokens = tokens.to(torch.int32 if indices is None else indices.dtype)
        return (tokens, valid) if return_valid else tokens


def softmax(logits: torch.Tensor, temperature: Parameter | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """fp32 `softmax(logits / temperature)` over the vocabulary.

    temperature: a number or `[batch_size]`, default 1. 0 is the limit: the largest logits share all of the probability.
    """
    _check_rows("logits", logits)
    scale = 1.0 if temperature is None else temperature
    return ops.softmax(logits, _check_parameter("temperature", scale, logits, 0, torch.inf))


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
    _check_rows("logits", logits, check_nan)
    draw = _Draw(ops.softmax(logits, 1.0), indices, generator, seed, offset)
    return draw.sample(None, logits.shape[1], return_valid=False)  # type: ignore[return-value]


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
    _check_rows("probs", probs, check_nan)
    return _Draw(probs, indices, generator, seed, offset).sample(None, 1, return_valid)


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
    _check_rows("probs", probs, check_nan)
    keep = ops.keep_top_p(probs, _check_parameter("top_p", top_p, probs, 0, 1))
    return _Draw(probs, indices, generator, seed, offset).sample(keep, PHILOX_STEPS, return_valid)


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
    _check_rows("probs", probs, check_nan)
    keep = ops.keep_top_k(probs, _top_k(top_k, probs))
    return _Draw(probs, indices, generator, seed, offset).sample(keep, PHILOX_STEPS, return_valid)


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
    _check_rows("probs", probs, check_nan)
    keep = ops.keep_min_p(probs, _check_parameter("min_p", min_p, probs, 0, 1))
    return _Draw(probs, indices, generator, seed, offset).sample(keep, 1, return_valid)


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
    _check_rows("probs", probs, check_nan)
    check.choice("filter_apply_order", filter_apply_order, FILTER_ORDERS)
    keep = ops.keep_top_k(probs, _top_k(top_k, probs))
    base = torch.where(keep, probs, 0.0) if filter_apply_order == "top_k_first" else probs
    keep = keep & ops.keep_top_p(base, _check_parameter("top_p", top_p, probs, 0, 1))
    return _Draw(probs, indices, generator, seed, offset).sample(keep, PHILOX_STEPS, return_valid)


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
    _check_rows("logits", logits, check_nan)
    return top_k_top_p_sampling_from_probs(  # type: ignore[return-value]
        ops.softmax(logits, 1.0),
        top_k,
        top_p,
        indices,
        filter_apply_order,
        generator=generator,
        seed=seed,
        offset=offset,
    )


def top_p_renorm_probs(probs: torch.Tensor, top_p: Parameter, is_deterministic: bool = False) -> torch.Tensor:
    """probs with all but the fewest most probable tokens that hold top_p set to 0, rows summing to 1; dtype kept."""
    _check_rows("probs", probs)
    return ops.renormalise(probs, ops.keep_top_p(probs, _check_parameter("top_p", top_p, probs, 0, 1)))


def top_k_renorm_probs(probs: torch.Tensor, top_k: int | torch.Tensor, is_deterministic: bool = False) -> torch.Tensor:
    """probs with all but the top_k most probable tokens set to 0, rows summing to 1; dtype kept."""
    _check_rows("probs", probs)
    return ops.renormalise(probs, ops.keep_top_k(probs, _top_k(top_k, probs)))


def top_k_mask_logits(logits: torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor:
    """logits with all but the top_k largest set to -inf; dtype kept."""
    _check_rows("logits", logits)
    return ops.mask_logits(logits, ops.keep_top_k(logits, _top_k(top_k, logits)))


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs
