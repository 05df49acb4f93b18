"""The paged KV cache: where tokens lie in it, and writing them there."""

from flashinfer.core.arch import arch_of
from flashinfer.core.select import Impl, select
from flashinfer.ops.page.reference import batch_indices_positions, seq_lens
from flashinfer.ops.page.spec import Append, AppendSpec, fp8_as_bytes
from flashinfer.ops.page.support import torch_supports, triton_supports

IMPLS = (
    Impl("triton", "flashinfer.ops.page.triton", triton_supports),
    Impl("torch", "flashinfer.ops.page.reference", torch_supports),
)


def append(tensors: Append, backend: str = "auto") -> None:
    """Write new tokens into their pages, in place; "auto" is Triton on a GPU and torch on CPU tensors."""
    num_tokens, num_kv_heads, head_dim_k = tensors.key.shape
    if num_tokens == 0 or tensors.kv_indices.numel() == 0:
        return
    page_size, head_dim_v = tensors.k_cache.shape[1], tensors.value.shape[2]
    dtypes = (tensors.key.dtype, tensors.k_cache.dtype)
    spec = AppendSpec(num_kv_heads, head_dim_k, head_dim_v, page_size, *dtypes)
    impl = select(IMPLS, spec, arch_of(tensors.key.device), backend)
    impl.load().append(spec, fp8_as_bytes(tensors))


__all__ = ["IMPLS", "Append", "AppendSpec", "append", "batch_indices_positions", "seq_lens"]
