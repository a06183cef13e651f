"""Answers and output error of the bundled model at 32K tokens, against how pages are stored.

    OMP_WAIT_POLICY=passive python bench/host_dtypes.py

For every `host_dtype`, with exact steps and with a budget of 2 %: how many of the questions about
planted facts are answered right, how many answers differ from those with pages in the model's
dtype, and the relative L2 difference that the form of the pages alone makes to the attention output
of a head, for the same queries and tokens. About 35 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accuracy import ask
from device_copy import cache_on_cpu
from machine import machine_record
from torch import Tensor
from tqdm import tqdm

from wavekv import OffloadConfig, OffloadedCache, OffloadedKV
from wavekv.cli.answering import VALUE_DIGITS
from wavekv.demo.context import PlantedContext, plant
from wavekv.index import relative_error
from wavekv.model_adapters.bundled import load_demo_model, load_demo_tokenizer
from wavekv.offload import Logits
from wavekv.offload.attention import attend_step
from wavekv.offload.counters import Counters
from wavekv.offload.streaming import StreamBuffers

ROOT = Path(__file__).parent.parent
HOST_DTYPES = ("model", "int8", "int4", "int4-int2")
MODES = ("exact", "retrieval")


@dataclass
class Tally:
    """What pages of one form did in one mode."""

    right: int = 0
    changed: int = 0
    asked: int = 0
    page_bytes: int = 0
    bytes_read: list[float] = field(default_factory=list)
    """Of a step, from pages."""
    errors: list[float] = field(default_factory=list)
    """Of one query head to exact attention with pages in the model's dtype."""

    def as_row(self, host_dtype: str, mode: str) -> dict[str, Any]:
        errors = torch.tensor(self.errors)
        return {
            "host_dtype": host_dtype,
            "mode": mode,
            "right": self.right,
            "changed": self.changed,
            "asked": self.asked,
            "page_bytes": self.page_bytes,
            "bytes_read_per_step": sum(self.bytes_read) / len(self.bytes_read),
            "output_error_mean": errors.mean().item(),
            "output_error_p95": errors.quantile(0.95).item(),
            "error_samples": len(errors),
        }


Tallies = dict[tuple[str, str], Tally]


def answers(
    model: OffloadedKV, cache: OffloadedCache, question: Tensor, tally: dict[str, Tally]
) -> dict[str, list[int]]:
    """Five greedy tokens after `question` [1, n], by mode."""
    asked = cache.fork()
    with torch.inference_mode():
        model(input_ids=question[:, :-1], past_key_values=asked, logits_to_keep=1)
    found = {}
    for mode in MODES:
        fork = asked.fork(mode=mode)
        before = fork.stats()["bytes_to_device"]
        found[mode] = ask(model, fork, question[:, -1:])
        tally[mode].bytes_read.append((fork.stats()["bytes_to_device"] - before) / VALUE_DIGITS)
        layout = fork.offloaded_layers[0].context.paged.arena.layout
        tally[mode].page_bytes = layout.page_bytes
    return found


