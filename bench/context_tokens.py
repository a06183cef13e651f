"""What a cache answers after it was saved and loaded, against the cache that never was: the bundled
model, in float32, in bfloat16 and with pages in eight bits."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from context_prompt import BUNDLED, Prompt, make_model, make_prompt
from context_tiers import MOST_TOKENS
from tqdm import tqdm

from wavekv import OffloadedCache, OffloadedKV
from wavekv.cli.answering import Answers, ask
from wavekv.model_adapters.bundled import load_demo_tokenizer

FORMS = {
    "float32": (torch.float32, "model"),
    "bfloat16": (torch.bfloat16, "model"),
    "int8": (torch.float32, "int8"),
}
"""Of pages: the dtype of the model, and `host_dtype`."""
_APPENDED = 600
"""Tokens of a second turn: more than one segment of them."""

Tokens = list[list[int]]


def tokens_rows(args: Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each form of pages and each way to come by the cache."""
    prompt = make_prompt(BUNDLED, None, args.device, min(args.tokens, MOST_TOKENS), args.seed)
    assert prompt.context is not None
    tokenizer = load_demo_tokenizer()
    facts = prompt.context.facts[: args.questions]
    questions = [tokenizer.encode(fact.question).ids for fact in facts]
    for form in args.forms:
        dtype, host_dtype = FORMS[form]
        model = make_model(BUNDLED, None, args.device, 0).to(dtype)
        own = replace(prompt, model=model)
        with own.wrapped(host_dtype=host_dtype) as wrapped:
            ways = _ways(own, wrapped, folder / form, questions, dtype, host_dtype)
            expected: dict[bool, Tokens] = {}
            for name, is_longer, answer in ways:
                found = answer()
                known = expected.setdefault(is_longer, found)
                same = sum(a == b for a, b in zip(found, known, strict=True))
                assert same == len(questions), f"{form}, {name}: {same} of {len(questions)} answers"
                yield {
                    "form": form,
                    "name": name,
                    "tokens": prompt.ids.shape[1] + is_longer * _APPENDED,
                    "answers": len(questions),
                    "same_answers": same,
                    "compared_tokens": sum(map(len, found)),
                }


def _ways(
    prompt: Prompt,
    wrapped: OffloadedKV,
    path: Path,
    questions: Tokens,
    dtype: torch.dtype,
    host_dtype: str,
) -> list[tuple[str, bool, Callable[[], Tokens]]]:
    """(name, whether a second turn is in it, what answers); the first of each kind was never
    saved."""
    cache, _, _ = prompt.prefill(wrapped)
    turn = prompt.ids[:, :_APPENDED]
    cache.save(path, token_ids=prompt.ids)

    def asked(make: Callable[[], OffloadedCache]) -> Callable[[], Tokens]:
        return lambda: answers_of(wrapped, make(), questions)

    def appended(held: OffloadedCache) -> OffloadedCache:
        with torch.no_grad():
            wrapped(input_ids=turn, past_key_values=held, logits_to_keep=1)
        return held

    def loaded() -> OffloadedCache:
        return OffloadedCache.load(path, wrapped)

    def saved_again() -> OffloadedCache:
        other = path.with_name(path.name + "-again")
        appended(loaded()).save(other)
        return OffloadedCache.load(other, wrapped)

    def in_process() -> Tokens:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            where = str(path), str(dtype).removeprefix("torch."), host_dtype, str(prompt.device)
            return process.submit(answers_of_process, *where, questions).result()

    return [
        ("never saved", False, asked(cache.fork)),
        ("loaded", False, asked(loaded)),
        ("loaded in another process", False, in_process),
        ("a fork of a loaded one", False, asked(lambda: loaded().fork())),
        ("never saved, second turn", True, asked(lambda: appended(cache.fork()))),
        ("loaded, second turn", True, asked(lambda: appended(loaded()))),
        ("a fork of a loaded one, second turn", True, asked(lambda: appended(loaded().fork()))),
        ("loaded, second turn, saved and loaded", True, asked(saved_again)),
    ]


def answers_of(wrapped: OffloadedKV, cache: OffloadedCache, questions: Tokens) -> Tokens:
    """The answer to each question, asked of a fork; to the last one of the cache itself."""
    answers = Answers()
    with torch.no_grad():
        for number, question in enumerate(tqdm(questions, desc="questions", leave=False)):
            asked = cache if number + 1 == len(questions) else cache.fork()
            ids = torch.tensor([question], device=wrapped.model.device)
            ask(wrapped, asked, ids, answers, str)
    return answers.tokens


def answers_of_process(
    path: str, dtype: str, host_dtype: str, device: str, questions: Tokens
) -> Tokens:
    """`answers_of` in a process that has only its modules."""
    model = make_model(BUNDLED, None, device, 0).to(getattr(torch, dtype))
    with OffloadedKV(model, host_dtype=host_dtype) as wrapped:
        return answers_of(wrapped, OffloadedCache.load(path, wrapped), questions)
