"""Generation with a quarter of the pages in host memory and the others on a disk, against all of
them in host memory: the bundled model, the same questions, in turns."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from context_prompt import BUNDLED, Prompt, make_prompt
from tqdm import tqdm

from wavekv import OffloadedCache, OffloadedKV
from wavekv.cli.answering import Answers, ask
from wavekv.model_adapters.bundled import load_demo_tokenizer

MOST_TOKENS = 1 << 15
"""What the bundled model was trained for."""
HOST_SHARE = 0.25
_OF_DISK = "bytes_disk", "bytes_to_disk", "bytes_from_disk"


class Tally:
    """What one of the two answered."""

    def __init__(self, cache: OffloadedCache, prefill_seconds: float) -> None:
        self.cache, self.prefill_seconds = cache, prefill_seconds
        self.answers = Answers()
        self.wanted = self.missing = 0

    def ask(self, wrapped: OffloadedKV, question: torch.Tensor, decode: Any) -> None:
        """Ask a copy of the cache."""
        fork = self.cache.fork()
        ask(wrapped, fork, question, self.answers, decode)
        for layer in fork.offloaded_layers:
            self.wanted += layer.context.counters.host_wanted
            self.missing += layer.context.counters.host_missing


def tiers_rows(args: Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each of the two."""
    tokens = min(args.tokens, MOST_TOKENS)
    prompt = make_prompt(BUNDLED, None, args.device, tokens, args.seed)
    assert prompt.context is not None
    facts = prompt.context.facts[: args.questions]
    tokenizer = load_demo_tokenizer()
    with prompt.wrapped() as wrapped:
        all_in_memory = _tally(prompt, wrapped)
        nbytes = int(all_in_memory.cache.stats()["bytes_pages"])
        budget = int(HOST_SHARE * nbytes)
        wrapped.offload_config = wrapped.offload_config.override(
            cpu_budget=budget, disk=str(folder)
        )
        both = {"memory": all_in_memory, "memory and disk": _tally(prompt, wrapped)}
        with torch.inference_mode():
            for number, fact in enumerate(tqdm(facts, desc="questions")):
                ids = tokenizer.encode(fact.question).ids
                question = torch.tensor([ids], device=args.device)
                for name in sorted(both, reverse=number % 2 == 1):
                    both[name].ask(wrapped, question, tokenizer.decode)
        expected = all_in_memory.answers.tokens
        for name, tally in both.items():
            same = sum(a == b for a, b in zip(tally.answers.tokens, expected, strict=True))
            assert same == len(facts), f"{name}: {same} of {len(facts)} answers as in memory"
            statistics = tally.cache.stats()
            yield {
                "name": name,
                "tokens": tokens,
                "page_nbytes": nbytes,
                "host_nbytes": nbytes if tally is all_in_memory else budget,
                "prefill_seconds": tally.prefill_seconds,
                "ms_per_token": tally.answers.tpot_ms,
                "answers": len(facts),
                "same_answers": same,
                "right_answers": tally.answers.num_right([fact.value for fact in facts]),
                "host_hit_rate": 1 - tally.missing / max(1, tally.wanted),
                "pages_wanted": tally.wanted,
                **{name: statistics[name] for name in _OF_DISK},
            }


def _tally(prompt: Prompt, wrapped: OffloadedKV) -> Tally:
    cache, _, seconds = prompt.prefill(wrapped)
    return Tally(cache, seconds)
