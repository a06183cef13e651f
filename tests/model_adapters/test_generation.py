"""What generate() offers, and what it is given, works in a wrapped model as in an eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_answers import (
    NUM_NEW,
    PREFILL_CHUNK,
    Wrap,
    eager_tokens,
    from_scratch,
    generate,
    two_prompts,
)
from tiny_models import EVERY_KIND, TINY, eager_model, left_padded, make_model, prompt
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from wavekv import OffloadedKV
from wavekv.errors import CacheError


def test_generation_without_a_cache(wrapped: Wrap) -> None:
    out = generate(wrapped("llama"), prompt(131), use_cache=False)
    assert torch.equal(out, eager_tokens("llama", "greedy"))


@pytest.mark.parametrize("model_type", EVERY_KIND)
def test_sampling_several_sequences(model_type: str, wrapped: Wrap) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "max_new_tokens": NUM_NEW}
    said = []
    for model in (wrapped(model_type, prefill_chunk=PREFILL_CHUNK), eager_model(model_type)):
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
    out = generate(model, whole, past_key_values=cache, attention_mask=mask)
    assert torch.equal(out, generate(eager_model("llama"), whole, attention_mask=mask))


def test_beams_from_a_cache_with_one_turn(wrapped: Wrap) -> None:
    model, (first, second) = wrapped("llama"), two_prompts()
    cache = model.new_cache()
    said = generate(model, first, past_key_values=cache)
    whole = torch.cat([said, second], 1)
    mask = torch.ones_like(whole)
    out = generate(model, whole, past_key_values=cache, num_beams=2, attention_mask=mask)
    expected = generate(eager_model("llama"), whole, num_beams=2, attention_mask=mask)
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
    out = generate(wrapped("llama"), ids, streamer=streamer, logits_processor=processors)
    expected = generate(eager_model("llama"), ids, logits_processor=processors)
    assert torch.equal(out, expected)
    assert streamer.ids == out[0].tolist()
    assert streamer.has_ended
    assert (out[0, 110:] % 2 == 0).all()


def test_padding_is_inferred_as_transformers_infers_it(wrapped: Wrap) -> None:
    ids, _ = left_padded(131, 97)
    out = generate(wrapped("llama", prefill_chunk=PREFILL_CHUNK), ids)
    assert torch.equal(out, generate(eager_model("llama"), ids))
    # not where padding and end are one token: then the tokens are real
    out = generate(wrapped("llama", prefill_chunk=PREFILL_CHUNK), ids, eos_token_id=[7, 0])
    expected = generate(eager_model("llama"), ids, eos_token_id=[7, 0])
    assert torch.equal(out, expected)


def test_a_generation_config_counts_as_keywords_do(wrapped: Wrap) -> None:
    model = wrapped("llama", prefill_chunk=PREFILL_CHUNK)
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
    out = generate(model, ids, **options)
    assert torch.equal(out, generate(eager_model("llama"), ids, **options))
    assert not torch.equal(out, generate(model, ids))


def test_embeddings_in_place_of_ids(wrapped: Wrap) -> None:
    model, ids = wrapped("llama"), prompt(60)
    embedded = model.get_input_embeddings()(ids)
    out = generate(model, None, inputs_embeds=embedded)
    assert torch.equal(out, generate(eager_model("llama"), ids)[:, 60:])


def test_an_assistant_model(wrapped: Wrap) -> None:
    ids = prompt(110)
    out = generate(wrapped("llama"), ids, assistant_model=eager_model("llama"))
    assert torch.equal(out, from_scratch("llama", ids))


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
    said = generate(model, ids, past_key_values=cache)
    assert torch.equal(said, generate(eager, ids))
    whole = torch.cat([said, prompt(40, seed=3)], 1)
    if length > 64:
        mask = torch.ones_like(whole)
        out = generate(model, whole, past_key_values=cache, attention_mask=mask)
        assert torch.equal(out, generate(eager, whole, attention_mask=mask))
    else:
        with pytest.raises(CacheError, match=r"rotates keys differently beyond 64 tokens"):
            generate(model, whole, past_key_values=cache)
