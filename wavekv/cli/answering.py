"""Asking a model questions after one long context: the same greedy loop for every kind of cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

VALUE_DIGITS = 5


@dataclass(slots=True)
class Answers:
    """What a mode answered, and how long each decode step took."""

    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    @property
    def tpot_ms(self) -> float:
        """Median milliseconds for a generated token."""
        return median(self.step_seconds) * 1e3

    def num_right(self, values: list[str]) -> int:
        """Answers that equal `values`."""
        return sum(text == value for text, value in zip(self.texts, values, strict=True))


def ask(
    model: Any,
    cache: Any,
    question: Tensor,
    answers: Answers,
    decode: Callable[[list[int]], str],
    after_first: Callable[[], None] | None = None,
) -> None:
    """Ask one question greedily and record the answer. `cache` holds the context and is consumed.

    question: [1, T]. All but its last token are taken in exactly; the last one and each digit is a
    decode step. `after_first` runs after the step that gives the first digit, untimed.
    """
    model(input_ids=question[:, :-1], past_key_values=cache, logits_to_keep=1)
    token, tokens = question[:, -1:], []
    for step in range(VALUE_DIGITS):
        start = time.perf_counter()
        logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(token))
        answers.step_seconds.append(time.perf_counter() - start)
        if step == 0 and after_first is not None:
            after_first()
    answers.tokens.append(tokens)
    answers.texts.append(decode(tokens))


def timed(call: Callable[[], Any]) -> float:
    """Seconds that `call` takes, device work included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
