"""A long context for the demo model: real text with planted facts, as tokens of an exact count."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wavekv.demo import corpus, facts

Encode = Callable[[list[str]], list[list[int]]]
"""Token ids of each string."""

TOKENS_PER_FACT = 512
"""One planted fact in so many tokens, as the demo model was evaluated."""


@dataclass(frozen=True, slots=True)
class PlantedContext:
    """Token ids [T] of a text and the facts in it."""

    token_ids: list[int]
    facts: list[facts.Fact]
    fact_spans: list[tuple[int, int]]
    """Token positions [start, stop) of each fact's statement."""


def plant(num_tokens: int, encode: Encode, *, seed: int, text: str | None = None) -> PlantedContext:
    """Make a context of `num_tokens` tokens, or fewer if `text` is shorter.

    text: what to plant the facts in; by default documentation that the demo model never saw.

    Raises:
        ValueError: too few tokens for a single fact.
    """
    if num_tokens < TOKENS_PER_FACT:
        raise ValueError(f"expected at least {TOKENS_PER_FACT} tokens, got {num_tokens}")
    rng = random.Random(seed)
    planted = facts.draw_facts(min(num_tokens // TOKENS_PER_FACT, len(facts.NAMES) // 2), rng)
    noise = facts.draw_distractors(len(planted) // 4, planted, rng)
    statements = [" " + s for s in [fact.statement for fact in planted] + noise]
    numbers = list(range(len(statements)))
    rng.shuffle(numbers)
    encoded = encode(statements)
    inserted = [(number, encoded[number]) for number in numbers]
    room = num_tokens - sum(map(len, encoded))
    pieces = [(-1, ids) for ids in encode(_sentences(text, rng))]
    woven = facts.weave(_first_tokens(pieces, room), inserted, rng)
    token_ids: list[int] = []
    spans = {}
    for number, ids in woven:
        spans[number] = len(token_ids), len(token_ids) + len(ids)
        token_ids += ids
    return PlantedContext(token_ids, planted, [spans[number] for number in range(len(planted))])


def _sentences(text: str | None, rng: random.Random) -> list[str]:
    if text is not None:
        return facts.sentences(text)
    passages = corpus.passages("heldout")
    rng.shuffle(passages)
    return [sentence for passage in passages for sentence in facts.sentences(passage)]


def _first_tokens(
    pieces: Sequence[tuple[int, list[int]]], count: int
) -> list[tuple[int, list[int]]]:
    """The first pieces, `count` tokens of them; the last is cut."""
    taken = []
    for number, ids in pieces:
        if count <= 0:
            break
        taken.append((number, ids[:count]))
        count -= len(ids)
    return taken
