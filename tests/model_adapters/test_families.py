"""Every family, wrapped and retrieving everything, says what its eager model says."""

from __future__ import annotations

import pytest
import torch
from eager_answers import PREFILL_CHUNK, Wrap, eager_tokens, generate, two_prompts
from tiny_models import BY_TYPE, FAMILIES, SCENARIOS, eager_model, left_padded, prompt

from wavekv import OffloadedKV


def _check(model: OffloadedKV, model_type: str, scenario: str) -> None:
    cache = model.new_cache()
    if scenario.startswith("two_turns"):
        first, second = two_prompts()
        expected_first, expected_second = eager_tokens(model_type, "two_turns")
        said = generate(model, first, past_key_values=cache)
        assert torch.equal(said, expected_first)
        whole = torch.cat([said, second], 1)
        options = {"attention_mask": torch.ones_like(whole), "past_key_values": cache}
        assert torch.equal(generate(model, whole, **options), expected_second)
    elif scenario.startswith("padded"):
        ids, mask = left_padded(131, 97)
        out = generate(model, ids, attention_mask=mask, past_key_values=cache)
        assert torch.equal(out, eager_tokens(model_type, "padded"))
    elif scenario == "beams":
        out = generate(model, prompt(117), num_beams=2, past_key_values=cache)
        assert torch.equal(out, eager_tokens(model_type, "beams"))
    else:
        options = {"prompt_lookup_num_tokens": 3} if scenario == "prompt_lookup" else {}
        out = generate(model, prompt(131), past_key_values=cache, **options)
        assert torch.equal(out, eager_tokens(model_type, "greedy"))
    assert cache.stats()["pages"] > 0


@pytest.mark.parametrize("mode", ["exact", "retrieval"])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("model_type", [family.model_type for family in FAMILIES])
def test_tokens_equal_eager(
    model_type: str, scenario: str, mode: str, wrapped: Wrap, device: torch.device
) -> None:
    chunk = {"prefill_chunk": PREFILL_CHUNK} if scenario.endswith("chunked") else {}
    model = wrapped(model_type, device=device, mode=mode, **chunk)
    reason = BY_TYPE[model_type].unsupported.get(scenario)
    if reason is None:
        _check(model, model_type, scenario)
        return
    # transformers must refuse this without wavekv too
    for each in (eager_model(model_type), model):
        with pytest.raises(ValueError, match=reason):
            generate(each, prompt(40), prompt_lookup_num_tokens=3)
    pytest.skip(f"transformers: {reason}")


def test_what_is_tested_could_fail(wrapped: Wrap) -> None:
    # dropping most pages must show in the tokens, or equality above would prove nothing
    model = wrapped("llama", budget=4, min_budget=0, tail_estimate="none")
    assert not torch.equal(generate(model, prompt(131)), eager_tokens("llama", "greedy"))


@pytest.mark.parametrize("model_type", [family.model_type for family in FAMILIES])
def test_prefill_logits_equal_eager(model_type: str, wrapped: Wrap) -> None:
    model = wrapped(model_type, prefill_chunk=PREFILL_CHUNK)
    ids, mask = left_padded(116, 90)
    cache = model.new_cache()
    logits = model.prefill(ids, cache, mask)
    counted = (mask.cumsum(-1) - 1).clamp_min(0)
    eager = eager_model(model_type)(input_ids=ids, attention_mask=mask, position_ids=counted)
    torch.testing.assert_close(logits, eager.logits[:, -1], rtol=1e-3, atol=1e-3)
    assert cache.get_seq_length() == 116
    assert cache.stats()["decode_steps"] == 0
