"""Models and settings that cannot be: what is refused, and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import build, make_model, prompt
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation import GenerationMixin

from wavekv import OffloadConfig, OffloadedKV
from wavekv.errors import (
    ConfigError,
    LayoutError,
    UnsupportedModelError,
)
from wavekv.offload import LayerContext, OffloadRuntime

Wrap = Callable[..., OffloadedKV]


def _attention_of(model: Any) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def _refuses(model: Any, message: str) -> None:
    """Wrapping raises, and the model is as it was."""
    before = _attention_of(model)
    with pytest.raises(UnsupportedModelError, match=message):
        OffloadedKV(model)
    assert _attention_of(model) == before


def test_multi_head_latent_attention() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    _refuses(build(config), r"'deepseek_v3' with multi-head latent attention.*not supported")


def test_encoder_decoder() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    _refuses(T5ForConditionalGeneration(config), r"expected a decoder-only model.*'t5'")


def test_no_layer_with_full_attention() -> None:
    model = make_model("mistral", sliding_window=16)
    _refuses(model, r"'mistral' with only DynamicSlidingWindowLayer: there is nothing to offload")


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_keys(model_type: str) -> None:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=50,
        vocab_size_per_layer_input=50,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_kv_shared_layers=2,
        head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=None,
    )
    _refuses(build(config), "attend to keys of earlier ones; shared keys are not supported")


class OwnAttention(nn.Module):
    """Attention that does not go through transformers' interface."""


class OwnModel(PreTrainedModel, GenerationMixin):
    """A model as a repository with code of its own would bring it."""

    config_class = LlamaConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.attention = OwnAttention()

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


def test_attention_that_cannot_be_switched() -> None:
    model = OwnModel(LlamaConfig(num_hidden_layers=1, attn_implementation="eager"))
    _refuses(model, r"expected a model whose attention can be switched.*OwnModel")


def test_a_model_without_a_head() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8
    )
    _refuses(AutoModel.from_config(config), "expected a model with a language-model head")


def test_something_else_than_a_model() -> None:
    with pytest.raises(UnsupportedModelError, match=r"expected a Hugging Face model.*Linear"):
        OffloadedKV(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_wrapper_is_not_wrapped(wrapped: Wrap) -> None:
    with pytest.raises(ConfigError, match=r"wrapped already.*wrap its \.model"):
        OffloadedKV(wrapped("llama"))  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0, 0.0, 1.5, -1, True])
def test_budget_out_of_range(tiny_llama: PreTrainedModel, budget: Any) -> None:
    with pytest.raises(ConfigError, match=rf"budget must be .*got {re.escape(repr(budget))}"):
        OffloadedKV(tiny_llama, budget=budget)
    assert _attention_of(tiny_llama) == "sdpa"


def test_unknown_settings(tiny_llama: PreTrainedModel, wrapped: Wrap) -> None:
    with pytest.raises(ConfigError, match=r"expected only the settings mode.*\['budgets'\]"):
        OffloadedKV(tiny_llama, budgets=0.1)
    cache = wrapped("llama").new_cache()
    with pytest.raises(ConfigError, match=r"expected only the settings mode.*\['page_size'\]"):
        cache.fork(page_size=8)


def test_cache_implementation(wrapped: Wrap) -> None:
    with pytest.raises(ConfigError, match=r"expected no cache_implementation, got 'static'"):
        wrapped("llama").generate(prompt(20), cache_implementation="static")


def test_a_checkpoint_with_a_cache_of_its_own_is_welcome(tiny_llama: PreTrainedModel) -> None:
    tiny_llama.generation_config.cache_implementation = "static"
    with OffloadedKV(tiny_llama) as model:
        assert model.generate(prompt(20), max_new_tokens=3).shape == (1, 23)


def test_continuous_batching(wrapped: Wrap) -> None:
    with pytest.raises(UnsupportedModelError, match=r"generate_batch .*use generate\(\)"):
        wrapped("llama").generate_batch([[1, 2, 3]])


def test_a_cache_and_no_cache(wrapped: Wrap) -> None:
    model = wrapped("llama")
    with pytest.raises(ConfigError, match="either past_key_values or use_cache=False"):
        model.generate(prompt(20), past_key_values=model.new_cache(), use_cache=False)


def test_an_odd_head_dimension() -> None:
    keys = torch.zeros(1, 1, 4, 5)
    with pytest.raises(LayoutError, match="even head dimension, got 5"):
        LayerContext(OffloadRuntime(OffloadConfig()), keys, keys)
