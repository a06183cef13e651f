"""A long prompt from its tokens to an answer: prefill, then decode steps, of a model with random
weights and random tokens; the prefill beside the same arithmetic without pages, index and host."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from comparison import share_or_size
from decode_baselines import peak_bytes, start_peak
from decode_fill import say
from decode_model import INIT_STD, layer_kv_bytes, release_memory, time_steps, weight_bytes
from decode_result import Result
from needles import Needles, draw_needles, figures, page_of
from prefill import flops
from prefill_full import BufferedPrefill
from torch import Tensor
from transformers import LlamaForCausalLM

from wavekv import OffloadConfig, OffloadedCache, OffloadedKV
from wavekv.index import relative_error
from wavekv.kvstore import CODEC_BITS
from wavekv.model_adapters.layer import OffloadedLayer
from wavekv.model_adapters.prefill_plan import plan_prefill
from wavekv.offload import Logits
from wavekv.offload.attention import attend_step
from wavekv.offload.counters import Counters
from wavekv.offload.streaming import StreamBuffers

WARM_UP_CHUNKS = 2


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this part."""
    parser.add_argument("--host-dtype", choices=("model", *CODEC_BITS), default="model")
    parser.add_argument("--device-budget", type=share_or_size, default=0.9, help="share or size")
    parser.add_argument("--budget", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--skip-full", action="store_true", help="without the yardstick")


def prefill_rows(args: Namespace, model: LlamaForCausalLM, tokens: int) -> Iterator[Result]:
    """Our prefill, our steps with their checks, and the yardstick of the prefill."""
    settings = {
        name: getattr(args, name) for name in ("host_dtype", "budget", "compile", "device_budget")
    }
    wrapped = OffloadedKV(model, OffloadConfig(**settings))
    chunk = plan_prefill(model, wrapped.new_cache(), 1, tokens).chunk
    generator = torch.Generator(model.device).manual_seed(args.seed)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, tokens), generator=generator, device=model.device)
    wrapped.prefill(ids[:, : min(tokens, WARM_UP_CHUNKS * chunk)], wrapped.new_cache())
    release_memory()
    needles = _needles(model, tokens, args.seed)
    cache = wrapped.new_cache()
    _plant(cache, needles)
    start_peak(model)
    began = time.perf_counter()
    logits = wrapped.prefill(ids, cache, progress=True)
    if logits.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    stats = cache.stats()
    peak = peak_bytes(model, 0)
    yield _prefill_result(
        "prefill", model, tokens, seconds, peak, chunk, int(stats["bytes_host"]), stats
    )
    release_memory()
    start_peak(model)
    yield _steps(args, model, wrapped, cache, logits, tokens)
    yield _checks(wrapped, cache, needles, tokens)
    del cache
    wrapped.unwrap()
    release_memory()
    if not args.skip_full:
        yield _full(model, ids, chunk)


def _prefill_result(
    name: str,
    model: LlamaForCausalLM,
    tokens: int,
    seconds: float,
    peak: int,
    chunk: int,
    host_bytes: int = 0,
    extra: dict[str, Any] | None = None,
) -> Result:
    rates = {
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "tflop_per_s": flops(model, tokens, 1) / seconds / 1e12,
        "chunk": chunk,
        "weights": sum(weight.nbytes for weight in model.parameters()),
    }
    extra = rates | {"stats": extra or {}}
    return Result(name, tokens, 1, device_bytes=peak, host_bytes=host_bytes, extra=extra)


def _full(model: LlamaForCausalLM, ids: Tensor, chunk: int) -> Result:
    """The yardstick: the same chunks and operators, keys and values in device memory."""
    config, tokens = model.config, ids.shape[1]
    wide = config.hidden_size + config.intermediate_size + 5 * config.num_attention_heads * 128
    try:
        system = BufferedPrefill(model, tokens, 1, 4 * chunk * model.dtype.itemsize * wide)
    except MemoryError as error:
        return Result("full prefill", tokens, 1, notes=str(error))
    system.run(ids[:, : min(tokens, WARM_UP_CHUNKS * chunk)], chunk)
    start_peak(model)
    began = time.perf_counter()
    system.run(ids, chunk)
    if ids.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    missing = config.num_hidden_layers - system.kv_buffers
    peak = peak_bytes(model, 0) + missing * layer_kv_bytes(model, tokens)
    return _prefill_result("full prefill", model, tokens, seconds, peak, chunk)


