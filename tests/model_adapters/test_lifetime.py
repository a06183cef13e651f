"""A cache goes when the last reference to it does: its pages may be most of the memory there is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from weakref import ref

import pytest
import torch
from tiny_models import prompt

from wavekv import OffloadedKV


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_cache_is_in_no_cycle(
    wrapped: Callable[..., OffloadedKV], device: torch.device, no_collector: None
) -> None:
    model = wrapped("llama", device)
    ids = prompt(100).to(device)
    cache = model.new_cache()
    out = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
    with torch.no_grad():
        model(input_ids=out[:, -1:], past_key_values=cache)
    gone = ref(cache)
    arena = ref(cache.offloaded_layers[0].context.paged.arena)
    del cache
    assert gone() is None
    assert arena() is None
