"""Products of fp8 numbers with a scale for every 128 of them (DeepSeek-V3, arXiv 2412.19437, section 3.3).

Rows of a have a scale for each 128 columns (or 128 rows share it), weights one for each block of 128 rows and 128
columns. Sums are fp32. Functions raise TypeError and ValueError for wrong arguments and wait for nothing on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from flashinfer.core import check
from flashinfer.core.replay import replayed
from flashinfer.ops import gemm as ops
from flashinfer.ops import quantization
from flashinfer.ops.gemm import FP8_BLOCK, Rows, Weights

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Granularity = tuple[int, int, int]


def gemm_fp8_nt_groupwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    scale_major_mode: str | None = None,
    mma_sm: int = 1,
    scale_granularity_mnk: Granularity = (1, 128, 128),
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "cutlass",
) -> torch.Tensor:
    """`a @ b.T` of block-scaled fp8, `[m, n]`.

    a: fp8 `[m, k]`. b: fp8 `[n, k]`. scale_granularity_mnk: (1 or 128, 1 or 128, 128) = (gm, gn, 128). a_scale and
    b_scale: fp32, `[m / gm, k / 128]` and `[n / gn, k / 128]` for scale_major_mode "K", `[k / 128, m / gm]` and
    `[k / 128, n / gn]` for "MN", any strides. Without a mode either shape is taken; where both fit, the scales of one
    block of columns of a lie side by side, and those of one block of rows of b. Divisions round up. out_dtype: bf16
    (default), fp16 or fp32. mma_sm, backend: no effect.
    """
    check.choice("backend", backend, ("cutlass", "trtllm", "cutile", "triton", "auto"))
    if out is None:
        _sides(a, b, 2)
        out = _result(out, (a.shape[0], b.shape[0]), out_dtype, a)
    _multiply(out, a, b, a_scale, b_scale, None, (scale_major_mode, *scale_granularity_mnk), out_dtype)
    return out


@replayed
def _multiply(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    m_indptr: torch.Tensor | None,
    form: tuple[Any, ...],
    out_dtype: torch.dtype | None,
) -> None:
    """Check and multiply: `gemm_fp8_nt_groupwise`, of groups with bounds. form: how scales lie, of how many numbers."""
    mode, *shared = form
    _sides(a, b, 2 if m_indptr is None else 3)
    granularity = _granularity(shared)  # type: ignore[arg-type]
    if m_indptr is not None:
        _group_bounds(m_indptr, b.shape[0], a)
        check.choice("scale_major_mode", mode, ("MN", "K"))
    row_scale = _oriented("a_scale", a_scale, _blocks(a.shape, granularity[0]), mode, 0, a)
    scale = _oriented("b_scale", b_scale, _blocks(b.shape, granularity[1]), mode, 1, a)
    _result(out, (a.shape[0], b.shape[-2]), out_dtype, a)
    matrices = (b, scale) if b.dim() == 3 else (b[None], scale[None])
    weights = Weights(matrices[0], scale=matrices[1], kind="fp8_block")
    ops.grouped_gemm(Rows(a, m_indptr, scale=row_scale), weights, out=out)


def gemm_fp8_nt_blockscaled(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    scale_major_mode: str | None = "MN",
    mma_sm: int = 1,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`gemm_fp8_nt_groupwise` with blocks of 128 x 128 on both sides."""
    granularity = (FP8_BLOCK, FP8_BLOCK, FP8_BLOCK)
    return gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, scale_major_mode, mma_sm, granularity, out, out_dtype)


