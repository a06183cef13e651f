"""Whether a cache still answers as it should."""

from __future__ import annotations

import torch
from tiny_models import eager_model, prompt
from torch import Tensor

from wavekv import OffloadedCache, OffloadedKV

NUM_NEW = 6


def check_answers(model: OffloadedKV, model_type: str, cache: OffloadedCache, ids: Tensor) -> None:
    """The cache holds exactly `ids`, in every layer: what follows is what eager says."""
    assert cache.get_seq_length() == ids.shape[1]
    for layer in cache.offloaded_layers:
        assert layer.get_seq_length() == ids.shape[1]
    whole = torch.cat([ids, prompt(20, seed=31, batch=ids.shape[0])], 1)
    options = {"max_new_tokens": NUM_NEW, "attention_mask": torch.ones_like(whole)}
    out = model.generate(whole, past_key_values=cache, **options)
    assert torch.equal(out, eager_model(model_type).generate(whole, **options))
    for arena in cache.runtime.arenas.values():
        arena.check_integrity()
