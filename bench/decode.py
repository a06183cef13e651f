"""Milliseconds a token of decoding with long contexts, for each system, against the byte floor.

    python bench/decode.py --contexts 32K,128K,512K --plot docs/assets/decode.svg
    python bench/decode.py --contexts 128K --sweep-reuse 0.45 0.66 0.9 --sweep-prefetch none early
    python bench/decode.py --device cpu --shape tiny --contexts 1K,2K --json /tmp/decode.json

A context is filled without running a prompt. The floor of a step is the bytes that it must read
from device memory over the bandwidth of a large copy inside the device, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import add_comparison_flags, attempted, context_name, parse_flags
from decode_baselines import dynamic_cache, full_attention, offloaded_cache
from decode_model import (
    copy_bandwidth,
    decoder_config,
    random_decoder,
    release_memory,
    step_bytes,
)
from decode_ours import add_flags, exact, retrieval, sweep
from decode_result import Result
from machine import machine_record
from transformers import LlamaForCausalLM

from wavekv.model_adapters.fusion import fused_parts

System = Callable[[argparse.Namespace, LlamaForCausalLM, int, int], Result]

SYSTEMS: dict[str, System] = {
    "full": full_attention,
    "dynamic": dynamic_cache,
    "offloaded": offloaded_cache,
    "retrieval": retrieval,
    "exact": exact,
}
LABELS = {
    "full": "full attention, all in device memory, one graph",
    "dynamic": "transformers DynamicCache, eager",
    "offloaded": "transformers offloaded cache",
    "retrieval": "wavekv, one graph",
    "exact": "wavekv, all pages streamed",
}
KERNELS_SHOWN = 25


def results(args: argparse.Namespace, model: LlamaForCausalLM, tokens: int) -> Iterator[Result]:
    """All that is wanted at one context."""
    if args.is_sweep:
        yield from sweep(args, model, tokens, args.batch)
        release_memory()  # of the context, which the sweep held to its end
    else:
        for name in args.which:
            run = partial(SYSTEMS[name], args, model, tokens, args.batch)
            yield attempted(run, name, tokens, args.batch)


def as_row(result: Result, bandwidth: float) -> dict[str, Any]:
    """JSON-ready figures of a result, with its floor."""
    floor = 1e3 * result.bytes_read / bandwidth if result.bytes_read else None
    row = asdict(result)
    extra = row.pop("extra")
    return row | {"floor_ms": floor, "times_floor": result.times_floor(bandwidth)} | extra


HEADER = (
    f"{'system':<12}{'context':>8}{'batch':>6}{'ms/token':>10}{'p10':>9}{'p99':>9}"
    f"{'x floor':>9}{'device GiB':>12}{'host GiB':>10}  notes"
)


def table_line(row: dict[str, Any]) -> str:
    """A row of the table; ms a token is that of a step, which makes one token a sequence."""
    head = f"{row['name']:<12}{context_name(row['tokens']):>8}{row['batch']:>6}"
    if row["ms_median"] is None:
        return f"{head}{'–':>10}{'–':>9}{'–':>9}{'–':>9}{'–':>12}{'–':>10}  {row['notes']}"
    times = f"{row['ms_median']:>10.2f}{row['ms_p10']:>9.2f}{row['ms_p99']:>9.2f}"
    floor = "–" if row["times_floor"] is None else f"{row['times_floor']:.2f}"
    memory = f"{row['device_bytes'] / 2**30:>12.2f}{row['host_bytes'] / 2**30:>10.2f}"
    line = f"{head}{times}{floor:>9}{memory}  {row['notes']}"
    return "\n    ".join([line, *more_lines(row)])


def more_lines(row: dict[str, Any]) -> Iterator[str]:
    """What a row of wavekv says besides."""
    if "pcie_bytes" in row:
        moved = f"{row['pcie_bytes'] / 2**20:.1f} MiB a step from the host"
        yield f"{moved}; {row['host_layers']} layers have host pages of their own"
    if "hit_rate" in row:
        yield (
            f"reuse {row['reuse_seen']:.3f} ({row['reuse_asked']} asked), hits "
            f"{row['hit_rate']:.3f}, left out {row['left_out']:.3f}; budget {row['budget']}, "
            f"refine {row['refine']}, prefetch {row['prefetch']}, max_misses {row['max_misses']}, "
            f"{row['appends']} appends"
        )
    if "p99" in row:
        run = row["p99"]
        yield (
            f"{run['steps']} steps one by one: median {run['ms_median']:.2f}, p99 "
            f"{run['ms_p99']:.2f}, max {run['ms_max']:.2f} ms; {run['appends']} appends"
        )
    for kernel in row.get("kernels", [])[:KERNELS_SHOWN]:
        yield f"{kernel['us']:>9.2f} us {kernel['calls']:>7.1f} x  {kernel['name'][:70]}"


def plot(record: dict[str, Any], path: Path) -> None:
    """Milliseconds a token over context length, a line for each system and one for the floor."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "wavekv", "svg.fonttype": "none"})
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axis = plt.subplots(figsize=(7, 4.6))
    measured = [row for row in record["rows"] if row["ms_median"] is not None]
    for name in dict.fromkeys(row["name"] for row in measured):
        rows = sorted((r for r in measured if r["name"] == name), key=lambda row: row["tokens"])
        tokens, middle = ([row[key] for row in rows] for key in ("tokens", "ms_median"))
        axis.plot(tokens, middle, "o-", ms=4, label=LABELS.get(name, name))
    floors = sorted(record["full_floor_ms"].items(), key=lambda item: int(item[0]))
    tokens = [int(tokens) for tokens, _ in floors]
    axis.plot(tokens, [ms for _, ms in floors], "k:", label="bytes of full attention, read once")
    axis.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="ms a token")
    axis.set_xticks(tokens)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: context_name(round(x))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(frameon=False, fontsize="small")
    place = record["machine"]["gpu" if record["device"].startswith("cuda") else "cpu"]
    axis.set_title(f"{record['shape']}, batch {record['batch']}, {place}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_comparison_flags(parser, SYSTEMS, "32K,128K", Path("bench/results/decode.json"))
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=50, help="fewer where a step is slow")
    parser.add_argument(
        "--compile", action="store_true", help="norms, rotary and MLP compiled, in all systems"
    )
    parser.add_argument("--plot", type=Path)
    add_flags(parser)
    args = parse_flags(parser, SYSTEMS)
    args.is_sweep = bool(args.sweep_reuse or args.sweep_prefetch)
    if args.profile and (args.is_sweep or len(args.contexts) > 1):
        parser.error("--profile wants one context and no sweep")
    if args.plot and args.is_sweep:
        parser.error("--plot draws systems over contexts, not a sweep")
    return args