def group_gemm_fp8_nt_groupwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    m_indptr: torch.Tensor,
    scale_granularity_mnk: Granularity = (1, 128, 128),
    scale_major_mode: str = "MN",
    mma_sm: int = 1,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "trtllm",
    segment_alignment: int = 1,
) -> torch.Tensor:
    """`a[rows of g] @ b[g].T` for every group g, `[cum_m, n]`.

    a: fp8 `[cum_m, k]`. b: fp8 `[batch_size, n, k]`. m_indptr: int32 `[batch_size + 1]`, any values (no multiples of 4
    needed). a_scale: `[cum_m / gm, k / 128]` for "K", `[k / 128, cum_m / gm]` for "MN"; b_scale:
    `[batch_size, n / gn, k / 128]` or `[batch_size, k / 128, n / gn]`; see `gemm_fp8_nt_groupwise` for the rest.
    segment_alignment: no effect.
    """
    check.choice("backend", backend, ("cutlass", "trtllm", "cutile", "triton", "auto"))
    if out is None:
        _sides(a, b, 3)
        out = _result(out, (a.shape[0], b.shape[1]), out_dtype, a)
    check.tensor("m_indptr", m_indptr)
    _multiply(out, a, b, a_scale, b_scale, m_indptr, (scale_major_mode, *scale_granularity_mnk), out_dtype)
    return out


