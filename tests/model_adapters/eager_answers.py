"""Greedy tokens of wrapped models, and those that the unwrapped eager model generates."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tiny_models import eager_model, left_padded, prompt
from torch import Tensor

from wavekv import OffloadedKV

NUM_NEW = 8
PREFILL_CHUNK = 23

Wrap = Callable[..., OffloadedKV]


def generate(model: Any, ids: Tensor | None, **options: Any) -> Tensor:
    """Greedy tokens on the CPU, wherever the model is."""
    moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    ids = None if ids is None else ids.to(model.device)
    tokens: Tensor = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False, **moved)
    return tokens.cpu()


def two_prompts() -> tuple[Tensor, Tensor]:
    """What is asked in a first turn, and in a second."""
    return prompt(97, seed=5), prompt(31, seed=6)


@cache
def eager_tokens(model_type: str, scenario: str) -> Tensor | tuple[Tensor, ...]:
    """What eager attention generates. A second turn is computed from scratch."""
    model = eager_model(model_type)
    if scenario == "padded":
        ids, mask = left_padded(131, 97)
        return generate(model, ids, attention_mask=mask)
    if scenario == "beams":
        return generate(model, prompt(117), num_beams=2)
    if scenario == "two_turns":
        first, second = two_prompts()
        said = generate(model, first)
        whole = torch.cat([said, second], 1)
        return said, generate(model, whole, attention_mask=torch.ones_like(whole))
    return generate(model, prompt(131))


def continued(model: OffloadedKV, ids: Tensor, cache: Any) -> Tensor:
    """Greedy tokens after `ids`, of which the cache holds the first."""
    return generate(model, ids, past_key_values=cache, attention_mask=torch.ones_like(ids))


def from_scratch(model_type: str, ids: Tensor) -> Tensor:
    """The same tokens by eager attention, without a cache to start from."""
    return generate(eager_model(model_type), ids, attention_mask=torch.ones_like(ids))