def _steps(
    args: Namespace,
    model: LlamaForCausalLM,
    wrapped: OffloadedKV,
    cache: OffloadedCache,
    logits: Tensor,
    tokens: int,
) -> Result:
    """Time decode steps, through the wrapper."""
    token = logits.argmax(-1, keepdim=True)

    @torch.no_grad()
    def step() -> None:
        out = wrapped(input_ids=token, past_key_values=cache, logits_to_keep=1)
        token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))

    times = time_steps(step, warmup=8, repeats=args.steps, device=model.device)
    captured = cache.steps is not None and cache.runtime.engine is not None
    say(f"{args.steps} steps, {'captured' if captured else 'eager'}")
    stats = cache.stats()
    return Result.of_times(
        "decode",
        tokens,
        1,
        times,
        device_bytes=peak_bytes(model, 0),
        host_bytes=int(stats["bytes_host"]),
        bytes_read=weight_bytes(model),
        extra={"captured": captured, "budget": args.budget, "stats": stats},
    )


@torch.no_grad()
def _checks(wrapped: OffloadedKV, cache: OffloadedCache, needles: Needles, tokens: int) -> Result:
    """Whether needles are found, and outputs of one more step against exact ones, in all layers."""
    cache.runtime.reclaim()
    config, buffers = cache.config.override(mode="retrieval"), StreamBuffers()
    exact_config = config.override(mode="exact")
    token = torch.zeros(1, 1, dtype=torch.int64, device=wrapped.model.device)
    wrapped(input_ids=token, past_key_values=cache, logits_to_keep=1)
    found, errors = [], []
    for number, layer in enumerate(cache.offloaded_layers):
        context = layer.context
        query = context.counters.last_query
        logits = Logits(query.shape[-1] ** -0.5)
        zones = context.steady, context.paged, logits
        outs = [
            attend_step(query, *zones, each, Counters(), buffers)[0]
            for each in (config, exact_config)
        ]
        errors.append(relative_error(*outs).flatten())
        group = query.shape[1] // context.shape[1]
        for depth, position in enumerate(needles.positions):
            counters = Counters()
            length = _sharp(needles, context.shape[2])
            asked = needles.queries(depth, group, length)[number].to(query)
            attend_step(asked, *zones, config, counters, buffers)
            chosen = counters.last_choice.chosen[0].cpu()
            wanted = page_of(context.paged.token_ids.view, position)
            found.append((chosen == wanted[:, None]).any(-1))
    extra = {"budget": config.budget} | figures(found, torch.cat(errors).float())
    return Result("checks", tokens, 1, extra=extra)


def _needles(model: LlamaForCausalLM, tokens: int, seed: int) -> Needles:
    """As long as the keys of a model with random weights are."""
    config = model.config
    deviation = INIT_STD * config.hidden_size**0.5
    return draw_needles(
        OffloadConfig().num_sink_tokens,
        tokens - 2 * OffloadConfig().append_segment - OffloadConfig().window,
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        length=deviation * config.head_dim**0.5,
        seed=seed,
    )


def _sharp(needles: Needles, dim: int) -> float:
    """The length of a query whose logit with a needle is 27, as in the filled contexts."""
    return 27.0 * dim**0.5 / float(needles.keys[0, 0, 0].norm())


def _plant(cache: OffloadedCache, needles: Needles) -> None:
    """Replace the keys of the needles' tokens as they reach the cache."""
    for number, layer in enumerate(cache.offloaded_layers):
        layer.update = partial(_planted, layer, partial(needles.plant, number))


def _planted(
    layer: OffloadedLayer, plant: Any, key_states: Tensor, value_states: Tensor, *args, **kwargs
) -> tuple[Tensor, Tensor]:
    plant(layer.get_seq_length(), key_states)
    return OffloadedLayer.update(layer, key_states, value_states, *args, **kwargs)
