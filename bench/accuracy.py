"""Answers and output error of the bundled model at 32K tokens, against budget and tail estimate.

    python bench/accuracy.py --out bench/results/accuracy.json --table docs/accuracy.md

For every budget and tail estimate: how many of the questions about planted facts are answered
right, and the relative L2 error of the attention output of every layer against exact attention, for
the same queries (those of the exact run). About 15 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
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

BUDGETS = (0.005, 0.01, 0.02, 0.04)
TAILS = ("none", "first", "second")


@dataclass
class Tally:
    """What one setting did."""

    right: int = 0
    asked: int = 0
    retrieved: list[float] = field(default_factory=list)
    tail_mass: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    """Relative L2 of the output of one query head, for layers, steps and questions."""


def settings() -> dict[str, dict]:
    """Decode settings by name; "exact" is full attention."""
    table: dict[str, dict] = {"exact": {"mode": "exact"}}
    for budget in BUDGETS:
        for tail in TAILS:
            table[f"{budget:.1%} {tail}"] = {"budget": budget, "tail_estimate": tail}
    for tail in ("first", "second"):
        table[f"2.0% {tail}, means only"] = {"budget": 0.02, "tail_estimate": tail, "refine": 1}
    for refine in (8, 32):
        table[f"2.0% second, refine {refine}"] = {"budget": 0.02, "refine": refine}
    return table


@torch.inference_mode()
def ask(model: OffloadedKV, cache: OffloadedCache, token: Tensor) -> list[int]:
    """Five greedy tokens after `token` [1, 1]; the cache is consumed."""
    tokens = []
    for _ in range(VALUE_DIGITS):
        logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(token))
    return tokens


@torch.inference_mode()
def measure_errors(
    model: OffloadedKV, cache: OffloadedCache, token: Tensor, tallies: dict[str, Tally]
) -> None:
    """Step through an answer exactly; compare every setting on the queries of each step."""
    for _ in range(VALUE_DIGITS):
        logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        for layer in cache.offloaded_layers:
            context = layer.context
            query = context.counters.last_query
            zones = context.steady, context.paged, Logits(query.shape[-1] ** -0.5)
            outputs = {}
            for name, changes in settings().items():
                config = cache.config.override(**{"mode": "retrieval", **changes})
                step = attend_step(query, *zones, config, Counters(), cache.runtime.buffers)
                outputs[name] = step[0]
            for name, out in outputs.items():
                tallies[name].errors += relative_error(out, outputs["exact"]).flatten().tolist()


def run_context(
    model: OffloadedKV,
    context: PlantedContext,
    options: argparse.Namespace,
    tallies: dict[str, Tally],
) -> None:
    """Prefill one context, then ask its questions in every setting."""
    tokenizer = load_demo_tokenizer()
    cache = model.new_cache()
    ids = torch.tensor([context.token_ids], device=options.device)
    model.prefill(ids, cache, progress=True)
    for number, fact in enumerate(tqdm(context.facts[: options.per_context], desc="questions")):
        question = torch.tensor([tokenizer.encode(fact.question).ids], device=options.device)
        asked = cache.fork()
        with torch.inference_mode():
            model(input_ids=question[:, :-1], past_key_values=asked, logits_to_keep=1)
        for name, changes in settings().items():
            fork = asked.fork(**changes)
            tally = tallies[name]
            tally.asked += 1
            tally.right += tokenizer.decode(ask(model, fork, question[:, -1:])) == fact.value
            stats = fork.stats()
            tally.retrieved.append(stats["retrieved_fraction"])
            tally.tail_mass.append(stats["tail_mass"])
        if number % options.error_every == 0:
            measure_errors(model, asked.fork(mode="exact"), question[:, -1:], tallies)


def summarise(tallies: dict[str, Tally]) -> dict[str, dict[str, float]]:
    rows = {}
    for name, tally in tallies.items():
        errors = torch.tensor(tally.errors)
        rows[name] = {
            "questions": tally.asked,
            "right": tally.right,
            "accuracy": tally.right / tally.asked,
            "retrieved_fraction": sum(tally.retrieved) / tally.asked,
            "tail_mass": sum(tally.tail_mass) / tally.asked,
            "output_error_mean": errors.mean().item(),
            "output_error_p95": errors.quantile(0.95).item(),
            "error_samples": len(errors),
        }
    return rows


def as_markdown(rows: dict[str, dict[str, float]], record: dict) -> str:
    lines = [
        f"# Accuracy of the bundled model at {record['context_tokens']} tokens",
        "",
        f"{rows['exact']['questions']} questions about facts planted in real text of "
        f"{record['context_tokens']} tokens. *Output error* is the relative L2 distance of the "
        "attention output of a head to exact attention, for the same query: mean and 95th "
        "percentile over all layers, heads and answer steps. *None*, *first* and *second* are the "
        "`tail_estimate`. Pages are ranked by the codes of their keys, the best "
        f"{OffloadConfig().refine} budgets of them by statistics; *refine* is another number of "
        "budgets, *means only* none (`refine=1`).",
        "",
        "| setting | answers right | accuracy | tokens retrieved | output error | p95 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['right']} of {row['questions']} | {row['accuracy']:.1%} | "
            f"{row['retrieved_fraction']:.2%} | {row['output_error_mean']:.3f} | "
            f"{row['output_error_p95']:.3f} |".replace("| 0.00% | 0.000", "| all | 0.000")
        )
    command = record["machine"]["command"]
    lines += [
        "",
        f"Made by `{command}` ({record['machine']['cpu']}, commit "
        f"{record['machine']['commit']}); raw numbers in `bench/results/accuracy.json`.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/accuracy.json"))
    parser.add_argument("--table", type=Path, default=Path("docs/accuracy.md"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--per-context", type=int, default=52)
    parser.add_argument(
        "--error-every", type=int, default=4, help="measure errors for one in so many"
    )
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    tokenizer = load_demo_tokenizer()
    tallies: dict[str, Tally] = defaultdict(Tally)
    began = time.time()
    with OffloadedKV(load_demo_model().to(options.device), OffloadConfig()) as model:
        for number in range(options.contexts):
            context = plant(
                options.tokens,
                lambda strings: [e.ids for e in tokenizer.encode_batch(strings)],
                seed=options.seed + number,
            )
            run_context(model, context, options, tallies)
            rows = summarise(tallies)
            print(
                json.dumps(
                    {
                        name: (row["right"], round(row["output_error_mean"], 4))
                        for name, row in rows.items()
                    }
                ),
                flush=True,
            )
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
