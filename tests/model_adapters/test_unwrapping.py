"""Giving a model back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import prompt
from transformers import (
    PreTrainedModel,
)

from wavekv import OffloadedKV


def _attention_of(model: Any) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def test_unwrap_and_with_restore_the_attention(tiny_llama: PreTrainedModel) -> None:
    model = OffloadedKV(tiny_llama)
    assert _attention_of(tiny_llama) == "wavekv"
    assert model.unwrap() is tiny_llama
    assert _attention_of(tiny_llama) == "sdpa"
    model.unwrap()
    with OffloadedKV(tiny_llama):
        assert _attention_of(tiny_llama) == "wavekv"
    assert _attention_of(tiny_llama) == "sdpa"
    with pytest.raises(AttributeError, match="nothing"), OffloadedKV(tiny_llama) as model:
        _ = model.nothing
    assert _attention_of(tiny_llama) == "sdpa"


def test_two_wrappers_of_one_model(tiny_llama: PreTrainedModel) -> None:
    first = OffloadedKV(tiny_llama, mode="exact")
    second = OffloadedKV(tiny_llama, budget=0.5)
    assert torch.equal(
        first.generate(prompt(20), max_new_tokens=3), second.generate(prompt(20), max_new_tokens=3)
    )
    second.unwrap()
    assert _attention_of(tiny_llama) == "sdpa"
    first.unwrap()
    assert _attention_of(tiny_llama) == "sdpa"


def test_attention_that_was_switched_meanwhile_stays(tiny_llama: PreTrainedModel) -> None:
    model = OffloadedKV(tiny_llama)
    tiny_llama.set_attn_implementation("eager")
    model.unwrap()
    assert _attention_of(tiny_llama) == "eager"


def test_attributes_are_the_models(tiny_llama: PreTrainedModel) -> None:
    model = OffloadedKV(tiny_llama)
    assert model.config is tiny_llama.config
    model.generation_config = type(tiny_llama.generation_config)(max_length=30)
    assert tiny_llama.generation_config.max_length == 30
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
