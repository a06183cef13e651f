"""Whether decode steps of the captured CUDA graph are those of the CPU: tokens, logits, layers.

    OMP_WAIT_POLICY=passive python bench/device_tokens.py --json bench/results/device_tokens.json

The bundled model answers questions about planted facts on the device, in a graph after the eager
steps, and on the CPU from a copy of the same pages. Both take the CPU's greedy tokens, so that all
steps count after a disagreement too; `generate` on the device then makes the tokens once more by
itself. Pages that a conversation grows (none at the default lengths) each side clusters for itself.

Layers: an uncaptured engine runs the model; what each layer's attention is given there, the CPU's
is given too. Error: relative L2 of the output of all heads. In both dtypes.

Exits with 1 if a disagreement is no near-tie (the best two logits closer than 1e-3 of the spread
from least to largest, on both sides), if `generate` strays from steps that agree, or if a layer's
mean error exceeds 1e-2. Without CUDA the engine runs on the torch twins of its kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from device_copy import cache_on_cpu
from engine_steps import engine_of, engine_step, watched
from machine import machine_record
from torch import Tensor

from wavekv import OffloadConfig, OffloadedCache, OffloadedKV
from wavekv.cli.answering import VALUE_DIGITS
from wavekv.demo.context import PlantedContext, plant
from wavekv.model_adapters.bundled import load_demo_model, load_demo_tokenizer
from wavekv.model_adapters.graph import _EAGER_STEPS

NEAR_TIE = 1e-3
MOST_ERROR = 1e-2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]


def relative_l2(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def pages_lacking(got: Tensor, expected: Tensor) -> Tensor:
    """[2]: how many pages of `expected` [B, Hkv, M] (-1: none) `got` has not; of how many."""
    rows = zip(got.flatten(0, 1), expected.flatten(0, 1), strict=True)
    lacking = [int(((e >= 0) & ~torch.isin(e, g)).sum()) for g, e in rows]
    return torch.tensor([sum(lacking), int((expected >= 0).sum())])


def chosen_by_last_layer(cache: OffloadedCache) -> Tensor:
    """Pages [B, Hkv, M] of the last step, on the host; a replayed one leaves no others."""
    if cache.runtime.engine is not None:
        return cache.runtime.engine.scratch.chosen.cpu()
    return cache.offloaded_layers[-1].context.counters.last_choice.chosen.cpu()


def finish(cache: OffloadedCache, num_steps: int) -> int:
    """Steps that were replayed: on CUDA all but the first few. Ends the engine and its graph."""
    graph, refusal = (cache.steps._graph, cache.steps.refusal) if cache.steps else (None, None)
    captured = graph.engine.num_tokens - graph.engine.first_token if graph else 0
    if cache.offloaded_layers[0].device.type == "cuda" and captured != num_steps - _EAGER_STEPS:
        raise RuntimeError(f"{captured} of {num_steps} steps were captured; refusal: {refusal}")
    cache.runtime.reclaim()
    cache.steps = None
    return captured


def best_two_gap(logits: Tensor) -> float:
    """The gap between the best two logits, as a share of the spread of all."""
    best = logits.topk(2).values
    return float((best[0] - best[1]) / (logits.max() - logits.min()))


class Sides:
    """One context, prefilled on the device and copied to the CPU."""

    def __init__(self, dtype: torch.dtype, device: str, context: PlantedContext) -> None:
        config = OffloadConfig(budget=0.02)
        self.model = OffloadedKV(load_demo_model(dtype).to(device), config)
        self.cpu_model = OffloadedKV(load_demo_model(dtype), config)
        self.cache = self.model.new_cache()
        self.ids = torch.tensor([context.token_ids], device=device)
        self.model.prefill(self.ids, self.cache)
        self.cpu_cache = cache_on_cpu(self.cache, self.cpu_model)

    def compare_steps(self, question: Tensor, num_steps: int) -> Row:
        """Greedy steps after `question` [1, T] on both sides, with the CPU's tokens."""
        sides = (self.model, self.cache.fork()), (self.cpu_model, self.cpu_cache.fork())
        kept = self.cache.fork()
        for model, cache in (*sides, (self.model, kept)):
            ids = question[:, :-1].to(model.device)
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        token, tokens, errors, disagreements = question[:, -1:], [], [], []
        pages = torch.zeros(2, dtype=torch.int64)
        for step in range(num_steps):
            got, expected = (
                model(input_ids=token.to(model.device), past_key_values=cache).logits[0, -1].cpu()
                for model, cache in sides
            )
            errors.append(relative_l2(got, expected))
            pages += pages_lacking(*(chosen_by_last_layer(cache) for _, cache in sides))
            token = expected.argmax().view(1, 1)
            tokens.append(int(token))
            if int(got.argmax()) != tokens[-1]:
                gaps = [best_two_gap(got), best_two_gap(expected)]
                row = {"step": step, "tokens": [int(got.argmax()), tokens[-1]], "gaps": gaps}
                disagreements.append(row | {"is_near_tie": max(gaps) < NEAR_TIE})
        prompt = torch.cat([self.ids, question.to(self.ids.device)], 1)
        options = {"max_new_tokens": num_steps, "do_sample": False, "past_key_values": kept}
        generated = self.model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
        return {
            "tokens": tokens,
            "generated": generated,
            "captured": min(finish(cache, num_steps) for cache in (sides[0][1], kept)),
            "disagreements": disagreements,
            "logits_error_max": max(errors),
            "logits_error_mean": sum(errors) / len(errors),
            "pages_lacking": pages.tolist(),
        }

    def compare_layers(self, question: Tensor, num_steps: int, tally: list[list[Row]]) -> None:
        """Uncaptured steps of an engine: each layer's attention there against the CPU's."""
        fork, device = self.cache.fork(), self.ids.device
        # an engine wants a decode step behind it
        for ids in (question[:, :-1].to(device), question[:, -1:].to(device)):
            out = self.model(input_ids=ids, past_key_values=fork, logits_to_keep=1)
        on_cpu = cache_on_cpu(fork, self.cpu_model)
        copies = [layer.context for layer in on_cpu.offloaded_layers]
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        with engine_of(fork) as engine:

            def look(number: int, got: Tensor, expected: Tensor) -> None:
                chosen = copies[number].counters.last_choice.chosen
                pages = pages_lacking(engine.scratch.chosen.cpu(), chosen)
                tally[number].append({"error": relative_l2(got, expected), "pages": pages})

            with watched(engine, copies, look):
                for _ in range(num_steps):
                    token = engine_step(engine, self.model, fork, token)
            engine.check_integrity()
        assert all(copy.num_tokens == fork.get_seq_length() for copy in copies)


