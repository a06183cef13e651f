"""Which pages a step chooses again, and how well a pool or a prediction would have them ready.

    python bench/reuse.py --json bench/results/reuse.json

The bundled model answers questions about planted facts; each conversation then goes on with further
questions and their right answers, or with prose that is not in the context. Measured on the pages
that each KV head chooses in a step, all steps of a conversation but the first:

- `lru Nx`: hit rate of a least-recently-used pool of N budgets; 1x is the share of pages that the
  step before chose too. With `+25%` the runners-up by rank, so many of a budget, are loaded after
  each step too, to be evicted first. `moved` is what is loaded in a step, in budgets.
- `early`, for all layers but the first: pages chosen by the query predicted from the hidden state
  that enters the layer before. `overlap` with the pages really chosen; `hit` and `moved` where they
  are loaded beside an LRU pool of two budgets; `cosine` of predicted and true query.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine_record
from torch import Tensor
from tqdm import tqdm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from wavekv import OffloadConfig, OffloadedCache, OffloadedKV
from wavekv.cli.answering import VALUE_DIGITS
from wavekv.demo import corpus
from wavekv.demo.context import PlantedContext, plant
from wavekv.index.levels import Logits, choose_of_levels
from wavekv.model_adapters.bundled import load_demo_model, load_demo_tokenizer
from wavekv.offload.budget import page_limits

POOLS = {f"lru {n:g}x": (n, 0.0) for n in (1, 1.5, 2, 3)}
POOLS |= {f"lru {n:g}x +{more:.0%}": (n, more) for n in (1.5, 2, 3) for more in (0.25, 0.5)}


@dataclass
class Pool:
    """Least-recently-used slots of one KV head; pages held, the latest used first."""

    budgets: float
    runners_up: float
    held: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def step(self, chosen: np.ndarray, runners_up: np.ndarray) -> tuple[float, float]:
        """The hit rate of the chosen pages, and the budgets of pages loaded. Both best first."""
        hits, before = np.isin(chosen, self.held), self.held
        slots = round(self.budgets * len(chosen)) - len(chosen)
        rest = before[~np.isin(before, chosen)][:slots]
        wanted = runners_up[: round(self.runners_up * len(chosen))]
        # runners-up that are held stay; the others take the place of the least recently used
        stays = np.isin(rest, wanted)
        new = wanted[~np.isin(wanted, rest)][: slots - stays.sum()]
        stays |= np.cumsum(~stays) <= slots - len(new) - stays.sum()
        self.held = np.concatenate([chosen, rest[stays], new])
        return hits.mean(), np.isin(self.held, before, invert=True).sum() / len(chosen)


class Observer:
    """Follows one conversation: the measures of each step, [L, Hkv], NaN where there is none."""

    def __init__(self, cache: OffloadedCache) -> None:
        self.contexts: list[Any] = [layer.context for layer in cache.offloaded_layers]
        self.shape = len(self.contexts), self.contexts[0].shape[1]
        self.pools = {at: {n: Pool(*p) for n, p in POOLS.items()} for at in np.ndindex(self.shape)}
        self.early: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: the predicted query [Hq, D] and the pages [Hkv, M] that it chooses."""

    def predict(self, number: int, layer: Any, *inputs: Any) -> None:
        """What `layer`, the one of that number, will choose: a hook on the layer before it."""
        attention, context = layer.self_attn, self.contexts[number]
        query = attention.q_proj(layer.input_layernorm(inputs[1][0]))
        query = query.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        query = apply_rotary_pos_emb(query, query, *inputs[2]["position_embeddings"])[0][:, :, 0]
        context.settle()
        summary, logits = context.paged.summary, Logits(attention.scaling)
        least, most = page_limits(context.runtime.config, context.num_tokens + 1)
        refine = context.runtime.config.refine
        choice = choose_of_levels(query, summary, logits, least=least, most=most, refine=refine)
        self.early[number] = query[0], choice.pages[0]

    def step(self) -> dict[str, np.ndarray]:
        """The measures of the step just made."""
        row: dict[str, np.ndarray] = defaultdict(lambda: np.full(self.shape, np.nan))
        for number, context in enumerate(self.contexts):
            choice, early = context.counters.last_choice, self.early.get(number)
            # as `kernels.select` ranks
            rank = choice.log_mass[0].unflatten(0, (self.shape[1], -1)).softmax(-1).sum(1)
            order = rank.argsort(dim=-1, descending=True).numpy()
            for head, best in enumerate(order):
                at, is_chosen = (number, head), np.isin(best, choice.chosen[0, head].numpy())
                chosen, others = best[is_chosen], best[~is_chosen]
                if early:
                    predicted, held = early[1][head].numpy(), self.pools[at]["lru 2x"].held
                    extra = np.setdiff1d(predicted, held)
                    row["early hit"][at] = hit = np.isin(chosen, np.union1d(held, predicted)).mean()
                    row["early moved"][at] = 1 - hit + len(extra) / len(chosen)
                    row["early overlap"][at] = np.isin(chosen, predicted).mean()
                for name, pool in self.pools[at].items():
                    row[name][at], row[f"{name} moved"][at] = pool.step(chosen, others)
            if early:
                cosine = torch.cosine_similarity(early[0], context.counters.last_query[0], dim=-1)
                row["early cosine"][number] = cosine.view(self.shape[1], -1).mean(1).numpy()
        return row


