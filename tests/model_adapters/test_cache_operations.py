"""A cache that was forked, cropped, reordered, reset or copied goes on as if from scratch."""

from __future__ import annotations

import copy

import pytest
import torch
from eager_answers import (
    NUM_NEW,
    PREFILL_CHUNK,
    Wrap,
    continued,
    eager_tokens,
    from_scratch,
    generate,
)
from tiny_models import EVERY_KIND, prompt


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_a_fork_and_its_origin_both_go_on(model_type: str, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type, prefill_chunk=PREFILL_CHUNK), prompt(100)
    cache = model.new_cache()
    model.prefill(ids, cache)
    fork = cache.fork(mode="exact")
    for branch, seed in ((cache, 21), (fork, 22)):
        whole = torch.cat([ids, prompt(25, seed=seed)], 1)
        assert torch.equal(continued(model, whole, branch), from_scratch(model_type, whole))
        assert branch.get_seq_length() == 100 + 25 + NUM_NEW - 1


def test_a_deep_copy_is_a_fork(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    model.prefill(prompt(131)[:, :100], cache)
    copied = copy.deepcopy(cache)
    for each in (cache, copied):
        tokens = generate(model, prompt(131), past_key_values=each)
        assert torch.equal(tokens, eager_tokens("llama", "greedy"))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "olmo2"])
@pytest.mark.parametrize("kept", [3, 30, 61, 99])
def test_crop_then_go_on(model_type: str, kept: int, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type, prefill_chunk=PREFILL_CHUNK), prompt(100)
    cache = model.new_cache()
    model.prefill(ids, cache)
    cache.crop(kept - 100)
    assert cache.get_seq_length() == kept
    whole = torch.cat([ids[:, :kept], prompt(60, seed=11)], 1)
    assert torch.equal(continued(model, whole, cache), from_scratch(model_type, whole))


@pytest.mark.parametrize("model_type", ["gemma2", "llama4_text"])
def test_crop_by_a_tensor_leaves_a_length_that_is_a_number(model_type: str, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type), prompt(100)
    cache = model.new_cache()
    cache.activate_past_recording()
    model.prefill(ids, cache)
    cache.crop(torch.tensor(-7))
    cache.stop_recording()
    lengths = [layer.get_seq_length() for layer in cache.layers]
    # a tensor would change with the cache, and the cache with what is added to it
    assert all(type(length) is int for length in lengths)
    assert lengths == [93] * len(lengths)
    assert torch.equal(continued(model, ids, cache), from_scratch(model_type, ids))


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_reordered_sequences_go_on(model_type: str, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type, prefill_chunk=PREFILL_CHUNK), prompt(100, batch=3)
    cache = model.new_cache()
    model.prefill(ids, cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    whole = torch.cat([ids[[2, 2, 0, 0]], prompt(30, seed=12, batch=4)], 1)
    assert torch.equal(continued(model, whole, cache), from_scratch(model_type, whole))


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_a_reset_cache_is_as_new(model_type: str, wrapped: Wrap) -> None:
    model = wrapped(model_type)
    cache = model.new_cache()
    model.prefill(prompt(100, batch=3), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    ids = prompt(131)
    assert torch.equal(continued(model, ids, cache), from_scratch(model_type, ids))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_lookup_leaves_a_cache_that_goes_on(model_type: str, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type), prompt(110)
    cache = model.new_cache()
    said = generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=4)
    whole = torch.cat([said, prompt(20, seed=13)], 1)
    assert torch.equal(continued(model, whole, cache), from_scratch(model_type, whole))
    for layer in cache.layers:
        if getattr(layer, "sliding_window", None):
            assert layer.keys.shape[2] < layer.sliding_window
