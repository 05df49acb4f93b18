"""Answer many prompts at once with SmolLM2, by continuous batching over one paged KV cache.

    python examples/demo.py                     # `make demo` installs what this needs and runs it
    python examples/demo.py --check             # compare greedy tokens with transformers
    python examples/demo.py --random-weights    # no model, only torch and flashinfer
    python examples/demo.py --tensor-parallel 2 # two processes (on GPUs: one GPU each) share the model

Reading order: attention.py (FlashInfer's wrappers), model.py (the layers), engine.py (the batching), parallel.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence

import torch

try:
    import flashinfer
except ImportError:
    sys.exit("flashinfer cannot be imported: run `make demo`, or `pip install -e .` in the repository root.")
from check import check
from display import make_display
from engine import Engine, Limits, Request, Sampling
from model import Llama, LlamaConfig
from parallel import Ranks, run_on_ranks
from random_llama import random_llama
from smollm2 import smollm2
from source import MissingPackageError, Source

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "Give me three tips for learning to play the guitar.",
    "Translate to Spanish: good morning, my friend.",
    "Summarise this story in one sentence: "
    + "A young fisherman lived alone at the edge of a grey sea. Every morning he rowed out before the sun rose, and "
    "every evening he came back with less than the day before. One night a storm broke his boat, and he would have "
    "drowned if a seal had not pushed him to the shore. He mended the boat with driftwood, and from that day he threw "
    "the first fish of each catch back for the seal. The catches grew, the village prospered, and when he was old he "
    "told the children that the sea gives to those who give to it. Some of them laughed, some of them listened, and "
    "one of them, a girl with salt in her hair, took his oars when he could no longer lift them. She rows there still, "
    "they say, and a seal swims beside her boat.",
    "Who wrote Romeo and Juliet?",
    "What is a page table?",
    "List five animals that live in the desert.",
    "Why do leaves change colour in autumn?",
    "Write a short poem about a cat who learned to program a computer and never slept again.",
    "What is the difference between a lake and a river?",
]
DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `auto` values are resolved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt (repeatable; default: built in)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--check", action="store_true", help="compare greedy tokens with transformers, ignoring EOS")

    group = parser.add_argument_group("sampling (greedy by default)")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--top-k", type=int, default=0)
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--seed", type=int, default=0, help="of sampling and of --random-weights")

    group = parser.add_argument_group("engine")
    for name, help_text in [
        ("max_batch", "requests running at once"),
        ("max_step_tokens", "tokens computed in one step; longer prompts are prefilled in chunks"),
        ("num_pages", "pages in the KV cache"),
        ("page_size", "tokens per page"),
    ]:
        group.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(Limits(), name), help=help_text)
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float32 on CPU or with --check")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--backend", default="auto", help="attention implementation: auto, torch, triton")
    group.add_argument("--threads", type=int, default=min(8, available_cpus()), help="CPU threads of torch")
    group.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="RANKS",
        help="processes, or GPUs, that share the model; must divide its heads (SmolLM2: 3)",
    )

    group = parser.add_argument_group("random weights")
    group.add_argument("--random-weights", action="store_true", help="a toy Llama over bytes instead of SmolLM2")
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_qo_heads", "num_kv_heads", "head_dim"):
        group.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(LlamaConfig(), name))
    group.add_argument("--num-experts", type=int, default=0, help="a toy Mixtral with so many experts")

    args = parser.parse_args(argv)
    if args.dtype == "auto":
        args.dtype = "float32" if args.check or args.device == "cpu" else "bfloat16"
    gpus = torch.cuda.device_count()
    if args.tensor_parallel < 1 or (args.device.startswith("cuda") and args.tensor_parallel > max(gpus, 1)):
        parser.error(f"--tensor-parallel: got {args.tensor_parallel}, expected 1 or more, on CUDA at most {gpus} GPUs.")
    if args.check and (args.dtype != "float32" or args.temperature != 0):
        parser.error("--check compares greedy tokens in float32: leave --dtype and --temperature alone.")
    if args.check and importlib.util.find_spec("transformers") is None:
        parser.error("--check needs the Python package transformers: run `make demo`, which installs it.")
    return args


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(args: argparse.Namespace, ranks: Ranks) -> tuple[Source, Llama]:
    """The model, or this rank's share of it, on its device."""
    if args.random_weights:
        shape = LlamaConfig(
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_layers=args.num_layers,
            num_qo_heads=args.num_qo_heads,
            num_kv_heads=args.num_kv_heads,
            head_dim=args.head_dim,
            num_experts=args.num_experts,
        )
        source = random_llama(shape, args.seed)
    else:
        source = smollm2()
    dtype = getattr(torch, args.dtype)
    config, weights = ranks.shard(source.config, source.weights)
    return source, Llama(config, {k: w.to(args.device, dtype) for k, w in weights.items()}, ranks)