def continuations(context: PlantedContext, length: int) -> Iterator[dict[str, Iterator[int]]]:
    """For each conversation, by phase: the token ids that follow its first answer."""
    tokenizer, rng = load_demo_tokenizer(), random.Random(0)
    text = tokenizer.decode(context.token_ids)
    fresh = ["\n" + passage for passage in corpus.passages("heldout") if passage[:60] not in text]
    prose = [e.ids for e in tokenizer.encode_batch(fresh) if len(e.ids) >= length]
    while True:
        facts = rng.sample(context.facts, min(len(context.facts), length // 10))
        asked = "\n" + "".join(fact.question + fact.value + "\n" for fact in facts)
        yield {"questions": iter(tokenizer.encode(asked).ids), "prose": iter(rng.choice(prose))}


@torch.inference_mode()
def measure(model: OffloadedKV, num_tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """Prefill one context and hold all conversations after it: summaries by phase and measure."""
    encode = load_demo_tokenizer().encode_batch
    context = plant(num_tokens, lambda s: [e.ids for e in encode(s)], seed=options.seed)
    cache = model.new_cache()
    model.prefill(torch.tensor([context.token_ids]), cache, progress=True)
    tallies: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    endings = continuations(context, options.further)
    for fact in tqdm(context.facts[: options.questions], desc="conversations"):
        question = torch.tensor(encode([fact.question])[0].ids)[None]
        for phase, forced in next(endings).items():
            fork, token = cache.fork(), question[:, -1:]
            model(input_ids=question[:, :-1], past_key_values=fork, logits_to_keep=1)
            observer, hooks = Observer(fork), []
            for number, (before, layer) in enumerate(pairwise(model.model.model.layers), 1):
                hook = partial(observer.predict, number, layer)
                hooks.append(before.register_forward_pre_hook(hook, with_kwargs=True))
            for step in range(VALUE_DIGITS + options.further):
                logits = model(input_ids=token, past_key_values=fork, logits_to_keep=1).logits
                is_answer = step < VALUE_DIGITS
                for name, values in observer.step().items():
                    # the answer is the same in both phases
                    if step > 0 and (phase == "questions" or not is_answer):
                        tallies["answer" if is_answer else phase][name].append(values)
                answered = logits[:, -1:].argmax(-1)
                token = answered if is_answer else torch.tensor([[next(forced)]])
            for handle in hooks:
                handle.remove()
    return {p: {n: summarise(v) for n, v in sorted(t.items())} for p, t in tallies.items()}


def summarise(steps: list[np.ndarray]) -> dict[str, Any]:
    heads = np.stack(steps).mean(0)
    heads = heads[~np.isnan(heads).any(1)].round(4)
    summary = {"mean": round(float(heads.mean()), 4), "steps": len(steps)}
    return summary | {"per_layer": heads.mean(1).round(4).tolist(), "per_head": heads.tolist()}


def print_table(num_tokens: int, phases: dict[str, Any]) -> None:
    print(f"\n{num_tokens} tokens: mean (least and most of a layer), for {', '.join(phases)}")
    for name in phases["answer"]:
        cells = [(phase[name]["mean"], phase[name]["per_layer"]) for phase in phases.values()]
        texts = [f"{mean:9.3f} ({min(rows):.2f} {max(rows):.2f})" for mean, rows in cells]
        print(f"{name:20}", *texts, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("bench/results/reuse.json"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--further", type=int, default=64, help="steps after each answer")
    parser.add_argument("--seed", type=int, default=100)
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": machine_record(), "rows": []}
    with OffloadedKV(load_demo_model(), OffloadConfig()) as model:
        for num_tokens in options.tokens:
            began = time.time()
            phases = measure(model, num_tokens, options)
            print_table(num_tokens, phases)
            row = {"context_tokens": num_tokens, "seconds": round(time.time() - began)}
            record["rows"].append({**row, "phases": phases})
            options.json.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
