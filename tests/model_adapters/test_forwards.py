"""Forwards by hand, outside generate(): decode loops, several tokens, no cache, other caches."""

from __future__ import annotations

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
from tiny_models import EVERY_KIND, TINY, eager_model, left_padded, make_model, prompt
from transformers import DynamicCache

from wavekv import OffloadedKV


@pytest.mark.parametrize("model_type", EVERY_KIND)
@pytest.mark.parametrize("mode", ["exact", "retrieval"])
def test_a_decode_loop_by_hand(model_type: str, mode: str, wrapped: Wrap) -> None:
    model = wrapped(model_type, mode=mode, prefill_chunk=PREFILL_CHUNK)
    ids, mask = left_padded(131, 97)
    cache = model.new_cache()
    token = model.prefill(ids, cache, mask).argmax(-1, keepdim=True)
    with torch.no_grad():
        for _ in range(NUM_NEW - 1):
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
            out = model(token, attention_mask=mask, past_key_values=cache)
            assert out.past_key_values is cache
            token = out.logits[:, -1].argmax(-1, keepdim=True)
    expected = eager_tokens(model_type, "padded")
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


def test_inference_mode_comes_and_goes(wrapped: Wrap) -> None:
    model, ids = wrapped("llama", prefill_chunk=PREFILL_CHUNK), prompt(100)
    cache = model.new_cache()
    with torch.inference_mode():
        model.prefill(ids, cache)
    whole = torch.cat([ids, prompt(25, seed=21)], 1)
    assert torch.equal(continued(model, whole, cache), from_scratch("llama", whole))


def test_a_plain_cache_still_works_in_the_bare_model(wrapped: Wrap) -> None:
    # guidance and assistants call the inner model with caches of their own
    inner = wrapped("gemma3_text").model
    ids, mask = left_padded(110, 70)
    out = generate(
        inner, ids, attention_mask=mask, past_key_values=DynamicCache(config=inner.config)
    )
    assert torch.equal(out, generate(eager_model("gemma3_text"), ids, attention_mask=mask))


def test_dropout_of_a_model_in_training_stays(wrapped: Wrap) -> None:
    model = make_model("gpt2", attn_pdrop=0.5, attention="sdpa")
    model.config.resid_pdrop = 0.0
    with OffloadedKV(model, TINY) as bare:
        bare.train()
        outs = [bare(prompt(40), use_cache=False).logits for _ in range(2)]
        assert not torch.equal(*outs)
        bare.eval()