def build(args: argparse.Namespace, prompts: Sequence[str], ranks: Ranks) -> tuple[Source, Engine, list[Request]]:
    """The engine with `prompts` waiting in it."""
    limits = Limits(args.max_batch, args.max_step_tokens, args.num_pages, args.page_size)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    source, model = load(args, ranks)
    # With --check both sides go on after EOS, so that every prompt compares as many tokens.
    engine = Engine(model, limits, sampling, () if args.check else source.eos_ids, args.backend)
    return source, engine, [engine.submit(source.encode(prompt), args.max_new_tokens) for prompt in prompts]


def summary(args: argparse.Namespace, engine: Engine, num_requests: int) -> str:
    """What the run did, in a few lines."""
    s, pool = engine.stats, engine.pool
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"cpu, {args.threads} threads"
    decode_only = s.decode_only_tokens / s.decode_only_seconds if s.decode_only_seconds else 0.0
    prefill = s.prompt_tokens / s.prefill_seconds
    return f"""
requests   {num_requests}, at most {s.max_running} at once
steps      {s.steps}, of which {s.mixed_steps} mixed prefill and decode
prefill    {s.prompt_tokens} prompt tokens, {prefill:.1f} tok/s (time of the steps with prefill in them)
decode     {s.generated_tokens} new tokens, {decode_only:.1f} tok/s (decode-only steps)
overall    {s.generated_tokens / s.seconds:.1f} new tok/s in {s.seconds:.2f} s
pages      at most {pool.peak_used} of {pool.num_pages} used, {pool.page_size} tokens each; {pool.num_used} used now
attention  {engine.attention.implementations()} (flashinfer {flashinfer.__version__})
device     {device}, {args.dtype}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 1 if --check found a difference, 2 if it cannot run as asked."""
    args = parse_args(argv)
    if args.tensor_parallel > 1:
        return run_on_ranks(run, args.tensor_parallel, args.device, args)
    return run(Ranks(), args.device, args)


def run(ranks: Ranks, device: str, args: argparse.Namespace) -> int:
    """One rank's run; rank 0 shows it."""
    args.device = device
    torch.set_num_threads(max(1, args.threads // ranks.size))
    start = time.perf_counter()
    prompts = args.prompt or PROMPTS
    try:
        source, engine, requests = build(args, prompts, ranks)
    except (MissingPackageError, ValueError) as error:
        if ranks.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if ranks.rank > 0:
        while engine.has_work:
            engine.step()
        return 0
    shared = f", shared by {ranks.size} ranks" if ranks.size > 1 else ""
    print(f"{source.name} on {args.device}{shared}, ready after {time.perf_counter() - start:.1f} s", flush=True)
    with make_display(engine, prompts, source.decode) as display:
        while engine.has_work:
            display.update(engine.step())
    print(summary(args, engine, len(requests)))
    return 0 if not args.check or check(source, requests, args.device) else 1


if __name__ == "__main__":
    sys.exit(main())
