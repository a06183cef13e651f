"""Seconds and memory of a prefill of long contexts, against the same arithmetic without offload.

    python bench/prefill.py --contexts 128K,512K,1M --shape qwen-7b
    python bench/prefill.py --device cpu --shape tiny --contexts 4K --chunk 512 --json /tmp/p.json

Random weights and random tokens. "full" keeps all keys and values in device memory and runs the
same chunks through the same attention operators, without pages, index or host.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from comparison import add_comparison_flags, attempted, context_name, parse_flags, share_or_size
from decode_baselines import peak_bytes, start_peak
from decode_model import decoder_config, layer_kv_bytes, random_decoder, release_memory
from decode_result import Result
from machine import machine_record
from prefill_full import BufferedPrefill
from torch import Tensor
from transformers import LlamaForCausalLM

from wavekv import OffloadConfig, OffloadedKV
from wavekv.kvstore import CODEC_BITS
from wavekv.model_adapters.prefill_plan import plan_prefill

WARM_UP_CHUNKS = 2
"""Kernels compile and cuDNN makes plans; the host memory of the run is not made ahead."""


def wavekv_prefill(args: argparse.Namespace, model: LlamaForCausalLM, tokens: int) -> Result:
    """Our prefill, until the last page is in host memory."""
    wrapped = OffloadedKV(model, offload_config(args))
    statistics: dict[str, Any] = {}

    def run(ids: Tensor) -> None:
        cache = wrapped.new_cache()
        wrapped.prefill(ids, cache, progress=args.progress)
        statistics.update(cache.stats())

    times, peak = timed(args, model, tokens, run)
    wrapped.unwrap()
    moved = {
        name: statistics[name] for name in ("bytes_device", "bytes_to_host", "bytes_to_device")
    }
    host = int(statistics["bytes_host"])
    return of_times("wavekv", args, model, tokens, times, peak, host_bytes=host, extra=moved)


def full_prefill(args: argparse.Namespace, model: LlamaForCausalLM, tokens: int) -> Result:
    """The yardstick."""
    config = model.config
    wide = config.hidden_size + config.intermediate_size + 5 * config.num_attention_heads * 128
    working = 4 * args.chunk * args.batch * model.dtype.itemsize * wide
    try:
        system = BufferedPrefill(model, tokens, args.batch, working)
    except MemoryError as error:
        return Result("full", tokens, args.batch, notes=str(error))
    times, peak = timed(args, model, tokens, lambda ids: system.run(ids, args.chunk))
    layers = config.num_hidden_layers
    # had the keys and values of all layers fitted
    peak += (layers - system.kv_buffers) * layer_kv_bytes(model, tokens, args.batch)
    return of_times("full", args, model, tokens, times, peak, kv_buffers=system.kv_buffers)


SYSTEMS: dict[str, Callable[[argparse.Namespace, LlamaForCausalLM, int], Result]] = {
    "full": full_prefill,
    "wavekv": wavekv_prefill,
}


def offload_config(args: argparse.Namespace) -> OffloadConfig:
    """The settings of wavekv."""
    return OffloadConfig(
        prefill_chunk=args.chunk,
        cpu_budget=args.cpu_budget,
        device_budget=args.device_budget,
        host_dtype=args.host_dtype,
    )


def timed(
    args: argparse.Namespace, model: LlamaForCausalLM, tokens: int, run: Callable[[Tensor], object]
) -> tuple[list[float], int]:
    """(milliseconds of each run, peak of device memory), after a short run that is not counted."""
    generator = torch.Generator(model.device).manual_seed(args.seed)
    size = args.batch, tokens
    ids = torch.randint(model.config.vocab_size, size, generator=generator, device=model.device)
    run(ids[:, : min(tokens, WARM_UP_CHUNKS * args.chunk)])
    release_memory()
    start_peak(model)
    times = []
    for _ in range(args.repeats):
        began = time.perf_counter()
        run(ids)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return times, peak_bytes(model, 0)


def of_times(
    name: str,
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokens: int,
    times: list[float],
    peak: int,
    **fields: Any,
) -> Result:
    """A result with its rates."""
    seconds = median(times) / 1e3
    extra = fields.pop("extra", {}) | {
        "tokens_per_s": args.batch * tokens / seconds,
        "tflop_per_s": flops(model, tokens, args.batch) / seconds / 1e12,
    }
    return Result.of_times(
        name, tokens, args.batch, times, device_bytes=peak, extra=extra, **fields
    )


def flops(model: LlamaForCausalLM, tokens: int, batch: int) -> float:
    """Floating-point operations of the linear layers and of causal attention."""
    config = model.config
    linear = sum(p.numel() for p in model.base_model.parameters())
    linear -= model.get_input_embeddings().weight.numel()
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 2.0 * batch * tokens * (linear + attention * tokens)


def table_line(result: Result) -> str:
    """A row of the table."""
    head = f"{result.name:<8}{context_name(result.tokens):>8}{result.batch:>6}"
    if result.ms_median is None:
        return f"{head}  {result.notes}"
    extra = result.extra
    return (
        f"{head}{result.ms_median / 1e3:>10.2f}{extra['tokens_per_s']:>11.0f}"
        f"{extra['tflop_per_s']:>9.0f}{result.device_bytes / 2**30:>12.2f}"
        f"{result.host_bytes / 2**30:>10.2f}"
    )


HEADER = (
    f"{'system':<8}{'context':>8}{'batch':>6}{'seconds':>10}{'tokens/s':>11}{'TFLOP/s':>9}"
    f"{'device GiB':>12}{'host GiB':>10}"
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_comparison_flags(parser, SYSTEMS, "128K", Path("bench/results/prefill.json"))
    parser.add_argument("--chunk", type=int, help="default: what wavekv would choose")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cpu-budget", type=share_or_size, default=0.8, help="see OffloadConfig")
    parser.add_argument(
        "--device-budget", type=share_or_size, default=0.9, help="see OffloadConfig"
    )
    parser.add_argument("--host-dtype", choices=("model", *CODEC_BITS), default="model")
    parser.add_argument("--progress", action="store_true")
    return parse_flags(parser, SYSTEMS)


def main() -> None:
    args = parse()
    on_cuda = torch.device(args.device).type == "cuda"
    began = time.time()
    dtype = torch.bfloat16 if on_cuda else torch.float32
    config = decoder_config(args.shape, args.layers)
    model = random_decoder(config, args.device, dtype, args.seed)
    if args.chunk is None:
        wrapped = OffloadedKV(model, offload_config(args))
        plan = plan_prefill(model, wrapped.new_cache(), args.batch, max(args.contexts))
        args.chunk = plan.chunk
        wrapped.unwrap()
    record: dict[str, Any] = {
        "machine": machine_record(),
        "shape": args.shape,
        "layers": config.num_hidden_layers,
        "dtype": str(dtype).removeprefix("torch."),
        "device": args.device,
        "batch": args.batch,
        "chunk": args.chunk,
        "device_budget": args.device_budget,
        "host_dtype": args.host_dtype,
        "rows": [],
    }
    print(f"chunks of {args.chunk} tokens\n{HEADER}", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for tokens in args.contexts:
        for name in args.which:
            run = partial(SYSTEMS[name], args, model, tokens)
            result = attempted(run, name, tokens, args.batch)
            print(table_line(result), flush=True)
            row = asdict(result)
            record["rows"].append(row | row.pop("extra"))
            record["seconds"] = round(time.time() - began)
            args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