@torch.inference_mode()
def measure_errors(
    model: OffloadedKV,
    cache: OffloadedCache,
    question: Tensor,
    copies: dict[str, OffloadedCache],
    tallies: Tallies,
) -> None:
    """Step through an answer exactly, and attend with the queries of each step to the same pages in
    every form."""
    exact = cache.fork(mode="exact")
    model(input_ids=question[:, :-1], past_key_values=exact, logits_to_keep=1)
    token = question[:, -1:]
    for _ in range(VALUE_DIGITS):
        logits = model(input_ids=token, past_key_values=exact, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        for number, layer in enumerate(exact.offloaded_layers):
            context = layer.context
            query = context.counters.last_query
            scale = Logits(query.shape[-1] ** -0.5)
            config = cache.config.override(mode="exact")
            zones = context.steady, context.paged
            truth = attend_step(query, *zones, scale, config, Counters(), StreamBuffers())[0]
            for host_dtype, copy in copies.items():
                paged = copy.offloaded_layers[number].context.paged
                for mode in MODES:
                    config = cache.config.override(mode=mode)
                    zones = context.steady, paged
                    out = attend_step(query, *zones, scale, config, Counters(), StreamBuffers())[0]
                    tallies[host_dtype, mode].errors += (
                        relative_error(out, truth).flatten().tolist()
                    )


def run_context(
    models: dict[str, OffloadedKV], context: PlantedContext, per_context: int, tallies: Tallies
) -> None:
    """Read one context with pages in every form, and ask its questions of each."""
    tokenizer = load_demo_tokenizer()
    ids = torch.tensor([context.token_ids])
    caches = {}
    for name, model in models.items():
        caches[name] = model.new_cache()
        model.prefill(ids, caches[name], progress=True)
    original = caches["model"]
    copies = {name: cache_on_cpu(original, model) for name, model in models.items()}
    for number, fact in enumerate(tqdm(context.facts[:per_context], desc="questions")):
        question = torch.tensor([tokenizer.encode(fact.question).ids])
        known: dict[str, list[int]] = {}
        for name, model in models.items():
            here = {mode: tallies[name, mode] for mode in MODES}
            found = answers(model, caches[name], question, here)
            known = known or found
            for mode, tokens in found.items():
                here[mode].asked += 1
                here[mode].right += tokenizer.decode(tokens) == fact.value
                here[mode].changed += tokens != known[mode]
        if number % 4 == 0:
            measure_errors(models["model"], original, question, copies, tallies)


def as_markdown(rows: list[dict[str, Any]], record: dict[str, Any]) -> str:
    dense = rows[0]["page_bytes"]
    lines = [
        "# Pages stored as small integers",
        "",
        f"{rows[0]['asked']} questions about facts planted in real text of "
        f"{record['context_tokens']} tokens, asked of the bundled model (float32, 64 dimensions a "
        "head), whose contexts were read and stored in each form. *Changed* are answers other than "
        'with `host_dtype="model"`. *Output error* is the relative L2 distance of the attention '
        "output of a head to exact attention to float32 pages, for the same queries and tokens: "
        "mean and 95th percentile over layers, heads and answer steps. *Read* is what a step reads "
        "of pages; over a bus it is less by what stays on the device.",
        "",
        "| `host_dtype` | steps | bytes of a page | of bfloat16 | read | answers right | changed | "
        "output error | p95 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = row["page_bytes"] / (dense / 2)
        of_bfloat16 = "-" if row["host_dtype"] == "model" else f"{share:.0%}"
        lines.append(
            f"| {row['host_dtype']} | {row['mode']} | {row['page_bytes']} | {of_bfloat16} | "
            f"{row['bytes_read_per_step'] / 2**20:.2f} MiB | {row['right']} of {row['asked']} | "
            f"{row['changed']} | {row['output_error_mean']:.4f} | {row['output_error_p95']:.4f} |"
        )
    machine = record["machine"]
    lines += [
        "",
        f"Made by `{machine['command']}` ({machine['cpu']}, commit {machine['commit']}); raw "
        "numbers in `bench/results/host_dtypes.json`. How pages are stored: "
        "[decision 0008](adr/0008-pages-as-integers.md).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/host_dtypes.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs/host_dtypes.md")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--per-context", type=int, default=52)
    parser.add_argument("--seed", type=int, default=100)
    options = parser.parse_args()
    tokenizer = load_demo_tokenizer()
    tallies: Tallies = defaultdict(Tally)
    began = time.time()
    models = {
        name: OffloadedKV(load_demo_model(), OffloadConfig(host_dtype=name, cpu_budget="2GiB"))
        for name in HOST_DTYPES
    }
    for number in range(options.contexts):
        context = plant(
            options.tokens,
            lambda strings: [e.ids for e in tokenizer.encode_batch(strings)],
            seed=options.seed + number,
        )
        run_context(models, context, options.per_context, tallies)
        rows = [
            tallies[name, mode].as_row(name, mode)
            for name in HOST_DTYPES
            for mode in MODES
            if tallies[name, mode].errors
        ]
        for row in rows:
            print(json.dumps(row), flush=True)
    record = {
        "machine": machine_record(),
        "context_tokens": options.tokens,
        "seconds": round(time.time() - began),
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    options.table.write_text(as_markdown(rows, record))


if __name__ == "__main__":
    main()