def main() -> None:
    args = parse()
    on_cuda = torch.device(args.device).type == "cuda"
    began = time.time()
    bandwidth = copy_bandwidth(args.device, 1 << 31 if on_cuda else 1 << 28)
    release_memory()
    dtype = torch.bfloat16 if on_cuda else torch.float32
    config = decoder_config(args.shape, args.layers)
    model = random_decoder(config, args.device, dtype, args.seed)
    record: dict[str, Any] = {
        "machine": machine_record(),
        "shape": args.shape,
        "layers": config.num_hidden_layers,
        "dtype": str(dtype).removeprefix("torch."),
        "device": args.device,
        "compile": args.compile,
        "batch": args.batch,
        "copy_gb_per_s": bandwidth / 1e9,
        "full_floor_ms": {
            str(tokens): 1e3 * step_bytes(model, tokens, args.batch) / bandwidth
            for tokens in args.contexts
        },
        "rows": [],
    }
    print(f"device copy, read + write: {bandwidth / 1e9:.0f} GB/s\n{HEADER}", flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    with fused_parts(model) if args.compile else nullcontext():
        for tokens in args.contexts:
            for result in results(args, model, tokens):
                row = as_row(result, bandwidth)
                print(table_line(row), flush=True)
                record["rows"].append(row)
                record["seconds"] = round(time.time() - began)
                args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        plot(record, args.plot)


if __name__ == "__main__":
    main()
