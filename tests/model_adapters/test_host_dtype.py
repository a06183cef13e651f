"""A wrapped model whose pages are small integers says nearly what the unwrapped model says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import eager_model, left_padded, prompt
from torch import Tensor

from wavekv import OffloadedKV

Wrap = Callable[..., OffloadedKV]
LARGEST = {"int8": 0.02, "int4": 0.2, "int4-int2": 0.4}
"""Mean relative L2 difference that a form of pages makes to logits, of a random model whose
attention is sharp."""


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("host_dtype", LARGEST)
@pytest.mark.parametrize("mode", ["exact", "retrieval"])
def test_logits_differ_little(wrapped: Wrap, host_dtype: str, mode: str, device) -> None:
    options = {"mode": mode, "budget": 1.0, "prefill_chunk": 64}
    model = wrapped("llama", device, host_dtype=host_dtype, **options)
    ids, cache = prompt(150), model.new_cache()
    found = [model.prefill(ids[:, :140].to(device), cache).cpu()]
    with torch.no_grad():
        for position in range(140, 150):
            token = ids[:, position : position + 1].to(device)
            found.append(model(input_ids=token, past_key_values=cache).logits[:, -1].cpu())
        expected = eager_model("llama")(ids).logits[0, 139:]
    errors = [difference(a[0], b) for a, b in zip(found, expected, strict=True)]
    # far above rounding: it is not the model's dtype that pages are stored in
    assert 1e-3 < sum(errors) / len(errors) < LARGEST[host_dtype]
    layout = cache.offloaded_layers[0].context.paged.arena.layout
    stats = cache.stats()
    assert stats["bytes_host"] == stats["pages"] * layout.page_bytes
    assert layout.page_bytes < layout.dense_bytes


def test_padding_crops_and_forks(wrapped: Wrap) -> None:
    model = wrapped("llama", host_dtype="int8", mode="exact")
    ids, mask = left_padded(131, 97)
    cache = model.new_cache()
    model.prefill(ids[:, :-1], cache, mask[:, :-1])
    cache.crop(-40)
    fork = cache.fork()
    with torch.no_grad():
        expected = eager_model("llama")(ids, attention_mask=mask).logits[:, -1]
        for each in (cache, fork):
            rest = model(ids[:, 90:], past_key_values=each, attention_mask=mask).logits[:, -1]
            assert difference(rest, expected) < LARGEST["int8"]
