"""Decode steps of wavekv: retrieval on the engine, and exact attention that streams all pages.

A context is filled with clustered keys (`decode_fill`), its steps get queries of a walk whose reuse
of pages is set (`decode_steps`).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from comparison import attempted, share_or_size
from decode_baselines import peak_bytes, start_peak
from decode_figures import engine_bytes, long_run, paging, reuse_seen
from decode_fill import FilledContexts, fill_contexts, say
from decode_model import release_memory, step_bytes, time_steps, weight_bytes
from decode_profile import profile_steps
from decode_result import Result
from decode_steps import WalkedSteps
from decode_walk import query_walk, rho_for_reuse
from torch import Tensor
from transformers import LlamaForCausalLM

from wavekv.config import OffloadConfig
from wavekv.kvstore import CODEC_BITS
from wavekv.model_adapters.attention import NAME, register
from wavekv.model_adapters.cache import OffloadedCache
from wavekv.offload import OffloadRuntime

WALK_STEPS = 1024
"""Steps of the walk before it turns back: after a turn all its pages are resident, for a while."""
WARM_UPS = 32
"""Steps before those that are timed: the pool fills up."""
EXACT_REPEATS = 3
PREFETCHES = ("none", "runners-up", "early")


def add_flags(parser: ArgumentParser) -> None:
    """The flags of these systems."""
    group = parser.add_argument_group("wavekv")
    group.add_argument("--budget", type=float, default=0.02, help="share of tokens retrieved")
    group.add_argument("--refine", type=int, default=12)
    group.add_argument("--prefetch", choices=PREFETCHES, default="none")
    group.add_argument("--host-dtype", choices=("model", *CODEC_BITS), default="model")
    group.add_argument("--device-budget", type=share_or_size, default=0.9, help="see OffloadConfig")
    group.add_argument("--max-misses", type=int, help="pages fetched by a KV head in a step")
    group.add_argument("--steps", type=int, default=256, help="steps that are timed")
    group.add_argument(
        "--reuse", type=float, default=0.66, help="share of pages that the step before chose too"
    )
    group.add_argument(
        "--early-cosine", type=float, default=0.9, help="of a guessed query and the query"
    )
    group.add_argument(
        "--host-layers", type=int, default=8, help="layers with host pages of their own"
    )
    group.add_argument("--p99", type=int, default=0, help="also time so many steps one by one")
    group.add_argument("--profile", type=Path, help="profile; the trace of a step, a .gz")
    group.add_argument(
        "--sweep-reuse", type=float, nargs="+", help="retrieval alone, over one filled context"
    )
    group.add_argument("--sweep-prefetch", choices=PREFETCHES, nargs="+")


def offload_config(args: Namespace, **changes: Any) -> OffloadConfig:
    """The settings that the flags ask for."""
    settings = {
        "budget": args.budget,
        "refine": args.refine,
        "prefetch": args.prefetch,
        "max_misses": args.max_misses,
        "host_dtype": args.host_dtype,
        "device_budget": args.device_budget,
    }
    return OffloadConfig(**settings | changes)


def retrieval(args: Namespace, model: LlamaForCausalLM, tokens: int, batch: int) -> Result:
    """Steps of the engine over a context of its own."""
    runtime = OffloadRuntime(offload_config(args))
    filled = fill_contexts(
        model, runtime, tokens, batch, host_layers=args.host_layers, seed=args.seed
    )
    # filling takes memory that decoding does not
    release_memory()
    start_peak(model)
    return retrieval_steps(args, model, filled, tokens, batch)


def sweep(args: Namespace, model: LlamaForCausalLM, tokens: int, batch: int) -> Iterator[Result]:
    """Retrieval for all wanted pairs of reuse and prefetch, over one filled context."""
    runtime = OffloadRuntime(offload_config(args))
    filled = fill_contexts(
        model, runtime, tokens, batch, host_layers=args.host_layers, seed=args.seed
    )
    for reuse, prefetch in product(
        args.sweep_reuse or [args.reuse], args.sweep_prefetch or [args.prefetch]
    ):
        some = Namespace(**vars(args) | {"reuse": reuse, "prefetch": prefetch})
        filled.renew(offload_config(some))
        start_peak(model)
        run = partial(retrieval_steps, some, model, filled, tokens, batch)
        settings = f"reuse {reuse}, prefetch {prefetch}: "
        yield attempted(run, "retrieval", tokens, batch, settings)


def retrieval_steps(
    args: Namespace, model: LlamaForCausalLM, filled: FilledContexts, tokens: int, batch: int
) -> Result:
    """Time steps over a filled context, whose settings are those of its runtime."""
    say(f"walk with {args.reuse:.0%} reuse, prefetch {args.prefetch}")
    walk, guesses = walks(args, model, batch)
    steps = WalkedSteps(model, filled.layers, walk, guesses)
    engine = steps.engine
    say(f"captured; pool of {engine.shape.slots} slots, {engine.shape.most} pages a step at most")
    for _ in range(WARM_UPS):
        steps.step()
    appended = len(engine.grown)
    for layer in engine.layers:
        layer.totals.paging.zero_()
        layer.totals.tail_mass.zero_()
    times = time_steps(steps.step, warmup=0, repeats=args.steps, device=model.device)
    extra = settings_of(args, filled) | paging(engine, args.steps, filled.page_bytes)
    extra["appends"] = len(engine.grown) - appended
    say("timed")
    if args.p99:
        extra["p99"] = long_run(steps, args.p99, model.device)
    extra["reuse_seen"] = reuse_seen(steps)
    if args.profile:
        extra["kernels"] = profile_steps(steps.step, args.profile, model.device)
    read = engine_bytes(engine)
    held = sum(context.paged.statistics_nbytes for context in filled.layers)
    held += sum(layer.pool.pages.nbytes for layer in engine.layers) + engine.ring.nbytes
    return Result.of_times(
        "retrieval",
        tokens,
        batch,
        times,
        # the queries are the benchmark's, not the system's
        device_bytes=peak_bytes(model, held) - _queries_bytes(walk, guesses),
        host_bytes=filled.num_pages * filled.page_bytes,
        bytes_read=weight_bytes(model) + sum(read.values()),
        extra=extra | {"bytes_read_of": read},
    )


def exact(args: Namespace, model: LlamaForCausalLM, tokens: int, batch: int) -> Result:
    """Exact attention over pages on the host, as the wrapped model does it: eager."""
    start_peak(model)
    cache = OffloadedCache(model.config, offload_config(args, mode="exact", prefetch="none"))
    filled = fill_contexts(
        model, cache.runtime, tokens, batch, host_layers=args.host_layers, seed=args.seed
    )
    return exact_steps(model, cache, filled, tokens, batch)


def exact_steps(
    model: LlamaForCausalLM,
    cache: OffloadedCache,
    filled: FilledContexts,
    tokens: int,
    batch: int,
    repeats: int = EXACT_REPEATS,
) -> Result:
    """Time exact steps over a filled context; `cache` is empty, and of its runtime."""
    for layer, context in zip(cache.offloaded_layers, filled.layers, strict=True):
        layer.lazy_initialization(context.steady.keys.view, context.steady.values.view)
        layer._context = context
    register()
    model.set_attn_implementation(NAME)
    token_ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def step() -> list[int]:
        logits = model(input_ids=token_ids, past_key_values=cache, use_cache=True).logits
        token_ids.copy_(logits.argmax(-1))
        return token_ids[:, 0].tolist()

    times = time_steps(step, warmup=1, repeats=repeats, device=model.device)
    moved = filled.num_pages * filled.page_bytes
    held = sum(context.paged.statistics_nbytes for context in filled.layers)
    return Result.of_times(
        "exact",
        tokens,
        batch,
        times,
        device_bytes=peak_bytes(model, held),
        host_bytes=moved,
        bytes_read=step_bytes(model, tokens, batch),
        extra={"host_layers": filled.host_layers, "pcie_bytes": moved},
        notes="eager; all pages pass through the device",
    )


def walks(args: Namespace, model: LlamaForCausalLM, batch: int) -> tuple[Tensor, Tensor | None]:
    """Queries [S, layers, B, Hq, D] of the wanted reuse, and guesses of them for an early prefetch.

    A guess is off by a walk of its own: it errs in the next step about as it did in this one.
    """
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rho = rho_for_reuse(
        args.reuse,
        args.budget,
        dim=config.head_dim,
        group=heads // kv_heads,
        device=model.device,
    )
    sizes = WALK_STEPS, config.num_hidden_layers, batch, heads, kv_heads, config.head_dim
    walk, noise = (
        query_walk(None, *sizes, rho, seed, device=model.device, dtype=model.dtype)
        for seed in (args.seed + 1, args.seed + 2)
    )
    if args.prefetch != "early":
        return walk, None
    cosine = args.early_cosine
    return walk, cosine * walk + sqrt(1 - cosine**2) * noise


def _queries_bytes(walk: Tensor, guesses: Tensor | None) -> int:
    """What queries take of the device memory whose peak is counted: nothing on a CPU."""
    if not walk.is_cuda:
        return 0
    return walk.nbytes + (guesses.nbytes if guesses is not None else 0)


def settings_of(args: Namespace, filled: FilledContexts) -> dict[str, Any]:
    """What a retrieval was asked to do."""
    names = "budget", "refine", "prefetch", "max_misses", "host_dtype", "device_budget"
    extra = {name: getattr(filled.runtime.config, name) for name in names}
    extra |= {"reuse_asked": args.reuse, "host_layers": filled.host_layers}
    if args.prefetch == "early":
        extra["early_cosine"] = args.early_cosine
    return extra
