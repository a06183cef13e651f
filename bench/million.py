"""A million tokens on one GPU: decoding, and reading a prompt of them.

    python bench/million.py decode                          8B shape, pages filled without a prompt
    python bench/million.py prefill                         1B shape, from the tokens to an answer
    python bench/million.py prefill --shape llama-8b --tokens 256K --host-dtype int8

Each part plants needles at 11 depths and looks whether steps find them, and compares outputs of
sampled layers with exact attention to all pages.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import decode_ours
import million_decode
import million_prefill
import torch
from comparison import context_length, context_name
from decode import HEADER, as_row, table_line
from decode_model import SHAPES, copy_bandwidth, decoder_config, random_decoder, release_memory
from decode_result import Result
from machine import machine_record

from wavekv.model_adapters.fusion import fused_parts

RESULTS = Path(__file__).parent / "results"


def parse() -> argparse.Namespace:
    on_cuda = torch.cuda.is_available()
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--tokens", default="1M")
    common.add_argument("--layers", type=int, help="default: those of the shape")
    common.add_argument("--device", default="cuda" if on_cuda else "cpu")
    common.add_argument("--compile", action="store_true", help="norms, rotary and MLP compiled")
    common.add_argument("--warmup", type=int, default=5)
    common.add_argument("--repeats", type=int, default=20)
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--json", type=Path)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    decode = parts.add_parser("decode", parents=[common], help="8B shape, filled pages")
    decode.add_argument("--shape", choices=SHAPES, default="llama-8b" if on_cuda else "tiny")
    decode_ours.add_flags(decode)
    decode.set_defaults(host_dtype="int8", host_layers=1 << 10, rows=million_decode.decode_rows)
    million_decode.add_flags(decode)
    prefill = parts.add_parser("prefill", parents=[common], help="a prompt, then steps")
    prefill.add_argument("--shape", choices=SHAPES, default="llama-1b" if on_cuda else "tiny")
    prefill.set_defaults(rows=million_prefill.prefill_rows)
    million_prefill.add_flags(prefill)
    args = parser.parse_args()
    args.json = args.json or RESULTS / f"million_{args.part}.json"
    return args


def lines(row: dict[str, Any]) -> Iterator[str]:
    """What a row says on the terminal."""
    if "needles" in row:
        yield (
            f"budget {row['budget']}: {row['needles_found']} of {row['needles']} needles found; "
            f"output error {row['output_error_mean']:.4f}, p95 {row['output_error_p95']:.4f} "
            f"({row['error_samples']} heads)"
        )
    elif "seconds" in row:
        yield (
            f"{row['name']:<12}{context_name(row['tokens']):>8}: {row['seconds']:.1f} s, "
            f"{row['tokens_per_s']:.0f} tokens/s, {row['tflop_per_s']:.0f} TFLOP/s; device "
            f"{row['device_bytes'] / 2**30:.1f} GiB (weights {row['weights'] / 2**30:.1f}), host "
            f"{row['host_bytes'] / 2**30:.1f} GiB"
        )
    else:
        yield table_line(row)


def main() -> None:
    args = parse()
    tokens = context_length(args.tokens)
    on_cuda = torch.device(args.device).type == "cuda"
    bandwidth = copy_bandwidth(args.device, 1 << 31 if on_cuda else 1 << 28)
    release_memory()
    dtype = torch.bfloat16 if on_cuda else torch.float32
    config = decoder_config(args.shape, args.layers)
    model = random_decoder(config, args.device, dtype, args.seed)
    record: dict[str, Any] = {
        "machine": machine_record(),
        "part": args.part,
        "shape": args.shape,
        "layers": config.num_hidden_layers,
        "tokens": tokens,
        "compile": args.compile,
        "copy_gb_per_s": bandwidth / 1e9,
        "rows": [],
    }
    print(f"{args.shape}, {context_name(tokens)} tokens; device copy {bandwidth / 1e9:.0f} GB/s")
    print(HEADER, flush=True)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    results: Iterator[Result] = args.rows(args, model, tokens)
    with fused_parts(model) if args.compile else nullcontext():
        for result in results:
            row = as_row(result, bandwidth)
            print("\n".join(lines(row)), flush=True)
            record["rows"].append(row)
            record["seconds"] = round(time.time() - began)
            args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