def summarise(rows: list[Row], layers: dict[str, list[Row]]) -> Row:
    lost = [each for row in rows for each in row["disagreements"]]
    near_ties = sum(each["is_near_tie"] for each in lost)
    strayed = [row["generated"] != row["tokens"] for row in rows]
    unexplained = sum(s and not r["disagreements"] for s, r in zip(strayed, rows, strict=True))
    worst = {name: max(row["error_mean"] for row in table) for name, table in layers.items()}
    count = sum(len(row["tokens"]) for row in rows)
    return {
        "is_good": near_ties == len(lost) and not unexplained and max(worst.values()) <= MOST_ERROR,
        "tokens": count,
        "tokens_equal": count - len(lost),
        "near_ties": near_ties,
        "questions": len(rows),
        "questions_equal": sum(not row["disagreements"] for row in rows),
        "generated_equal": len(rows) - sum(strayed),
        "answers_right": sum(row["is_right"] for row in rows),
        "steps_captured": sum(row["captured"] for row in rows),
        "logits_error_max": max(row["logits_error_max"] for row in rows),
        "layer_error_worst": worst,
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("bench/results/device_tokens.json"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--questions", type=int, default=26)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--layer-questions", type=int, default=4)
    parser.add_argument("--layer-steps", type=int, default=16, help="after each such question")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--threads", type=int, default=min(8, torch.get_num_threads()))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    tokenizer, began = load_demo_tokenizer(), time.perf_counter()
    encode = tokenizer.encode_batch
    context = plant(options.tokens, lambda s: [e.ids for e in encode(s)], seed=options.seed)
    facts = context.facts[: options.questions]
    asked = [torch.tensor([tokenizer.encode(fact.question).ids]) for fact in facts]
    rows: list[Row] = []
    layers: dict[str, list[Row]] = {}
    for name, dtype in DTYPES.items():
        sides = Sides(dtype, options.device, context)
        print(f"{time.perf_counter() - began:4.0f} s: prefilled and copied, {name}", flush=True)
        for fact, question in zip(facts, asked if dtype == torch.float32 else [], strict=False):
            row = sides.compare_steps(question, options.new_tokens)
            row["is_right"] = tokenizer.decode(row["tokens"][:VALUE_DIGITS]) == fact.value
            rows.append(row)
            shown = {k: v for k, v in row.items() if k not in ("tokens", "generated")}
            print(f"{len(rows):2}", json.dumps(shown), flush=True)
        tally: list[list[Row]] = [[] for _ in sides.cache.offloaded_layers]
        for question in asked[: options.layer_questions]:
            sides.compare_layers(question, options.layer_steps, tally)
        layers[name] = []
        print(f"{time.perf_counter() - began:4.0f} s: layers, {name}: mean and largest error")
        for number, steps in enumerate(tally):
            errors = torch.tensor([step["error"] for step in steps])
            row = {"error_mean": errors.mean().item(), "error_max": errors.max().item()}
            pages = sum(step["pages"] for step in steps).tolist()
            layers[name].append(row | {"steps": len(steps), "pages_lacking": pages})
            lacking = "{} of {} pages lacking".format(*pages)
            print(f"{number:4}  {row['error_mean']:.2e}  {row['error_max']:.2e}  {lacking}")
    s = summarise(rows, layers) | {"seconds": round(time.perf_counter() - began, 1)}
    setting = {k: v for k, v in vars(options).items() if k != "json"}
    record = {"machine": machine_record(), **setting, **s, "layers": layers, "rows": rows}
    options.json.write_text(json.dumps(record) + "\n")
    worst = ", ".join(f"{error:.1e} {name}" for name, error in s["layer_error_worst"].items())
    print(
        f"tokens equal: {s['tokens_equal']} of {s['tokens']}; questions {s['questions_equal']} of "
        f"{s['questions']}, by generate {s['generated_equal']}; near-ties {s['near_ties']}; logits "
        f"off by at most {s['logits_error_max']:.1e}; worst layer {worst}; {s['seconds']:.0f} s"
    )
    return int(not s["is_good"])


if __name__ == "__main__":
    sys.exit(main())