def group_deepgemm_fp8_nt_groupwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    m_indices: torch.Tensor,
    scale_granularity_mnk: Granularity = (1, 128, 128),
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`a[r] @ b[m_indices[r]].T` for every row r, whose groups begin at multiples of 128 rows; `[m, n]`.

    a: fp8 `[m, k]`. b: fp8 `[batch_size, n, k]`. a_scale: fp32 `[m, k / 128]`, any strides. b_scale: fp32
    `[batch_size, n / 128, k / 128]`. m_indices: int32 `[m]`; of each 128 rows the first entry counts; -1 gives zeros.
    """
    check.choice("scale_granularity_mnk", tuple(scale_granularity_mnk), ((1, FP8_BLOCK, FP8_BLOCK),))
    if out is None:
        _sides(a, b, 3)
        out = _result(out, (a.shape[0], b.shape[1]), out_dtype, a)
    _multiply_marked(out, a, b, a_scale, b_scale, m_indices, out_dtype)
    return out


@replayed
def _multiply_marked(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    m_indices: torch.Tensor,
    out_dtype: torch.dtype | None,
) -> None:
    """Check and multiply: `group_deepgemm_fp8_nt_groupwise`."""
    _sides(a, b, 3)
    check.tensor("m_indices", m_indices, dtypes=check.POSITION_DTYPES, shape=(a.shape[0],), like=("a", a))
    row_scale = _oriented("a_scale", a_scale, _blocks(a.shape, 1), "K", 0, a)
    scale = _oriented("b_scale", b_scale, _blocks(b.shape, FP8_BLOCK), "K", 1, a)
    _result(out, (a.shape[0], b.shape[1]), out_dtype, a)
    weights = Weights(b, m_indices[::FP8_BLOCK], scale, "fp8_block")
    if a.shape[0]:
        ops.grouped_gemm(Rows(a, ops.even_bounds(a, FP8_BLOCK), scale=row_scale), weights, out=out)


def batch_deepgemm_fp8_nt_groupwise(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    scale_granularity_mnk: Granularity = (1, 128, 128),
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str = "deepgemm",
) -> torch.Tensor:
    """`a[g, :masked_m[g]] @ b[g].T` for every group g, `[batch_size, m, n]`; the other rows are left as they are.

    a: fp8 `[batch_size, m, k]`. b: fp8 `[batch_size, n, k]`. a_scale: fp32 `[batch_size, m, k / 128]`. b_scale: fp32
    `[batch_size, n / 128, k / 128]`. masked_m: int32 `[batch_size]`. expected_m: rows a group has, about; tiles are
    chosen by it.
    """
    check.choice("backend", backend, ("deepgemm", "cake", "triton", "auto"))
    check.choice("scale_granularity_mnk", tuple(scale_granularity_mnk), ((1, FP8_BLOCK, FP8_BLOCK),))
    if out is None:
        _batches(a, b)
        out = _result(out, (*a.shape[:2], b.shape[1]), out_dtype, a)
    _multiply_masked(out, a, b, a_scale, b_scale, masked_m, max(int(expected_m), 0), out_dtype)
    return out


@replayed
def _multiply_masked(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    masked_m: torch.Tensor,
    expected_rows: int,
    out_dtype: torch.dtype | None,
) -> None:
    """Check and multiply: `batch_deepgemm_fp8_nt_groupwise`."""
    _batches(a, b)
    check.tensor("masked_m", masked_m, dtypes=check.POSITION_DTYPES, shape=(a.shape[0],), like=("a", a))
    row_scale = _oriented("a_scale", a_scale, _blocks(a.shape, 1), "K", 0, a)
    scale = _oriented("b_scale", b_scale, _blocks(b.shape, FP8_BLOCK), "K", 1, a)
    _result(out, (*a.shape[:2], b.shape[1]), out_dtype, a)
    rows = Rows(a.flatten(0, 1), scale=row_scale.flatten(0, 1), lengths=masked_m)
    weights = Weights(b, scale=scale, kind="fp8_block")
    ops.grouped_gemm(rows, weights, out=_flat("out", out), expected_rows=expected_rows)


def fp8_blockscale_gemm_sm90(
    input: torch.Tensor,
    weight: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`input @ weight.T` in block-scaled fp8, `[m, n]`; what comes in bf16 is quantised here.

    input: bf16 or e4m3 `[m, k]`. weight: bf16 or e4m3 `[n, k]`; e4m3 input takes e4m3 weights. k a multiple of 128, n
    of 64. input_scale: fp32 `[m, k / 128]`, any strides; only and always with e4m3. weight_scale: fp32
    `[ceil(n / 128), k / 128]` or `[n, k / 128]`; only and always with e4m3. out_dtype: bf16 (default) or fp16.
    """
    dtypes = (torch.bfloat16, torch.float8_e4m3fn)
    like = ("input", input)
    check.tensor("input", input, dtypes=dtypes, shape=(None, None), inner_contiguous=True)
    shape = (None, input.shape[1])
    check.tensor("weight", weight, dtypes=dtypes, shape=shape, like=like, inner_contiguous=True)
    check.multiple("k", input.shape[1], "the block size", FP8_BLOCK)
    check.multiple("n", weight.shape[0], "the least width", 64)
    if input.dtype == torch.float8_e4m3fn != weight.dtype:
        raise ValueError(check.problem("weight", weight.dtype, "e4m3 as the input", "Quantise the weight too."))
    row_blocks = (input.shape[0], input.shape[1] // FP8_BLOCK)
    a, row_scale = _quantised("input", input, input_scale, (row_blocks,), input)
    n, blocks = weight.shape[0], row_blocks[1]
    b, scale = _quantised("weight", weight, weight_scale, ((-(-n // FP8_BLOCK), blocks), (n, blocks)), input)
    out = _result(out, (input.shape[0], n), out_dtype, input)
    return ops.grouped_gemm(Rows(a, scale=row_scale), Weights(b[None], scale=scale[None], kind="fp8_block"), out=out)


# ---- checks


def _sides(a: torch.Tensor, b: torch.Tensor, dims: int) -> None:
    check.tensor("a", a, dtypes=check.FP8_DTYPES, shape=(None, None), inner_contiguous=True)
    shape = (*[None] * (dims - 1), a.shape[1])
    check.tensor("b", b, dtypes=check.FP8_DTYPES, shape=shape, like=("a", a), inner_contiguous=True)


def _batches(a: torch.Tensor, b: torch.Tensor) -> None:
    check.tensor("a", a, dtypes=check.FP8_DTYPES, shape=(None, None, None), inner_contiguous=True)
    shape = (a.shape[0], None, a.shape[2])
    check.tensor("b", b, dtypes=check.FP8_DTYPES, shape=shape, like=("a", a), inner_contiguous=True)


def _granularity(given: Granularity) -> Granularity:
    allowed = [(m, n, FP8_BLOCK) for m in (1, FP8_BLOCK) for n in (1, FP8_BLOCK)]
    return check.choice("scale_granularity_mnk", tuple(given), allowed)  # type: ignore[no-any-return]


def _group_bounds(m_indptr: torch.Tensor, groups: int, a: torch.Tensor) -> None:
    dtypes = check.POSITION_DTYPES
    check.tensor("m_indptr", m_indptr, dtypes=dtypes, shape=(groups + 1,), like=("a", a), inner_contiguous=True)


def _blocks(shape: tuple[int, ...], shared: int) -> tuple[int, ...]:
    """The shape of scales, one for `shared` rows and 128 columns."""
    return (*shape[:-2], -(-shape[-2] // shared), -(-shape[-1] // FP8_BLOCK))


def _oriented(
    name: str, scale: torch.Tensor, shape: tuple[int, ...], mode: str | None, side: int, a: torch.Tensor
) -> torch.Tensor:
    """`scale` seen as `shape` `[..., rows, blocks of columns]`; side: 0 for a, 1 for b, see `gemm_fp8_nt_groupwise`."""
    check.choice("scale_major_mode", mode, ("MN", "K", None))
    turned = (*shape[:-2], shape[-1], shape[-2])
    if mode is None:
        check.tensor(name, scale, dtypes=(torch.float32,))
        fits, fits_turned = tuple(scale.shape) == shape, tuple(scale.shape) == turned
        # In memory, rows lie side by side for a, and blocks of columns for b.
        other = scale.stride(-1) == 1 if side == 0 else scale.stride(-2) == 1
        mode = "MN" if fits_turned and (not fits or (other and scale.shape[-1] > 1)) else "K"
    wanted = shape if mode == "K" else turned
    check.tensor(name, scale, dtypes=(torch.float32,), shape=wanted, like=("a", a))
    return scale if mode == "K" else scale.transpose(-1, -2)


def _quantised(
    name: str,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shapes: tuple[tuple[int, int], ...],
    like: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and its scales; bf16 is quantised in blocks of 128 columns."""
    given = f"{name}_scale"
    if x.dtype == torch.bfloat16:
        if scale is not None:
            raise ValueError(check.problem(given, "a tensor", f"None with a bf16 {name}", f"Leave out {given}."))
        groups = x.shape[1] // FP8_BLOCK
        codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device)
        split = (x.shape[0], groups, FP8_BLOCK)
        quantization.quantize_groups(codes.view(split), scale, x.unflatten(1, split[1:]), 1e-10, False)
        return codes, scale
    if scale is None:
        raise ValueError(check.problem(given, None, f"scales of the e4m3 {name}", f"Pass {given}."))
    if tuple(scale.shape) not in shapes:
        expected = " or ".join(str(list(s)) for s in shapes)
        raise ValueError(check.problem(given, f"shape {list(scale.shape)}", expected, "Pass a scale for each block."))
    return x, check.tensor(given, scale, dtypes=(torch.float32,), like=("input", like))


def _result(
    out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None, a: torch.Tensor
) -> torch.Tensor:
    if out is None:
        dtype = check.choice("out_dtype", dtype or torch.bfloat16, OUT_DTYPES)
        return torch.empty(shape, dtype=dtype, device=a.device)
    dtypes = OUT_DTYPES if dtype is None else (dtype,)
    return check.tensor("out", out, dtypes=dtypes, shape=shape, like=("a", a), inner_contiguous=True)


def _flat(name: str, x: torch.Tensor) -> torch.Tensor:
    """The first two dimensions as one, without a copy."""
    if x.numel() and x.stride(0) != x.stride(1) * x.shape[1] and x.shape[0] > 1:
        got = f"strides {x.stride()}"
        raise ValueError(check.problem(name, got, "groups one behind the other", "Pass a contiguous tensor."))
    return x.flatten(0, 1)
