"""Calls every kernel, small, on the GPU: what compute-sanitizer watches.

Each result is compared with torch in fp64, so that a clean report cannot come from kernels that did nothing.
Lengths are odd on purpose: last pages part full, tiles cut off, one request without KV. `python3 -m
tools.gpu_sanitize_cases cpu` tries the cases themselves on another device.
"""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

import flashinfer
from flashinfer import fused_moe
from flashinfer.concat_ops import concat_mla_k
from flashinfer.core.arch import arch_of
from flashinfer.ops import gemm, moe

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
PAGE_SIZE = 4
KV_LENS = (37, 0, 5, 130)
QO_LENS = (9, 2, 5, 3)
HEADS = (6, 2, 64)
# fp16 results of this size: one rounding of the probabilities and one of the output.
MAX_ERROR = 4 * torch.finfo(torch.float16).eps


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float16)


def indptr(counts: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """One request in fp64: q [qo, Hq, D], k and v [kv, Hk, D]; zeros without KV."""
    if len(k) == 0:
        return torch.zeros_like(q, dtype=torch.float64)
    mask = torch.ones(len(q), len(k), dtype=torch.bool, device=DEVICE)
    mask = mask.tril(len(k) - len(q)) if causal else mask
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


class PagedBatch:
    """A shuffled paged cache of the requests' (k, v), appended; it holds NaN where no token is."""

    def __init__(self, kv: list[tuple[torch.Tensor, torch.Tensor]], page_size: int) -> None:
        lens = tuple(len(k) for k, _ in kv)
        pages = tuple(-(-n // page_size) for n in lens)
        k, v = (torch.cat([part[i] for part in kv]) for i in range(2))
        self.kv = kv
        self.indptr = indptr(pages)
        self.indices = torch.randperm(sum(pages), device=DEVICE).int()
        self.last = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in lens], device=DEVICE).int()
        self.cache = torch.full((sum(pages), 2, page_size, *k.shape[1:]), float("nan"), device=DEVICE).half()
        batch_indices, positions = flashinfer.get_batch_indices_positions(
            indptr(lens), torch.tensor(lens, device=DEVICE).int(), len(k)
        )
        flashinfer.append_paged_kv_cache(
            k, v, batch_indices, positions, self.cache, self.indices, self.indptr, self.last, "NHD"
        )

    @classmethod
    def drawn(cls) -> PagedBatch:
        _, num_kv_heads, head_dim = HEADS
        return cls([(normal(n, num_kv_heads, head_dim), normal(n, num_kv_heads, head_dim)) for n in KV_LENS], PAGE_SIZE)

    def check(self, name: str, q: torch.Tensor, out: torch.Tensor, qo_lens: tuple[int, ...], causal: bool) -> None:
        parts = zip(q.split(qo_lens), self.kv, strict=True)
        compare(name, out, torch.cat([expected(part, *kv, causal=causal) for part, kv in parts]))


def compare(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Fail, with the figures, where `got` is further from `want` than rounding explains (NaN included)."""
    error = float((got.double() - want).norm() / want.norm())
    if not error <= MAX_ERROR:
        sys.exit(f"{name}: relative error {error:.3g}, at most {MAX_ERROR:.3g} expected")
    print(f"{name}: ok ({error:.2g})", flush=True)


def workspace() -> torch.Tensor:
    return torch.empty(8 << 20, dtype=torch.uint8, device=DEVICE)


def decode() -> None:
    batch, q = PagedBatch.drawn(), normal(len(KV_LENS), HEADS[0], HEADS[2])
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "NHD")
    wrapper.plan(batch.indptr, batch.indices, batch.last, *HEADS, PAGE_SIZE, q_data_type=q.dtype)
    batch.check("append and decode", q, wrapper.run(q, batch.cache), (1,) * len(KV_LENS), causal=False)


def prefill_paged() -> None:
    batch, q = PagedBatch.drawn(), normal(sum(QO_LENS), HEADS[0], HEADS[2])
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD")
    wrapper.plan(
        indptr(QO_LENS), batch.indptr, batch.indices, batch.last, *HEADS, PAGE_SIZE, causal=True, q_data_type=q.dtype
    )
    batch.check("prefill, paged", q, wrapper.run(q, batch.cache), QO_LENS, causal=True)


def prefill_ragged() -> None:
    lens = (33, 1, 70)
    q, k, v = (normal(sum(lens), heads, HEADS[2]) for heads in (HEADS[0], HEADS[1], HEADS[1]))
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD")
    wrapper.plan(indptr(lens), indptr(lens), *HEADS, causal=True, q_data_type=q.dtype)
    parts = zip(q.split(lens), k.split(lens), v.split(lens), strict=True)
    compare("prefill, ragged", wrapper.run(q, k, v), torch.cat([expected(*part, causal=True) for part in parts]))


def prefill_hopper() -> None:
    """The kernel of its own, where there is one: ragged, pages that end inside of a box, pages gathered."""
    if not arch_of(DEVICE).has_wgmma:
        print("prefill on Hopper: not on this device")
        return
    for dim, qo_lens, kv_lens in ((64, (130, 1, 0, 70), (200, 3, 9, 70)), (128, (257,), (300,)), (256, (65,), (65,))):
        q, k, v = normal(sum(qo_lens), 4, dim), normal(sum(kv_lens), 2, dim), normal(sum(kv_lens), 2, dim)
        parts = list(zip(q.split(qo_lens), k.split(kv_lens), v.split(kv_lens), strict=True))
        want = torch.cat([expected(*part, causal=True) for part in parts])
        ragged = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", backend="fa3")
        ragged.plan(indptr(qo_lens), indptr(kv_lens), 4, 2, dim, causal=True, q_data_type=q.dtype)
        compare(f"prefill on Hopper, ragged, {dim}", ragged.run(q, k, v), want)
        for size in (8, 12, 1):
            batch = PagedBatch([(k_part, v_part) for _, k_part, v_part in parts], size)
            paged = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend="fa3")
            pages = (batch.indptr, batch.indices, batch.last)
            paged.plan(indptr(qo_lens), *pages, 4, 2, dim, size, causal=True, q_data_type=q.dtype)
            compare(f"prefill on Hopper, pages of {size}, {dim}", paged.run(q, batch.cache), want)


def merge() -> None:
    (v_a, v_b), (s_a, s_b) = ([normal(7, 3, 64) for _ in range(2)], [normal(7, 3).float() for _ in range(2)])
    weights = torch.stack([s_a, s_b]).double().mul(torch.tensor(2.0).log()).softmax(0)[..., None]
    want = weights[0] * v_a.double() + weights[1] * v_b.double()
    compare("merge_state", flashinfer.merge_state(v_a, s_a, v_b, s_b)[0], want)
    values, lse = torch.stack([v_a, v_b], 1), torch.stack([s_a, s_b], 1)
    compare("merge_states", flashinfer.merge_states(values, lse)[0], want)


def norms() -> None:
    """Few rows and many, odd widths, views; each row of blocks that are not whole."""
    for rows, width in ((3, 577), (1001, 40)):
        wide, residual, weight = normal(rows, width + 8), normal(rows, width), normal(width)
        x = wide[:, :width]
        want = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-6)
        compare(f"rmsnorm {rows} x {width}", flashinfer.rmsnorm(x, weight), want)
        activated = torch.nn.functional.silu(want)
        compare(f"fused_rmsnorm_silu {rows} x {width}", flashinfer.fused_rmsnorm_silu(x, weight), activated)
        total = x.double() + residual.double()
        flashinfer.fused_add_rmsnorm(x, residual, weight)
        compare(f"fused_add_rmsnorm {rows} x {width}", residual, total)


def activations() -> None:
    """Tiles cut off on both sides."""
    for rows, width in ((3, 1000), (4001, 1032)):
        x = normal(rows, 2 * width)
        a, gate = x.double().chunk(2, -1)
        compare(f"silu_and_mul {rows} x {width}", flashinfer.silu_and_mul(x), torch.nn.functional.silu(a) * gate)


def rotated(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """NeoX pairs of the first components of heads, in fp64; table: cosines, then sines."""
    cos, sin = (part[:, None] for part in table.double()[positions].chunk(2, -1))
    a, b, rest = x.double().split((cos.shape[2], cos.shape[2], x.shape[2] - 2 * cos.shape[2]), -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def rope() -> None:
    """Odd numbers of heads and tokens, views, part of a head; twice, since the second call takes a shorter way."""
    angle = torch.arange(50, device=DEVICE).double()[:, None] * 1e4 ** (-torch.arange(0, 1, 1 / 20, device=DEVICE))
    table = torch.cat([angle.cos(), angle.sin()], -1).float()
    for nnz in (3, 3, 41, 41):
        wide, positions = normal(nnz, 8, 72), torch.randint(50, (nnz,), device=DEVICE)
        q, k = wide[:, :5], wide[:, 5:]
        want = torch.cat([rotated(x, positions, table) for x in (q, k)], 1)
        q_out, k_out = flashinfer.apply_rope_pos_ids(q, k, positions, rotary_dim=40)
        compare(f"apply_rope_pos_ids {nnz}", torch.cat([q_out, k_out], 1), want)
        flat = [x.clone().flatten(1) for x in (q, k)]
        flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, *flat, 72, table)
        compare(f"apply_rope_with_cos_sin_cache {nnz}", torch.cat(flat, 1), want.flatten(1))
        flashinfer.apply_rope_pos_ids_inplace(q, k, positions, rotary_dim=40)
        compare(f"apply_rope_pos_ids_inplace {nnz}", wide, want)


def pages() -> None:
    """Slots in random order, two of them skipped; caches of latent attention; fp8."""
    nnz, slots = 23, torch.randperm(32, device=DEVICE)[:23].clone()
    key, value = normal(nnz, 3, 72), normal(nnz, 3, 72)
    slots[[4, 22]] = -1
    kept = slots >= 0
    for _ in range(2):
        cache = torch.zeros(2, 8, PAGE_SIZE, 3, 72, device=DEVICE, dtype=torch.uint8).view(torch.float8_e4m3fn)
        flashinfer.page.append_paged_kv_cache_with_slot_mapping(key, value, slots, (cache[0], cache[1]))
        for x, stored in ((key, cache[0]), (value, cache[1])):
            found = stored.float().flatten(0, 1)[slots[kept]]
            compare("append to slots", found, x[kept].to(torch.float8_e4m3fn).double())
    lens = torch.tensor([9, 14], device=DEVICE).int()
    batch_indices, positions = flashinfer.get_batch_indices_positions(indptr((9, 14)), lens, nnz)
    ckv, kpe = torch.zeros(8, PAGE_SIZE, 96, device=DEVICE).half(), torch.zeros(8, PAGE_SIZE, 24, device=DEVICE).half()
    new, rope_part, table = normal(nnz, 96), normal(nnz, 24), torch.randperm(7, device=DEVICE).int()
    last = torch.tensor([1, 2], device=DEVICE).int()
    where = (batch_indices, positions, ckv, kpe, table, indptr((3, 4)), last)
    flashinfer.append_paged_mla_kv_cache(new, rope_part, *where)
    place = (
        table.long()[indptr((3, 4)).long()[batch_indices.long()] + positions // PAGE_SIZE],
        positions.long() % PAGE_SIZE,
    )
    compare("append_paged_mla_kv_cache", ckv[place], new.double())
    compare("append_paged_mla_kv_cache, rotated part", kpe[place], rope_part.double())
    compare("get_seq_lens", flashinfer.get_seq_lens(indptr((3, 4)), last, PAGE_SIZE), lens.double())


def codes() -> None:
    """Groups and rows that are not whole blocks; masks that end inside of a byte."""
    x = normal(7, 5 * 96)[:, :480]
    for dtype in (torch.float8_e4m3fn, torch.int8):
        for _ in range(2):
            quantized, scales = flashinfer.quantization.per_token_group_quant_8bit(x, 96, dst_dtype=dtype)
        found = flashinfer.quantization.dequantize_8bit(quantized, scales, torch.float32)
        want = x.float().view(7, 5, 96) / scales[..., None]
        want = want.round() if dtype == torch.int8 else want.to(dtype).float()
        compare(f"per_token_group_quant_8bit {dtype}", found, (want * scales[..., None]).double().flatten(1))
    mask, offsets = torch.rand(1003, device=DEVICE) < 0.5, torch.tensor([0, 3, 3, 700, 1003], device=DEVICE)
    packed = flashinfer.packbits(mask, "little")
    bits = packed[:, None] >> torch.arange(8, device=DEVICE, dtype=torch.uint8) & 1
    compare("packbits", bits.flatten()[:1003], mask.double())
    segments, byte_offsets = flashinfer.segment_packbits(mask, offsets, "little")
    part = segments[int(byte_offsets[2]) : int(byte_offsets[3])]
    compare("segment_packbits", part, flashinfer.packbits(mask[3:700], "little").double())
    pages = torch.randint(256, (6, PAGE_SIZE, 3, 48), device=DEVICE, dtype=torch.uint8)
    scales = torch.randint(1, 120, (6, PAGE_SIZE, 3, 6), device=DEVICE, dtype=torch.uint8)
    table, lens = torch.tensor([[5, 0], [3, 2]], device=DEVICE), torch.tensor([7, 2], device=DEVICE).int()
    one, out = torch.ones(1, device=DEVICE), torch.zeros(2, 2, 7, 3, 96, device=DEVICE)
    new, slots = normal(9, 3, 96), torch.randperm(24, device=DEVICE)[:9]
    slots[2] = -1
    append = flashinfer.nvfp4_quantize_append_paged_kv_cache_with_slot_mapping
    append(new, new, slots, (pages, pages.clone()), (scales, scales.clone()), 0.01, 0.01)
    if pages.flatten(0, 1)[slots[3]].float().std() == 0:
        sys.exit("append of fp4: nothing was written")
    rows = flashinfer.nvfp4_kv_dequantize(pages.view(-1, 48), scales.view(-1, 6), one, torch.float32).view(24, 3, 96)
    flashinfer.nvfp4_kv_dequantize_paged((pages, pages), (scales, scales), table, lens, one, one, *out)
    order = torch.cat([torch.arange(20, 24), torch.arange(3)]).to(DEVICE)
    compare("nvfp4_kv_dequantize_paged", out[0, 0], rows[order].double())
    k_nope, k_rope, k = normal(5, 3, 40), normal(5, 1, 24), torch.empty(5, 3, 64, device=DEVICE).half()
    concat_mla_k(k, k_nope, k_rope)
    compare("concat_mla_k", k, torch.cat([k_nope, k_rope.expand(-1, 3, -1)], -1).double())


def sampling() -> None:
    """Odd rows off 16 bytes: what is held and what is left open, thresholds, selections, drafts."""
    logits = (torch.randn(5, 9008, device=DEVICE) * 2)[:, 7:]
    probs, greedy = flashinfer.softmax(logits), logits.double().argmax(-1)
    compare("softmax", probs, logits.double().softmax(-1))
    compare("top_p_renorm_probs", flashinfer.top_p_renorm_probs(probs, 0.999999), probs.double())
    compare("top_k_renorm_probs", flashinfer.top_k_renorm_probs(probs, 8000).sum(-1), probs.new_ones(5).double())
    compare("top_k", flashinfer.top_k(logits, 700)[0].sort().values, logits.double().topk(700).values.flip(-1))
    compare("top_k = 1", flashinfer.top_k_top_p_sampling_from_logits(logits, 1, 0.5), greedy.double())
    for tokens in (
        flashinfer.sampling_from_logits(logits),
        flashinfer.top_p_sampling_from_probs(probs, 0.98),
        flashinfer.top_k_top_p_sampling_from_probs(probs, 5000, 0.9),
        flashinfer.min_p_sampling_from_probs(probs, 1e-3),
    ):
        assert ((tokens >= 0) & (tokens < 9001)).all()
    rows = probs[:, None].expand(5, 3, 9001)
    accepted = flashinfer.chain_speculative_sampling(rows[:, :2], greedy[:, None].expand(5, 2), rows)[2]
    compare("chain_speculative_sampling", accepted, accepted.new_full((5,), 2).double())


def products() -> None:
    """Groups of odd sizes, empty ones too: by tensor map, by pointers, gathered, in pairs, of fp8 and of fp4."""
    sizes = (37, 0, 5, 130, 1)
    bounds, total, e4m3 = indptr(sizes), sum(sizes), torch.float8_e4m3fn
    for depth, width, dtype in ((136, 72, torch.float16), (133, 75, torch.float16), (256, 200, e4m3)):
        x, w = normal(total, depth).to(dtype), normal(len(sizes), width, depth).to(dtype)
        groups = zip(x.double().split(sizes), w.double(), strict=True)
        want = torch.cat([a @ b.t() for a, b in groups])
        call = flashinfer.grouped_mm_fp8 if dtype == e4m3 else flashinfer.grouped_mm_bf16
        compare(f"grouped {dtype}", call(x, w, bounds, out_dtype=torch.float16), want)
    chosen = torch.randperm(total, device=DEVICE).int()
    x, w = normal(total, 64), normal(len(sizes), 144, 64)
    pairs = [a @ b.t() for a, b in zip(x.double()[chosen.long()].split(sizes), w.double(), strict=True)]
    want = torch.cat([silu(gate) * up for up, gate in (pair.chunk(2, -1) for pair in pairs)])
    epilogue = gemm.Epilogue(None, gemm.Activation("swiglu"))
    compare("grouped swiglu", gemm.grouped_gemm(gemm.Rows(x, bounds, chosen), gemm.Weights(w), epilogue), want)
    codes = torch.randint(0, 256, (70, 48), device=DEVICE).to(torch.uint8)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=DEVICE, dtype=torch.float64)
    numbers = torch.cat([table, -table])[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]
    ones, x = torch.ones(70, 6, device=DEVICE).to(e4m3), normal(9, 96)
    compare("mm_bf16_fp4", flashinfer.mm_bf16_fp4(x, codes, ones, backend="auto"), x.double() @ numbers.t())


def mixtures() -> None:
    """Routing, and experts of odd sizes for few tokens, for sorted ones and for many; some ids are held elsewhere."""
    for tokens, hidden, inter in ((5, 72, 40), (33, 72, 40), (130, 136, 72)):
        weights, ids = fused_moe.route(normal(tokens, 7), 3)
        x, fc1, fc2 = normal(tokens, hidden), normal(5, 2 * inter, hidden) / 8, normal(5, hidden, inter) / 8
        want = torch.zeros(tokens, hidden, dtype=torch.float64, device=DEVICE)
        for e in range(5):
            rows, place = (ids - 1 == e).nonzero(as_tuple=True)
            up, gate = (x[rows].double() @ fc1[e].double().t()).chunk(2, -1)
            want[rows] += weights[rows, place, None] * ((silu(gate) * up) @ fc2[e].double().t())
        experts = moe.Experts(gemm.Weights(fc1), gemm.Weights(fc2), gemm.Activation("swiglu"))
        compare(f"moe of {tokens}", moe.moe(x, moe.Routes(ids, weights, 1), experts), want)


if __name__ == "__main__":
    small = (norms, activations, rope, pages, codes, sampling, products, mixtures)
    for case in (decode, prefill_paged, prefill_ragged, prefill_hopper, merge, *small):
        case()  # comparing reads the result, so it waits for the device
