"""Answers of the bundled model where steps do not wait for all pages that they choose.

    OMP_WAIT_POLICY=passive python bench/misses.py --json bench/results/misses.json

`max_misses` caps the pages that a KV head waits for in a step; those of lower rank are estimated
and there in the next step. The pool of an engine is empty at first, so that its first step misses
all it chooses: here that is the second digit of an answer. About 10 minutes on two CPU cores, where
the engine runs on the torch twins of its kernels.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from engine_steps import engine_of, engine_step
from machine import machine_record
from torch import Tensor
from tqdm import tqdm

from wavekv import OffloadConfig, OffloadedCache, OffloadedKV
from wavekv.cli.answering import VALUE_DIGITS
from wavekv.demo.context import plant
from wavekv.model_adapters.bundled import load_demo_model, load_demo_tokenizer


@torch.no_grad()
def answer(
    model: OffloadedKV, cache: OffloadedCache, token: Tensor, max_misses: int | None
) -> tuple[list[int], Tensor]:
    """The digits after `token` [1, 1], the last of the question, and [5] pages: found on the
    device, fetched, left out, tokens retrieved, fetched for later. `cache` is consumed."""
    cache.runtime.config = cache.config.override(max_misses=max_misses)
    logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
    token = logits[:, -1].argmax(-1, keepdim=True)
    tokens = [int(token)]
    with engine_of(cache) as engine:
        while len(tokens) < VALUE_DIGITS:
            token = engine_step(engine, model, cache, token)
            tokens.append(int(token))
        paging = sum(layer.totals.paging.flatten(0, 1).sum(0) for layer in engine.layers)
    return tokens, paging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("bench/results/misses.json"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--questions", type=int, default=52)
    parser.add_argument("--caps", type=int, nargs="+", default=[32, 16, 8, 4, 2])
    parser.add_argument("--seed", type=int, default=100)
    options = parser.parse_args()
    began = time.perf_counter()
    tokenizer = load_demo_tokenizer()
    encode = tokenizer.encode_batch
    context = plant(options.tokens, lambda s: [e.ids for e in encode(s)], seed=options.seed)
    model = OffloadedKV(load_demo_model(), OffloadConfig(budget=0.02))
    cache = model.new_cache()
    model.prefill(torch.tensor([context.token_ids]), cache, progress=True)
    caps: list[int | None] = [None, *options.caps]
    right, paging = dict.fromkeys(caps, 0), {cap: torch.zeros(5, dtype=torch.int64) for cap in caps}
    facts = context.facts[: options.questions]
    for fact in tqdm(facts, desc="questions"):
        question = torch.tensor([tokenizer.encode(fact.question).ids])
        asked = cache.fork()
        with torch.no_grad():
            model(input_ids=question[:, :-1], past_key_values=asked, logits_to_keep=1)
        for cap in caps:
            tokens, pages = answer(model, asked.fork(), question[:, -1:], cap)
            right[cap] += tokenizer.decode(tokens) == fact.value
            paging[cap] += pages
    rows = []
    for cap in caps:
        found, fetched, left_out = (int(count) for count in paging[cap][:3])
        share = left_out / (found + fetched + left_out)
        rows.append({"max_misses": cap, "right": right[cap], "left_out": share})
        print(f"max_misses {cap}: {right[cap]} of {len(facts)} right, {share:.1%} left out")
    setting = {"tokens": options.tokens, "questions": len(facts), "seed": options.seed}
    record = {"machine": machine_record(), **setting, "rows": rows}
    record["seconds"] = round(time.perf_counter() - began)
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
