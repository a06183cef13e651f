"""A wrapped model that retrieves everything says exactly what the unwrapped eager model says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import (
    BY_TYPE,
    FAMILIES,
    SCENARIOS,
    TINY,
    eager_model,
    left_padded,
    make_model,
    prompt,
)
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from wavekv import OffloadedKV
from wavekv.errors import CacheError

NUM_NEW = 8
CHUNK = 23

Wrap = Callable[..., OffloadedKV]


def _generate(model: Any, ids: Tensor | None, **options: Any) -> Tensor:
    """Greedy tokens on the CPU, wherever the model is."""
    moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    ids = None if ids is None else ids.to(model.device)
    tokens: Tensor = model.generate(ids, max_new_tokens=NUM_NEW, do_sample=False, **moved)
    return tokens.cpu()


def _turns() -> tuple[Tensor, Tensor]:
    return prompt(97, seed=5), prompt(31, seed=6)


@cache
def _expected(model_type: str, scenario: str) -> Tensor | tuple[Tensor, ...]:
    """What eager attention generates. A second turn is computed from scratch."""
    model = eager_model(model_type)
    if scenario == "padded":
        ids, mask = left_padded(131, 97)
        return _generate(model, ids, attention_mask=mask)
    if scenario == "beams":
        return _generate(model, prompt(117), num_beams=2)
    if scenario == "two_turns":
        first, second = _turns()
        said = _generate(model, first)
        whole = torch.cat([said, second], 1)
        return said, _generate(model, whole, attention_mask=torch.ones_like(whole))
    return _generate(model, prompt(131))


def _check(model: OffloadedKV, model_type: str, scenario: str) -> None:
    cache = model.new_cache()
    if scenario.startswith("two_turns"):
        first, second = _turns()
        expected_first, expected_second = _expected(model_type, "two_turns")
        said = _generate(model, first, past_key_values=cache)
        assert torch.equal(said, expected_first)
        whole = torch.cat([said, second], 1)
        options = {"attention_mask": torch.ones_like(whole), "past_key_values": cache}
        assert torch.equal(_generate(model, whole, **options), expected_second)
    elif scenario.startswith("padded"):
        ids, mask = left_padded(131, 97)
        out = _generate(model, ids, attention_mask=mask, past_key_values=cache)
        assert torch.equal(out, _expected(model_type, "padded"))
    elif scenario == "beams":
        out = _generate(model, prompt(117), num_beams=2, past_key_values=cache)
        assert torch.equal(out, _expected(model_type, "beams"))
    else:
        options = {"prompt_lookup_num_tokens": 3} if scenario == "prompt_lookup" else {}
        out = _generate(model, prompt(131), past_key_values=cache, **options)
        assert torch.equal(out, _expected(model_type, "greedy"))
    assert cache.stats()["pages"] > 0


@pytest.mark.parametrize("mode", ["exact", "retrieval"])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("model_type", [family.model_type for family in FAMILIES])
def test_tokens_equal_eager(
    model_type: str, scenario: str, mode: str, wrapped: Wrap, device: torch.device
) -> None:
    chunk = {"prefill_chunk": CHUNK} if scenario.endswith("chunked") else {}
    model = wrapped(model_type, device=device, mode=mode, **chunk)
    reason = BY_TYPE[model_type].unsupported.get(scenario)
    if reason is None:
        _check(model, model_type, scenario)
        return
    # transformers must refuse this without wavekv too
    for each in (eager_model(model_type), model):
        with pytest.raises(ValueError, match=reason):
            _generate(each, prompt(40), prompt_lookup_num_tokens=3)
    pytest.skip(f"transformers: {reason}")


def test_what_is_tested_could_fail(wrapped: Wrap) -> None:
    # dropping most pages must show in the tokens, or equality above would prove nothing
    model = wrapped("llama", budget=4, min_budget=0, tail_estimate="none")
    assert not torch.equal(_generate(model, prompt(131)), _expected("llama", "greedy"))


@pytest.mark.parametrize("model_type", [family.model_type for family in FAMILIES])
def test_prefill_logits_equal_eager(model_type: str, wrapped: Wrap) -> None:
    model = wrapped(model_type, prefill_chunk=CHUNK)
    ids, mask = left_padded(116, 90)
    cache = model.new_cache()
    logits = model.prefill(ids, cache, mask)
    counted = (mask.cumsum(-1) - 1).clamp_min(0)
    eager = eager_model(model_type)(input_ids=ids, attention_mask=mask, position_ids=counted)
    torch.testing.assert_close(logits, eager.logits[:, -1], rtol=1e-3, atol=1e-3)
    assert cache.get_seq_length() == 116
    assert cache.stats()["decode_steps"] == 0


# One family for each kind of layer that wavekv leaves alone, and one with absolute positions.
EVERY_KIND = ["llama", "gpt2", "gemma3_text", "llama4_text", "qwen3_next"]


@pytest.mark.parametrize("model_type", EVERY_KIND)
@pytest.mark.parametrize("mode", ["exact", "retrieval"])
def test_a_decode_loop_by_hand(model_type: str, mode: str, wrapped: Wrap) -> None:
    model = wrapped(model_type, mode=mode, prefill_chunk=CHUNK)
    ids, mask = left_padded(131, 97)
    cache = model.new_cache()
    token = model.prefill(ids, cache, mask).argmax(-1, keepdim=True)
    with torch.no_grad():
        for _ in range(NUM_NEW - 1):
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            out = model(token, attention_mask=mask, past_key_values=cache)
            assert out.past_key_values is cache
            token = out.logits[:, -1].argmax(-1, keepdim=True)
    expected = _expected(model_type, "padded")
    assert torch.equal(torch.cat([ids, token], 1), expected)


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_forwards_of_several_tokens(model_type: str, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type), prompt(120)
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split([50, 40, 30], 1)]
        expected = eager_model(model_type)(ids).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_a_forward_without_a_cache(model_type: str, wrapped: Wrap) -> None:
    model, (ids, mask) = wrapped(model_type), left_padded(60, 45)
    out = model(input_ids=ids, attention_mask=mask, use_cache=False)
    expected = eager_model(model_type)(input_ids=ids, attention_mask=mask, use_cache=False)
    assert out.past_key_values is None
    kept = mask.bool()
    torch.testing.assert_close(out.logits[kept], expected.logits[kept], rtol=1e-3, atol=1e-3)


def test_generation_without_a_cache(wrapped: Wrap) -> None:
    out = _generate(wrapped("llama"), prompt(131), use_cache=False)
    assert torch.equal(out, _expected("llama", "greedy"))


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_sampling_several_sequences(model_type: str, wrapped: Wrap) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "max_new_tokens": NUM_NEW}
    said = []
    for model in (wrapped(model_type, prefill_chunk=CHUNK), eager_model(model_type)):
        torch.manual_seed(3)
        said.append(model.generate(prompt(110), **options))
    assert said[0].shape[0] == 3
    assert torch.equal(*said)


def test_sampled_sequences_go_on_in_a_second_turn(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": NUM_NEW}
    said = model.generate(prompt(110), past_key_values=cache, **options)
    whole = torch.cat([said, prompt(20, seed=9, batch=3)], 1)
    mask = torch.ones_like(whole)
    out = _generate(model, whole, past_key_values=cache, attention_mask=mask)
    assert torch.equal(out, _generate(eager_model("llama"), whole, attention_mask=mask))


def test_beams_from_a_cache_with_one_turn(wrapped: Wrap) -> None:
    model, (first, second) = wrapped("llama"), _turns()
    cache = model.new_cache()
    said = _generate(model, first, past_key_values=cache)
    whole = torch.cat([said, second], 1)
    mask = torch.ones_like(whole)
    out = _generate(model, whole, past_key_values=cache, num_beams=2, attention_mask=mask)
    expected = _generate(eager_model("llama"), whole, num_beams=2, attention_mask=mask)
    assert torch.equal(out, expected)


def test_a_streamer_and_a_logits_processor(wrapped: Wrap) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.has_ended = False

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.has_ended = True

    class EvenOnly(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -torch.inf)

    streamer, ids = Collect(), prompt(110)
    processors = LogitsProcessorList([EvenOnly()])
    out = _generate(wrapped("llama"), ids, streamer=streamer, logits_processor=processors)
    expected = _generate(eager_model("llama"), ids, logits_processor=processors)
    assert torch.equal(out, expected)
    assert streamer.ids == out[0].tolist()
    assert streamer.has_ended
    assert (out[0, 110:] % 2 == 0).all()


def test_padding_is_inferred_as_transformers_infers_it(wrapped: Wrap) -> None:
    ids, _ = left_padded(131, 97)
    out = _generate(wrapped("llama", prefill_chunk=CHUNK), ids)
    assert torch.equal(out, _generate(eager_model("llama"), ids))
    # not where padding and end are one token: then the tokens are real
    out = _generate(wrapped("llama", prefill_chunk=CHUNK), ids, eos_token_id=[7, 0])
    expected = _generate(eager_model("llama"), ids, eos_token_id=[7, 0])
    assert torch.equal(out, expected)


def test_a_generation_config_counts_as_keywords_do(wrapped: Wrap) -> None:
    model = wrapped("llama", prefill_chunk=CHUNK)
    settings = type(model.generation_config)(
        max_new_tokens=NUM_NEW, num_beams=2, pad_token_id=99, prefill_chunk_size=10
    )
    ids, _ = left_padded(117, 80)
    out = model.generate(ids, settings)
    settings.prefill_chunk_size = None
    assert torch.equal(out, eager_model("llama").generate(ids, settings))


def test_positions_of_the_callers_own(wrapped: Wrap) -> None:
    model, ids = wrapped("llama"), prompt(60)
    options = {"position_ids": torch.arange(5, 125, 2)[None]}
    out = _generate(model, ids, **options)
    assert torch.equal(out, _generate(eager_model("llama"), ids, **options))
    assert not torch.equal(out, _generate(model, ids))


def test_embeddings_in_place_of_ids(wrapped: Wrap) -> None:
    model, ids = wrapped("llama"), prompt(60)
    embedded = model.get_input_embeddings()(ids)
    out = _generate(model, None, inputs_embeds=embedded)
    assert torch.equal(out, _generate(eager_model("llama"), ids)[:, 60:])


def _continued(model: OffloadedKV, ids: Tensor, cache: Any) -> Tensor:
    return _generate(model, ids, past_key_values=cache, attention_mask=torch.ones_like(ids))


def _from_scratch(model_type: str, ids: Tensor) -> Tensor:
    return _generate(eager_model(model_type), ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_a_fork_and_its_origin_both_go_on(model_type: str, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type, prefill_chunk=CHUNK), prompt(100)
    cache = model.new_cache()
    model.prefill(ids, cache)
    fork = cache.fork(mode="exact")
    for branch, seed in ((cache, 21), (fork, 22)):
        whole = torch.cat([ids, prompt(25, seed=seed)], 1)
        assert torch.equal(_continued(model, whole, branch), _from_scratch(model_type, whole))
        assert branch.get_seq_length() == 100 + 25 + NUM_NEW - 1


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "olmo2"])
@pytest.mark.parametrize("kept", [3, 30, 61, 99])
def test_crop_then_go_on(model_type: str, kept: int, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type, prefill_chunk=CHUNK), prompt(100)
    cache = model.new_cache()
    model.prefill(ids, cache)
    cache.crop(kept - 100)
    assert cache.get_seq_length() == kept
    whole = torch.cat([ids[:, :kept], prompt(60, seed=11)], 1)
    assert torch.equal(_continued(model, whole, cache), _from_scratch(model_type, whole))


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
    assert torch.equal(_continued(model, ids, cache), _from_scratch(model_type, ids))


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_reordered_sequences_go_on(model_type: str, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type, prefill_chunk=CHUNK), prompt(100, batch=3)
    cache = model.new_cache()
    model.prefill(ids, cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    whole = torch.cat([ids[[2, 2, 0, 0]], prompt(30, seed=12, batch=4)], 1)
    assert torch.equal(_continued(model, whole, cache), _from_scratch(model_type, whole))


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_a_reset_cache_is_as_new(model_type: str, wrapped: Wrap) -> None:
    model = wrapped(model_type)
    cache = model.new_cache()
    model.prefill(prompt(100, batch=3), cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0
    ids = prompt(131)
    assert torch.equal(_continued(model, ids, cache), _from_scratch(model_type, ids))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_lookup_leaves_a_cache_that_goes_on(model_type: str, wrapped: Wrap) -> None:
    model, ids = wrapped(model_type), prompt(110)
    cache = model.new_cache()
    said = _generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=4)
    whole = torch.cat([said, prompt(20, seed=13)], 1)
    assert torch.equal(_continued(model, whole, cache), _from_scratch(model_type, whole))
    for layer in cache.layers:
        if getattr(layer, "sliding_window", None):
            assert layer.keys.shape[2] < layer.sliding_window


def _longrope(attention: str) -> Any:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors}
    rope["original_max_position_embeddings"] = 64
    options = {"rope_parameters": rope, "original_max_position_embeddings": 64, "hidden_size": 64}
    return make_model("phi3", attention, max_position_embeddings=256, **options)


@pytest.mark.parametrize(("length", "chunk"), [(40, 23), (60, 23), (66, 23), (100, 23), (130, 70)])
def test_rotations_that_change_with_the_length(length: int, chunk: int) -> None:
    model = OffloadedKV(_longrope("sdpa"), TINY, prefill_chunk=chunk)
    eager, ids, cache = _longrope("eager"), prompt(length), model.new_cache()
    said = _generate(model, ids, past_key_values=cache)
    assert torch.equal(said, _generate(eager, ids))
    whole = torch.cat([said, prompt(40, seed=3)], 1)
    if length > 64:
        mask = torch.ones_like(whole)
        out = _generate(model, whole, past_key_values=cache, attention_mask=mask)
        assert torch.equal(out, _generate(eager, whole, attention_mask=mask))
    else:
        with pytest.raises(CacheError, match=r"rotates keys differently beyond 64 tokens"):
            _generate(model, whole, past_key_values=cache)


def test_an_assistant_model(wrapped: Wrap) -> None:
    ids = prompt(110)
    out = _generate(wrapped("llama"), ids, assistant_model=eager_model("llama"))
    assert torch.equal(out, _from_scratch("llama", ids))


def test_inference_mode_comes_and_goes(wrapped: Wrap) -> None:
    model, ids = wrapped("llama", prefill_chunk=CHUNK), prompt(100)
    cache = model.new_cache()
    with torch.inference_mode():
        model.prefill(ids, cache)
    whole = torch.cat([ids, prompt(25, seed=21)], 1)
    assert torch.equal(_continued(model, whole, cache), _from_scratch("llama", whole))


def test_a_plain_cache_still_works_in_the_bare_model(wrapped: Wrap) -> None:
    # guidance and assistants call the inner model with caches of their own
    inner = wrapped("gemma3_text").model
    ids, mask = left_padded(110, 70)
    out = _generate(
        inner, ids, attention_mask=mask, past_key_values=DynamicCache(config=inner.config)
    )
    assert torch.equal(out, _generate(eager_model("gemma3_text"), ids, attention_mask=mask))


def test_a_deep_copy_is_a_fork(wrapped: Wrap) -> None:
    model = wrapped("llama")
    cache = model.new_cache()
    model.prefill(prompt(131)[:, :100], cache)
    copied = copy.deepcopy(cache)
    for each in (cache, copied):
        tokens = _generate(model, prompt(131), past_key_values=each)
        assert torch.equal(tokens, _expected("llama", "greedy"))


def test_dropout_of_a_model_in_training_stays(wrapped: Wrap) -> None:
    model = make_model("gpt2", attn_pdrop=0.5, attention="sdpa")
    model.config.resid_pdrop = 0.0
    with OffloadedKV(model, TINY) as bare:
        bare.train()
        outs = [bare(prompt(40), use_cache=False).logits for _ in range(2)]
        assert not torch.equal(*outs)
        bare.eval()
