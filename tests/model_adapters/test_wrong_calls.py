"""Caches, masks and calls that do not fit: an error before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_answers import check_answers
from tiny_models import eager_model, left_padded, make_model, prompt
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedModel,
)

from wavekv import OffloadedCache, OffloadedKV
from wavekv.errors import (
    CacheError,
    ConfigError,
    UnsupportedModelError,
)

Wrap = Callable[..., OffloadedKV]
HYBRIDS = ["gemma3_text", "llama4_text", "qwen3_next"]


def _calls(model: OffloadedKV, cache: Any) -> list[Callable[[], Any]]:
    ids = prompt(20)
    return [
        lambda: model.generate(ids, past_key_values=cache, max_new_tokens=2),
        lambda: model.prefill(ids, cache),
        lambda: model(ids, past_key_values=cache),
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_cache_of_another_model(number: int, wrapped: Wrap) -> None:
    cache = wrapped("qwen2").new_cache()
    with pytest.raises(CacheError, match=r"belongs to another model.*new_cache\(\)"):
        _calls(wrapped("llama"), cache)[number]()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("number", range(3))
def test_a_plain_cache(number: int, wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = DynamicCache(config=model.model.config)
    with pytest.raises(CacheError, match=r"expected an OffloadedCache.*got DynamicCache"):
        _calls(model, cache)[number]()


@torch.no_grad()
def test_a_cache_in_another_bare_model(wrapped: Wrap) -> None:
    cache = wrapped("qwen2").new_cache()
    with pytest.raises(CacheError, match="belongs to another model"):
        wrapped("llama").model(prompt(20), past_key_values=cache)
    # a model that is not wrapped never asks wavekv's attention
    with pytest.raises(CacheError, match="never reached wavekv's attention"):
        eager_model("llama")(prompt(20), past_key_values=cache)


@torch.no_grad()
def test_a_cache_whose_model_was_unwrapped(tiny_llama: PreTrainedModel) -> None:
    model = OffloadedKV(tiny_llama)
    cache = model.new_cache()
    model.prefill(prompt(20), cache)
    model.unwrap()
    with pytest.raises(CacheError, match=r"attend with 'wavekv', it attends with 'sdpa'"):
        tiny_llama(prompt(5), past_key_values=cache)
    assert cache.get_seq_length() == 20
    for call in (*_calls(model, cache), *_calls(model, None)):
        with pytest.raises(ConfigError, match=r"expected a wrapped model.*wrap it again"):
            call()


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_keys_that_lose_their_tag(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OffloadedKV(make_model("llama", num_hidden_layers=num_layers))
    cache = model.new_cache()
    update = OffloadedCache.update
    monkeypatch.setattr(
        OffloadedCache, "update", lambda *args, **kw: [x * 1 for x in update(*args, **kw)]
    )
    with pytest.raises(CacheError, match=r"never reached wavekv's attention.*'llama'"):
        model(prompt(20), past_key_values=cache)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_keys_that_are_attended_to_twice(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OffloadedKV(tiny_llama)
    given: list[Any] = []
    update = OffloadedCache.update

    def first_layer_only(*args: Any, **kwargs: Any) -> Any:
        given.append(update(*args, **kwargs)) if not given else None
        return given[0]

    monkeypatch.setattr(OffloadedCache, "update", first_layer_only)
    with pytest.raises(UnsupportedModelError, match="attends twice to keys that were cached once"):
        model(prompt(20))


def test_gradients(wrapped: Wrap) -> None:
    model = wrapped("llama")
    embedded = model.get_input_embeddings()(prompt(20)).requires_grad_()
    with pytest.raises(CacheError, match=r"does not carry gradients.*no_grad"):
        model(inputs_embeds=embedded)
    model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    assert embedded.grad is not None


@torch.no_grad()
def test_attention_weights(wrapped: Wrap) -> None:
    with pytest.raises(UnsupportedModelError, match=r"output_attentions .*never all computed"):
        wrapped("llama")(prompt(20), output_attentions=True)


@torch.no_grad()
def test_a_custom_mask(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    mask = torch.ones(20, 20).tril().bool()[None, None]
    with pytest.raises(UnsupportedModelError, match=r"padding \[B, T\] only, got a mask of shape"):
        model(prompt(20), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_prompt_that_the_cache_holds_already(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    model.prefill(prompt(40), cache)
    for length in (30, 40):
        with pytest.raises(CacheError, match=rf"longer than the 40 tokens.*got {length}; pass all"):
            model.generate(prompt(length), past_key_values=cache)
    with pytest.raises(CacheError, match=r"input_ids \[B, T\] with T >= 1"):
        model.prefill(prompt(1)[:, :0], cache)


def test_masks_of_the_wrong_length(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    model.prefill(prompt(40), cache)
    short = torch.ones(1, 10)
    for call in (
        lambda: model.prefill(prompt(10), cache, short),
        lambda: model(prompt(10), past_key_values=cache, attention_mask=short),
        lambda: model.generate(prompt(50), past_key_values=cache, attention_mask=short),
    ):
        with pytest.raises(CacheError, match=r"\(1, 50\) = \[B, 40 \+ 10\], got \(1, 10\)"):
            call()


def test_another_number_of_sequences(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    said = model.generate(prompt(40), past_key_values=cache, num_beams=2, max_new_tokens=4)
    whole = torch.cat([said, prompt(20)], 1)
    with pytest.raises(CacheError, match=r"expected 2 sequences, .*got 1; use a new cache"):
        model.generate(whole, past_key_values=cache)


def test_assisted_decoding_in_a_second_turn(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    said = model.generate(prompt(40), past_key_values=cache, max_new_tokens=4)
    with pytest.raises(CacheError, match="expected an empty cache for assisted decoding"):
        model.generate(said, past_key_values=cache, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("change", ["mask", "unmask", "forget"])
def test_a_mask_that_changes(change: str, wrapped: Wrap) -> None:
    model = wrapped("llama")
    ids, mask = left_padded(60, 40)
    cache = model.new_cache()
    model.prefill(ids, cache, mask)
    length = cache.get_seq_length()
    after: Tensor | None = torch.cat([mask, torch.ones(2, 10, dtype=torch.long)], 1)
    if change == "mask":
        after[0, 30] = 0
    elif change == "unmask":
        after[1, 5] = 1
    else:
        after = None
    for call in (
        lambda: model.prefill(prompt(10, batch=2), cache, after),
        lambda: model(prompt(10, batch=2), past_key_values=cache, attention_mask=after),
    ):
        with pytest.raises(CacheError, match="attention_mask"):
            call()
    assert cache.get_seq_length() == length


def test_crop_by_a_positive_number(wrapped: Wrap) -> None:
    cache = wrapped("llama").new_cache()
    with pytest.raises(CacheError, match="minus the number of tokens to remove, got 5"):
        cache.crop(5)


@pytest.mark.parametrize("amount", [-0.5, torch.tensor(-2.5), "-3", None])
def test_crop_by_what_is_no_whole_number(amount: object, wrapped: Wrap) -> None:
    cache = wrapped("llama").new_cache()
    with pytest.raises(CacheError, match="whole number of tokens"):
        cache.crop(amount)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_crop_where_a_layer_cannot_go_back(model_type: str, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type), prompt(100)
    cache = model.new_cache()
    cache.crop(-5)
    model.prefill(ids, cache)
    with pytest.raises(CacheError, match=r"layers that can forget tokens, got .*fork\(\) before"):
        cache.crop(-5)
    check_answers(model, model_type, cache, ids)
