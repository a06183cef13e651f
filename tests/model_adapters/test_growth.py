"""A long answer: what is generated is paged out too, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from tiny_models import eager_model, prompt

from wavekv import OffloadedKV

NUM_NEW = 760


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "retrieval"])
def test_generated_tokens_become_pages(mode: str, wrapped) -> None:
    model: OffloadedKV = wrapped(
        "llama", mode=mode, page_size=8, segment=1024, append_segment=128, window=64
    )
    ids, cache = prompt(40), model.new_cache()
    options = {"max_new_tokens": NUM_NEW, "do_sample": False}
    out = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(out, eager_model("llama").generate(ids, **options))
    stats = cache.stats()
    # five segments of 128 have left the window, in each layer and head
    assert stats["pages"] == 5 * 128 // 8 * 2 * len(cache.offloaded_layers)
    assert stats["tokens"] == 40 + NUM_NEW - 1
    lengths = {end for end, _ in cache.offloaded_layers[0].context.paged.segments}
    assert lengths == {128, 256, 384, 512, 640}
