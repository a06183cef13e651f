"""Decode steps with the whole context attended to: in device memory, and as transformers does it.

A context is random keys and values; no prompt is run. All functions here take the arguments of the
benchmark, a model, a context length and a batch size, and return a `Result`.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from decode_full import RESERVE, FullAttentionInHBM, random_kv
from decode_model import CapturedForward, free_bytes, layer_kv_bytes, step_bytes, time_steps
from decode_result import Result
from transformers import DynamicCache, LlamaForCausalLM

from wavekv.kvstore.budget import available_memory

EAGER_REPEATS = 20
OFFLOADED_REPEATS = 3  # it takes seconds a step
OFFLOADED_WARMUP = 2


def full_attention(args: Namespace, model: LlamaForCausalLM, tokens: int, batch: int) -> Result:
    """Full attention in device memory, the whole step in one CUDA graph: the yardstick."""
    start_peak(model)
    try:
        system = FullAttentionInHBM(model, tokens, batch, seed=args.seed)
    except MemoryError as error:
        return Result("full", tokens, batch, notes=str(error))
    captured = CapturedForward(system.step)
    times = time_steps(
        captured.replay, warmup=args.warmup, repeats=args.repeats, device=model.device
    )
    layers = model.config.num_hidden_layers
    layer_bytes = layer_kv_bytes(model, tokens, batch)
    resident = peak_bytes(model, system.kv_buffers * layer_bytes)
    of_layers = [f"{backend.name} {ms:.3f}" for backend, ms in system.layer_ms.items()]
    return Result.of_times(
        "full",
        tokens,
        batch,
        times,
        device_bytes=resident + (layers - system.kv_buffers) * layer_bytes,
        bytes_read=step_bytes(model, tokens, batch),
        kv_buffers=system.kv_buffers,
        notes=f"{system.backend.name}; attention of one layer, ms: {', '.join(of_layers)}",
    )


def dynamic_cache(args: Namespace, model: LlamaForCausalLM, tokens: int, batch: int) -> Result:
    """transformers' DynamicCache in device memory, eager."""
    layer_bytes = layer_kv_bytes(model, tokens, batch)
    # a step copies a layer's keys and values to append to them
    needed = (model.config.num_hidden_layers + 2) * layer_bytes + RESERVE
    if needed > free_bytes(model.device):
        return Result(
            "dynamic", tokens, batch, notes=f"needs {needed / 2**30:.0f} GiB beside the weights"
        )
    repeats = min(args.repeats, EAGER_REPEATS)
    return grown_cache("dynamic", model, tokens, batch, args.warmup, repeats, args.seed)


def offloaded_cache(args: Namespace, model: LlamaForCausalLM, tokens: int, batch: int) -> Result:
    """transformers' offloaded cache: layers in pinned memory, the next one copied ahead."""
    if model.device.type != "cuda":
        return Result("offloaded", tokens, batch, notes="needs a CUDA device")
    layer_bytes = layer_kv_bytes(model, tokens, batch)
    # pinned memory is allocated in powers of two; a few layers are in flight
    needed = (model.config.num_hidden_layers + 4) * (1 << (layer_bytes - 1).bit_length())
    if needed > 0.9 * available_memory():
        return Result(
            "offloaded", tokens, batch, notes=f"needs {needed / 2**30:.0f} GiB of pinned memory"
        )
    repeats = min(args.repeats, OFFLOADED_REPEATS)
    return grown_cache(
        "offloaded", model, tokens, batch, OFFLOADED_WARMUP, repeats, args.seed, offloading=True
    )


def grown_cache(
    name: str,
    model: LlamaForCausalLM,
    tokens: int,
    batch: int,
    warmup: int,
    repeats: int,
    seed: int,
    *,
    offloading: bool = False,
) -> Result:
    """Eager steps over a DynamicCache, which holds `tokens` tokens after the last of them."""
    start_peak(model)
    model.set_attn_implementation("sdpa")
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = DynamicCache(config=model.config, offloading=offloading)
    before = tokens - warmup - repeats
    for layer in range(model.config.num_hidden_layers):
        # through the cache's own update, so that each layer ends where a prefill would leave it
        cache.update(*random_kv(model, before, batch, generator), layer)
    token_ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def step() -> list[int]:
        logits = model(input_ids=token_ids, past_key_values=cache, use_cache=True).logits
        token_ids.copy_(logits.argmax(-1))
        return token_ids[:, 0].tolist()  # as generation does, which looks for the end of the text

    times = time_steps(step, warmup=warmup, repeats=repeats, device=model.device)
    assert cache.get_seq_length() == tokens, cache.get_seq_length()
    kv_bytes = model.config.num_hidden_layers * layer_kv_bytes(model, tokens, batch)
    return Result.of_times(
        name,
        tokens,
        batch,
        times,
        device_bytes=peak_bytes(model, kv_bytes),
        host_bytes=kv_bytes if offloading else 0,
        bytes_read=step_bytes(model, tokens, batch),
        notes=f"eager; filled without a prompt, {before} tokens before the steps",
    )


def start_peak(model: LlamaForCausalLM) -> None:
    """Count the peak of device memory from here."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(model: LlamaForCausalLM, kv_bytes: int) -> int:
    """Peak of device memory; on a CPU the weights and the keys and values there."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return kv_bytes + sum(weight.nbytes for weight in model.parameters())
