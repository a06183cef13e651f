"""Answers of the bundled model where steps do not wait for all pages that they choose.

    OMP_WAIT_POLICY=passive python bench/misses.py

`max_misses` caps the pages that a KV head waits for in a step; those of lower rank are estimated
and there in the next step. The pool of an engine is empty at first, so that its first step misses
all it chooses: here that is the second digit of an answer. About 10 minutes on two CPU cores, where
the engine runs on the torch twins of its kernels.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_steps import engine_of, engine_step, watched
from machine import machine_record
from torch import Tensor
from tqdm import tqdm

from wavekv import OffloadConfig, OffloadedCache, OffloadedKV
from wavekv.cli.answering import VALUE_DIGITS
from wavekv.demo.context import plant
from wavekv.index import relative_error
from wavekv.model_adapters.bundled import load_demo_model, load_demo_tokenizer

RESULT = Path(__file__).parent / "results" / "misses.json"


@dataclass
class Tally:
    """What a cap did."""

    right: int = 0
    asked: int = 0
    paging: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.int64))
    """Pages found on the device, fetched, left out; tokens retrieved; pages fetched for later."""
    first_errors: list[float] = field(default_factory=list)
    """Relative L2 of a head's output to exact attention, in the first step of an engine."""
    errors: list[float] = field(default_factory=list)
    """The same in later steps."""

    def as_row(self, cap: int | None) -> dict[str, Any]:
        found, fetched, left_out = (int(count) for count in self.paging[:3])
        return {
            "max_misses": cap,
            "right": self.right,
            "asked": self.asked,
            "found": found / (found + fetched + left_out),
            "left_out": left_out / (found + fetched + left_out),
            "first_error": sum(self.first_errors) / max(1, len(self.first_errors)),
            "error": sum(self.errors) / max(1, len(self.errors)),
        }


@torch.no_grad()
def run(
    model: OffloadedKV,
    cache: OffloadedCache,
    token: Tensor,
    max_misses: int | None,
    tally: Tally,
    num_steps: int,
    *,
    is_watched: bool,
) -> list[int]:
    """Tokens of `num_steps` steps from `token` [1, 1] on, all but the first on an engine. `cache`
    is consumed."""
    cache.runtime.config = cache.config.override(max_misses=max_misses)
    logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    tokens = [int(token)]
    exact = cache.fork(mode="exact")
    copies = [layer.context for layer in exact.offloaded_layers]

    def look(number: int, got: Tensor, expected: Tensor) -> None:
        errors = tally.first_errors if len(tokens) == 1 else tally.errors
        errors += relative_error(got, expected).flatten().tolist()

    with engine_of(cache) as engine:
        with watched(engine, copies, look) if is_watched else nullcontext():
            while len(tokens) < num_steps:
                token = engine_step(engine, model, cache, token)
                tokens.append(int(token))
        for layer in engine.layers:
            tally.paging += layer.totals.paging.flatten(0, 1).sum(0)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULT)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--questions", type=int, default=52)
    parser.add_argument("--caps", type=int, nargs="+", default=[32, 16, 8, 4, 2])
    parser.add_argument("--watched", type=int, default=8, help="questions whose errors are taken")
    parser.add_argument("--further", type=int, default=24, help="steps of these after the answer")
    parser.add_argument("--seed", type=int, default=100)
    options = parser.parse_args()
    began = time.perf_counter()
    tokenizer = load_demo_tokenizer()
    encode = tokenizer.encode_batch
    context = plant(options.tokens, lambda s: [e.ids for e in encode(s)], seed=options.seed)
    model = OffloadedKV(load_demo_model(), OffloadConfig(budget=0.02))
    cache = model.new_cache()
    model.prefill(torch.tensor([context.token_ids]), cache, progress=True)
    tallies: dict[int | None, Tally] = {cap: Tally() for cap in (None, *options.caps)}
    for number, fact in enumerate(tqdm(context.facts[: options.questions], desc="questions")):
        question = torch.tensor([tokenizer.encode(fact.question).ids])
        asked = cache.fork()
        with torch.no_grad():
            model(input_ids=question[:, :-1], past_key_values=asked, logits_to_keep=1)
        is_watched = number < options.watched
        steps = VALUE_DIGITS + is_watched * options.further
        for cap, tally in tallies.items():
            args = model, asked.fork(), question[:, -1:], cap, tally, steps
            tokens = run(*args, is_watched=is_watched)[:VALUE_DIGITS]
            tally.asked += 1
            tally.right += tokenizer.decode(tokens) == fact.value
    rows = [tally.as_row(cap) for cap, tally in tallies.items()]
    for row in rows:
        print(
            "max_misses {max_misses}: {right} of {asked} right, {found:.1%} found, {left_out:.1%} "
            "left out, error {first_error:.4f} in the first step, {error:.4f} later".format(**row)
        )
    record = {"machine": machine_record(), **vars(options), "rows": rows}
    record |= {"json": options.json.name, "seconds": round(time.perf_counter() - began)}
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
